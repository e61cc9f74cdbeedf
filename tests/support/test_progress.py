"""What a training shows while it runs, wherever its output goes."""

import io
import re
from contextlib import ExitStack, redirect_stderr

import pytest

import normlab as nl
from normlab.runs import processes
from normlab.runs.folder import RunFolder
from normlab.support.progress import Progress

RECIPE = nl.Recipe(epochs=3, batch_size=32, lr=0.1)


@pytest.fixture
def train(tiny, tiny_network):
    """Trains for three epochs of three batches each; keyword arguments as for `fit`."""

    def start(**options):
        return nl.fit(tiny_network(), tiny, RECIPE, device="cpu", **options)

    return start


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


ROW = {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.25, "test_loss": 1.5}
ROW |= {"test_accuracy": 0.5, "seconds": 3.0}


def test_without_a_stream_for_errors_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with Progress("BN", 20, 3) as shown:
        shown.finish_epoch(ROW)
    assert capsys.readouterr().out == (
        "BN: epoch  1/20, training loss 2.0000, accuracy 25.00%, "
        "test loss 1.5000, accuracy 50.00%, 3.0 s\n"
    )


def test_a_log_gets_one_line_an_epoch_and_nothing_else(train, capsys):
    run = train(label="BN, seed 0")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == 3
    for line, row in zip(lines, run.history, strict=True):
        assert line.startswith(f"BN, seed 0: epoch {row['epoch']}/3")
        for number in (
            f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}",
            f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}",
        ):
            assert number in line


def test_a_run_without_a_label_is_called_after_its_folder_or_class(train, capsys, tmp_path):
    train()
    assert capsys.readouterr().out.startswith("TinyNetwork: epoch 1/3")
    train(directory=tmp_path / "my-bn")
    assert capsys.readouterr().out.startswith("my-bn: epoch 1/3")


def test_a_loaded_run_prints_nothing(train, capsys, tmp_path):
    train(directory=tmp_path, progress=False)
    train(directory=tmp_path)
    assert capsys.readouterr() == ("", "")


def test_without_progress_nothing_is_printed_at_all(train, capfd):
    train(progress=False)
    assert capfd.readouterr() == ("", "")


def test_without_progress_a_terminal_stays_empty_too(train, capsys):
    with redirect_stderr(Terminal()) as terminal:
        train(progress=False)
    assert terminal.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_that_fills_up(train, capsys):
    with redirect_stderr(Terminal()) as terminal:
        run = train(label="GN")
    states = [state for state in terminal.getvalue().split("\r") if state.strip()]
    assert "GN |" in states[0]
    assert "100%" in states[-1]
    assert f"epoch 3/3, test {run.last['test_accuracy']:.2%}" in states[-1]
    shares = [int(share) for state in states for share in re.findall(r"\| +(\d+)%", state)]
    assert (shares[0], shares[-1]) == (0, 100)
    assert shares == sorted(shares)
    # One bar on one line: the only line feed is the one that ends it.
    assert terminal.getvalue().count("\n") == 1
    assert capsys.readouterr().out == ""


def test_a_resumed_bar_starts_where_the_training_was():
    terminal = Terminal()
    with redirect_stderr(terminal), Progress("GN", epochs=4, steps=5) as shown:
        shown.start_at(2)
        assert list(shown.counted("abcde")) == list("abcde")
    assert "75%" in terminal.getvalue().split("\r")[-1]


@pytest.mark.parametrize("label", ["BN", "LN element-wise, seed 12"])
def test_the_accuracy_is_not_cut_at_80_columns(label, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stderr(Terminal()) as terminal, Progress(label, epochs=20, steps=5) as shown:
        shown.finish_epoch(ROW | {"epoch": 12, "test_accuracy": 1.0})
    last = terminal.getvalue().split("\r")[-1].rstrip()
    assert len(last) <= 80
    assert last.endswith("epoch 12/20, test 100.00%")
    assert f"{label} |" in last


def test_side_by_side_bars_move_within_an_epoch_and_say_who_waits(tmp_path):
    begun, waiting = (RunFolder(tmp_path / name) for name in ("begun", "waiting"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    terminal = Terminal()
    with redirect_stderr(terminal), ExitStack() as stack:
        shown = {
            folder: stack.enter_context(Progress(folder.directory.name, 4, processes.PARTS))
            for folder in (begun, waiting)
        }
        for each in shown.values():
            each.say("waits")
        processes._teller(processes._counter(scratch, begun.directory))(1.5)
        processes._show_all(scratch, shown)
    assert [each.done / processes.PARTS for each in shown.values()] == [1.5, 0]
    ends = [state for state in terminal.getvalue().split("\r") if state.strip()]
    assert any("begun" in state and "waits" not in state and " 38%" in state for state in ends)
    assert "waits" in next(state for state in reversed(ends) if "waiting" in state)


def test_the_bar_is_closed_when_the_training_fails():
    def fail():
        with Progress("GN", epochs=4, steps=5):
            raise KeyboardInterrupt

    with redirect_stderr(Terminal()) as terminal, pytest.raises(KeyboardInterrupt):
        fail()
    assert terminal.getvalue().endswith("\n")


CELL = """
import torch
import normlab as nl

labels = torch.arange(32) % 2
images = (labels.view(-1, 1, 1, 1) * 200 + torch.randint(0, 50, (32, 1, 8, 8))).to(torch.uint8)
data = nl.Dataset("two", images, labels, images, labels, ("dark", "light"), "made up")
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
run = nl.fit(network, data, nl.Recipe(epochs=3, batch_size=8), device="cpu", label="linear")
"""


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """Runs a cell in a kernel and returns the notebook as it would be stored."""
    reason = "needs nbclient, which comes with jupyter"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))

    def execute(source):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
        return notebook

    return execute


TWO = """
from normlab.support.progress import Progress

row = {"epoch": 2, "train_loss": 2, "train_accuracy": 0, "test_loss": 1.5, "test_accuracy": 0.5}
with Progress("BN", 4, 5) as one, Progress("GN", 2, 5) as other:
    for shown in (one, other):
        shown.start_at(2)
        shown.finish_epoch(row | {"seconds": 0})
"""


@pytest.mark.process
@pytest.mark.parametrize("cell", [CELL, TWO])
def test_a_stored_notebook_keeps_one_line_of_the_last_state(executed, cell):
    notebook = executed(cell)
    # A widget's state would keep GitHub from showing the notebook.
    assert "widgets" not in notebook.metadata
    outputs = notebook.cells[0].outputs
    assert {output.output_type for output in outputs} == {"display_data"}
    assert all(set(output.data) == {"text/plain"} for output in outputs)
    texts = [output.data["text/plain"] for output in outputs]
    if cell == TWO:
        end = "epoch 2/{}, test 50.00%"
        half, whole = "BN ██████████░░░░░░░░░░, ", "GN ████████████████████, "
        assert texts == [half + end.format(4), whole + end.format(2)]
    else:
        bar = r"linear █{20}, epoch 3/3, test \d+\.\d\d%"
        assert re.fullmatch(bar, *texts)
