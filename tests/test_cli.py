"""The command as a user meets it: what it prints, writes and returns."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import everything_of
from PIL import Image

import normlab as nl
from normlab.cli import main
from normlab.datasets.loading import DATASETS
from normlab.norms import NORMS
from normlab.runs.folder import RunFolder
from normlab.support import command_line
from normlab.support.command_line import make_parser

# However little there is to do, in two processes side by side.
SIDE_BY_SIDE = "import sys, normlab.cli as c, normlab.runs.processes as p; p.WORTHWHILE = 0; "
SIDE_BY_SIDE += "p.joblib.cpu_count = lambda *_, **__: 2; sys.exit(c.main())"  # also on one core
GRAPHS = {"test-loss.png", "test-accuracy.png", "training-and-test.png"}
REPORT = {"report.md", "results.csv", "results.json", *GRAPHS}


def make_folder(place: Path, train: int = 8, test: int = 4) -> Path:
    """A folder of 20×20 images of two classes, with so many of each."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for shade, name in ((60, "dark"), (200, "light")):
            folder = place / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = shade + random.integers(-50, 50, (20, 20))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return place


def error_of(capsys) -> str:
    """The one line that a failed command says."""
    said = capsys.readouterr().err
    assert said.startswith("normlab: ")
    assert said.count("\n") == 1
    assert said.endswith("\n")
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `normlab run mnist-l1 --dataset FOLDER --epochs 1` leaves and says."""
    place = tmp_path_factory.mktemp("trained")
    out = place / "out"
    options = ["--dataset", str(make_folder(place / "shades")), "--out", str(out)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["run", "mnist-l1", *options, "--epochs", "1", "--device", "cpu"])
    assert status == 0
    return options, out, printed.getvalue()


@pytest.fixture
def again(trained, tmp_path):
    """The same command without its epochs, on a copy of what it left."""
    options, out, _ = trained
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    return ["run", "mnist-l1", *options[:2], "--out", str(copy), "--device", "cpu"], copy


@pytest.fixture
def undrawn(monkeypatch):
    """Without the figures, where they are not what is tested: they take the longest."""
    monkeypatch.setattr("normlab.comparisons.report.save_if_drawn", lambda *_: True)


def histories(out: Path) -> dict[str, list[str]]:
    """The lines of every `history.csv`; their seconds tell one training from another."""
    return {
        file.parent.relative_to(out).as_posix(): file.read_text().splitlines()[1:]
        for file in out.rglob("history.csv")
    }


# --- what works -------------------------------------------------------------------------------


def test_run_needs_no_assignment_and_no_data(tmp_path, monkeypatch, capsys):
    decoy = make_folder(tmp_path / "decoy" / "cifar10").parent
    monkeypatch.setenv("NORMLAB_DATA", str(decoy))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--epochs", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "scikit-learn digits" in said.out.splitlines()[0]
    assert "1,797 digits" in said.out
    out = tmp_path / "runs" / "mnist-l1-digits"
    assert str(out.relative_to(tmp_path)) in said.out
    assert {entry.name for entry in out.iterdir()} >= REPORT
    facts = json.loads((out / "results.json").read_text())
    assert facts["data"]["name"] == "digits"
    assert [variant["variant"] for variant in facts["variants"]] == ["BN + L1", "GN", "LN"]
    for variant in facts["variants"]:
        assert f"{100 * variant['test_accuracy']:.2f}" in said.out


def test_run_takes_a_folder_of_images(trained):
    _, out, printed = trained
    facts = json.loads((out / "results.json").read_text())
    assert facts["data"]["source"] == "shades"
    assert (facts["data"]["train_images"], facts["data"]["test_images"]) == (16, 8)
    assert "shades" in printed.splitlines()[0]
    assert "digits" not in printed
    assert {name: len(lines) for name, lines in histories(out).items()} == {
        f"runs/{variant}/seed-0": 1 for variant in ("bn-l1", "gn", "ln")
    }


@pytest.mark.parametrize("folder", ["shades", "shades/", "./shades", "."])
def test_results_on_a_folder_are_named_after_it(folder, tmp_path, monkeypatch, capsys):
    place = make_folder(tmp_path / "shades")
    monkeypatch.chdir(place if folder == "." else tmp_path)
    arguments = ["run", "mnist-eva6", "--dataset", folder, "--epochs", "1", "--device", "cpu"]
    monkeypatch.setattr(
        "normlab.comparisons.report.write_report", lambda results, out: Path(out, "page")
    )
    assert main(arguments) == 0
    assert "are in runs/mnist-eva6-shades\n" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_seeds_make_more_runs(again, capsys):
    command, out = again
    assert main([*command, "--epochs", "1", "--seeds", "2"]) == 0
    assert {name for name in histories(out) if "gn" in name} == {
        "runs/gn/seed-0",
        "runs/gn/seed-1",
    }
    with open(out / "results.csv") as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["2"] * 3
    assert " ± " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_figure_that_fails_leaves_status_and_table(command, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("a broken font")

    for name in ("report.plot_curves", "sweep_plots.plot_sweep"):
        monkeypatch.setattr(f"normlab.comparisons.{name}", fail)
    shades, out = make_folder(tmp_path / "shades"), tmp_path / "out"
    words = [command, "mnist-l1", "--dataset", str(shades), "--epochs", "1", "--device", "cpu"]
    with pytest.warns(UserWarning, match="could not be drawn: RuntimeError: a broken font"):
        assert main([*words, "--out", str(out)]) == 0
    assert "| variant |" in capsys.readouterr().out
    assert (out / {"run": "results.csv", "sweep": "sweep.csv"}[command]).is_file()


def test_sweep_writes_a_table_and_a_figure(tmp_path, capsys):
    shades, out = make_folder(tmp_path / "shades"), tmp_path / "sweep"
    command = ["sweep", "mnist-l1", "--dataset", str(shades), "--norms", "gn", "none"]
    command += ["--batch-sizes", "4", "8", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 of 4: GN, batch 4, seed 0: ")
    assert said.count("\n| ") == 6  # a head, a line, four combinations
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["batch_size"]) for row in rows] == [
        (variant, size) for variant in ("GN", "none") for size in ("4", "8")
    ]
    assert Image.open(out / "sweep.png").width > 500
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("4 of 4 runs are loaded, 0 trained")


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_loads_what_is_finished(again):
    command, out = again
    before = histories(out)
    assert main([*command, "--epochs", "1"]) == 0
    assert histories(out) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", [None, b""])
def test_a_run_that_lost_its_config_is_named_and_trained_anew_with_fresh(again, capsys, content):
    command, out = again
    file = next(out.rglob("config.json"))
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*command, "--epochs", "1"]) == 1
    told = capsys.readouterr().err
    assert str(file) in told
    assert "delete" in told
    assert told.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main([*command, "--epochs", "1", "--fresh"]) == 0
    assert file.is_file()


@pytest.mark.usefixtures("undrawn")
def test_fresh_trains_anew(again, capsys):
    command, out = again
    before = histories(out)
    assert main([*command, "--epochs", "2", "--fresh"]) == 0
    after = histories(out)
    assert after.keys() == before.keys()
    assert all(len(lines) == 2 for lines in after.values())
    for name, lines in before.items():
        assert lines[0] not in after[name]


def test_list_shows_all_there_is_to_choose_from(capsys):
    assert main(["list"]) == 0
    words = capsys.readouterr().out.replace(",", " ").replace(":", " ").split()
    for name in (*nl.ASSIGNMENTS, *nl.NETWORKS, *DATASETS, *NORMS):
        assert name in words
    labels = {variant.label for one in nl.ASSIGNMENTS.values() for variant in one.variants}
    assert set(" ".join(labels).split()) <= set(words)


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (["mnist-l1"], "7,750"),
        (["mnist-eva6", "--norm", "ln-elementwise"], "37,592"),
        (["cifar10-skip", "--norm", "GN", "--groups", "2"], "34,520"),
        (["cifar10-skip", "--norm", "gn", "--no-skip"], "33,720"),
    ],
)
def test_summary_counts_the_parameters(arguments, parameters, capsys):
    assert main(["summary", *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"Total params: {parameters}\n" in printed
    norm = arguments[2] if len(arguments) > 2 else "bn"
    layers = {"bn": "BatchNorm2d", "ln-elementwise": "LayerNorm"}
    assert layers.get(norm, "GroupNorm") in printed


def test_data_describes_the_digits(digits, capsys):
    assert main(["data", "digits"]) == 0
    printed = capsys.readouterr().out
    pixels = digits.train_images.double() / 255
    for words in (
        "scikit-learn digits: 1,437 training and 360 test images of 1×28×28",
        "10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)",
        f"mean {pixels.mean():.4f}",
        f"standard deviation {pixels.std(correction=0):.4f}",
    ):
        assert words in printed


def test_data_checks_a_folder_of_images(tmp_path, capsys):
    assert main(["data", str(make_folder(tmp_path / "shades"))]) == 0
    printed = capsys.readouterr().out
    assert "shades: 16 training and 8 test images of 1×20×20, 2 classes (dark, light)" in printed


def test_the_cache_is_measured_and_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for words in ("0 MB in", "3 MB in"):
        assert main(["data"]) == 0
        assert capsys.readouterr().out.startswith(words)
        (tmp_path / "normlab" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "normlab" / "data" / "images").write_bytes(bytes(3_000_000))
    assert main(["data", "--clear-cache"]) == 0
    assert capsys.readouterr().out == f"3 MB in {tmp_path / 'normlab'}: removed\n"
    assert list(tmp_path.iterdir()) == []


def test_data_finds_mnist_where_it_lies(real_data_root, capsys):
    assert main(["data", "mnist", "--data-root", str(real_data_root)]) == 0
    printed = capsys.readouterr().out
    assert "MNIST: 60,000 training and 10,000 test images of 1×28×28" in printed
    assert "mean 0.1307; standard deviation 0.3081" in printed  # the well-known numbers


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"normlab {nl.__version__}\n"


# --- wrong use: status 2 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "mnist-l2"], "did you mean 'mnist-l1'?"),
        (["run", "--dataset", "mnits"], "did you mean 'mnist'?"),
        (["run", "--dataset", "./nowhere"], "there is no folder './nowhere'"),
        (["run", "--epochs", "0"], "epochs must be at least 1, not 0"),
        (["run", "--epochs", "-3"], "epochs must be at least 1, not -3"),
        (["run", "--seeds", "0"], "seeds must be at least 1, not 0"),
        (["run", "--device", "gpu"], "unknown device 'gpu'"),
        (["run", "--device", "cuda:99"], "device 'cuda:99'"),
        (["run", "--data-root", "nowhere"], "data root nowhere is not a folder"),
        (["sweep", "mnist-l1", "--norms", "btn"], "unknown norm 'btn'"),
        (["sweep", "mnist-l1", "--batch-sizes", "8", "0"], "batch_sizes must be at least 1, not 0"),
        (["sweep", "mnist-l1", "--lr", "-1"], "each of lrs must be greater than 0"),
        (["sweep", "mnist-l1", "--scaling", "lineal"], "did you mean 'linear'?"),
        (["summary", "mnist-l3"], "did you mean 'mnist-l1'?"),
        (["summary", "mnist-l1", "--norm", "ln-elementwis"], "mean 'ln-elementwise'?"),
        (["summary", "mnist-l1", "--norm", "gn", "--groups", "3"], "groups=3 does not divide 10"),
        (["data", "cifar"], "did you mean 'cifar10'?"),
        (["data", "no/where"], "there is no folder 'no/where'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in error_of(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ran"], "invalid choice: 'ran'"),
        (["run", "--epochs", "many"], "invalid int value: 'many'"),
        (["summary"], "required: NETWORK"),
    ],
)
def test_arguments_that_cannot_be_read_show_the_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: normlab")
    assert words in said


# --- work that fails: status 1 ----------------------------------------------------------------


def test_an_output_folder_that_is_a_file_is_named(tmp_path, capsys):
    taken = tmp_path / "out"
    taken.write_text("in the way")
    images = str(make_folder(tmp_path / "shades"))
    assert main(["run", "--dataset", images, "--out", str(taken), "--epochs", "1"]) == 1
    said = error_of(capsys)
    assert str(taken) in said
    assert "[Errno" not in said
    assert taken.read_text() == "in the way"


def test_other_epochs_in_the_same_folder_are_refused(again, capsys):
    command, out = again
    before = histories(out)
    assert main([*command, "--epochs", "2"]) == 1
    said = error_of(capsys)
    assert "recipe.epochs is 1 there and 2 here" in said
    assert "--fresh" in said
    assert histories(out) == before


def test_a_damaged_run_is_named(again, capsys):
    command, out = again
    weights = out / "runs" / "gn" / "seed-0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert main([*command, "--epochs", "1"]) == 1
    said = error_of(capsys)
    assert f"{weights} is damaged" in said
    assert str(weights.parent) in said


def test_a_damaged_image_is_named(tmp_path, capsys):
    broken = make_folder(tmp_path / "shades") / "test" / "dark" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert main(["data", str(tmp_path / "shades")]) == 1
    assert f"{broken} cannot be read as an image" in error_of(capsys)


def test_a_damaged_data_set_is_named(tmp_path, capsys):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(b"no images")
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"no labels")
    assert main(["run", "mnist-l1", "--data-root", str(tmp_path), "--epochs", "1"]) == 1
    assert f"{folder.parent} is damaged" in error_of(capsys)


def test_a_data_set_that_cannot_be_downloaded_can_be_put_there_by_hand(
    tmp_path, monkeypatch, capsys
):
    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    assert main(["data", "mnist", "--data-root", str(tmp_path)]) == 1
    said = error_of(capsys)
    assert "MNIST could not be downloaded (Error downloading train-images" in said
    assert f'from http://yann.lecun.com/exdb/mnist/ into {tmp_path}/MNIST/raw, or take "dig' in said
    assert not list(tmp_path.iterdir())


def test_traceback_shows_where_an_error_arose(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert main(["data", str(tmp_path), "--traceback"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert "loading.py" in said
    assert said.splitlines()[-1].startswith("normlab: ")


@pytest.mark.parametrize("error", [KeyError("cells"), AttributeError("nothing"), AssertionError()])
def test_whatever_comes_is_one_sentence_and_status_1(error, monkeypatch, capsys):
    def surprise(*arguments, **options):
        raise error

    monkeypatch.setattr("normlab.datasets.loading.check_dataset_name", surprise)
    assert main(["data", "digits"]) == 1
    assert error_of(capsys) == f"normlab: {error!r}; --traceback shows where it arose\n"
    assert main(["data", "digits", "--traceback"]) == 1
    assert "in surprise" in capsys.readouterr().err


def test_a_full_temporary_folder_is_told(tmp_path, monkeypatch, capsys, full_disk):
    monkeypatch.setattr("normlab.runs.processes.WORTHWHILE", 0)
    monkeypatch.setattr("joblib.cpu_count", lambda *_, **__: 2)
    images = str(make_folder(tmp_path / "shades"))
    command = ["run", "mnist-l1", "--dataset", images, "--out", str(tmp_path / "out")]
    assert main(["data", images]) == 0  # and in the cache
    with full_disk():
        assert main([*command, "--epochs", "1", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^normlab: cannot write .*data\.safetensors: .*File too large", said, re.M)
    assert not list((tmp_path / "out").rglob("*"))


# --- where the output goes --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["--out", "--data-root"])
def test_a_path_may_begin_at_home(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    command = {
        "--out": ["sweep", "mnist-l1", "--dataset", "digits"],
        "--data-root": ["data", "digits"],
    }[name]
    options = make_parser().parse_args([*command, f"{name}=~/there"])
    assert vars(options)[name.strip("-").replace("-", "_")] == tmp_path / "there"
    with pytest.raises(SystemExit):
        main([*command, f"{name}=~nobody-of-this-name/there"])
    assert "there is no home folder for ~nobody-of-this-name/there" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp850", "latin-1", "utf-8"])
def test_what_a_code_page_lacks_is_a_question_mark(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert main(["list"]) == 0
    times = "×".encode(encoding, errors="replace").decode(encoding)
    assert f"images 1{times}28{times}28" in written.getvalue().decode(encoding)


@pytest.mark.usefixtures("undrawn")
def test_no_code_page_ends_a_training(again, monkeypatch):
    command, out = again
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, content in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(content, "ascii"))
    assert main([*command, "--epochs", "1", "--seeds", "2"]) == 0
    assert (out / "report.md").is_file()
    assert b" ? " in written["stdout"].getvalue()  # mean ± standard deviation
    assert written["stderr"].getvalue() == b""


def closed_pipe() -> io.TextIOWrapper:
    """A stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("make", [closed_pipe, lambda: None], ids=["reader gone", "closed"])
def test_a_training_goes_on_without_anybody_to_tell(make, again, monkeypatch):
    command, out = again
    (out / "report.md").unlink()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, make())
    assert main([*command, "--epochs", "1"]) == 0
    assert (out / "report.md").is_file()
    assert main(["data", "nowhere"]) == 2


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="no full device")
def test_output_that_cannot_be_kept_is_told(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["list"]) == 1
    assert "No space left on device" in error_of(capsys)


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="Windows has another shell")
@pytest.mark.parametrize("tail", ["| head -1", ">&- 2>&- <&-"])
def test_side_by_side_nothing_depends_on_the_output(tail, tmp_path):
    images = str(make_folder(tmp_path / "shades"))
    options = ["run", "mnist-l1", "--dataset", images, "--epochs", "2", "--device", "cpu"]
    words = [sys.executable, "-c", SIDE_BY_SIDE, *options, "--out", str(tmp_path / "out")]
    line = f"set -o pipefail; {shlex.join(words)} {tail}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == (tail == "| head -1")
    assert (tmp_path / "out" / "report.md").is_file()


# --- Ctrl-C -----------------------------------------------------------------------------------


def hear_signals() -> None:
    """Those that the shell has made the tests deaf to, if they run in the background."""
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def goes_on(arguments: list[str], out: Path, before: dict[str, list[str]]) -> None:
    """The same command again, which trains what is left, and nothing twice."""
    assert not (out / "report.md").exists()
    assert main(arguments) == 0
    after = histories(out)
    assert [len(lines) for lines in after.values()] == [3] * 3
    for name, lines in before.items():
        assert after[name][: len(lines)] == lines  # down to the seconds
    assert (out / "report.md").exists()


@pytest.mark.usefixtures("undrawn")
def test_after_ctrl_c_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    save, saved = RunFolder.save_epoch, []

    def press_ctrl_c(self, *arguments):
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 4:  # the first epoch of the second run
            signal.raise_signal(signal.SIGINT)

    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(RunFolder, "save_epoch", press_ctrl_c)
    out = tmp_path / "mine"
    arguments = ["run", "mnist-l1", "--dataset", str(make_folder(tmp_path / "shades"))]
    arguments += ["--epochs", "3", "--out", str(out), "--device", "cpu"]
    try:
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, heard)
    said = f"normlab: interrupted; what was finished is kept in {out}: the same command goes on"
    assert said in capsys.readouterr().err
    before = histories(out)
    assert [len(lines) for lines in before.values()] == [3, 1]
    goes_on(arguments, out, before)


# What every process does that finds it on its path: waits after the first epoch of a run.
WAITS = """
import time
from normlab.runs.folder import RunFolder

def save_and_wait(self, *arguments, save=RunFolder.save_epoch):
    save(self, *arguments)
    while True:
        time.sleep(0.1)

RunFolder.save_epoch = save_and_wait
"""


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to another process on Windows")
def test_after_ctrl_c_side_by_side_the_same_command_goes_on(tmp_path, capsys):
    out = tmp_path / "mine"
    arguments = ["run", "mnist-l1", "--dataset", str(make_folder(tmp_path / "shades"))]
    arguments += ["--epochs", "3", "--out", str(out), "--device", "cpu"]
    (tmp_path / "sitecustomize.py").write_text(WAITS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", SIDE_BY_SIDE, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        while process.poll() is None and len(histories(out)) < 2:
            time.sleep(0.01)
        before = histories(out)
        os.killpg(process.pid, signal.SIGINT)  # to its helpers too, as a terminal does
        _, said = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert said.startswith("\nnormlab: interrupted; what was finished is kept in ")
    assert said.count("\n") == 2  # after the terminal's ^C, and at its end
    assert {len(lines) for lines in before.values()} == {1}
    goes_on(arguments, out, before)


def test_ctrl_c_before_training_says_so(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("normlab.datasets.loading.load_dataset", interrupted)
    assert main(["data", "digits"]) == 130
    assert "interrupted; nothing is lost" in capsys.readouterr().err


ON_A_TERMINAL = (
    "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
)


@pytest.mark.process
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "a closed terminal"])
def test_whatever_ends_it_side_by_side_leaves_no_process_and_no_litter(how, tmp_path):
    place = tmp_path / "temporary"
    place.mkdir()
    options = ["run", "mnist-l1", "--dataset", str(make_folder(tmp_path / "shades", train=150))]
    options += ["--epochs", "100000", "--device", "cpu", "--out", str(tmp_path / "out")]
    terminal, end = os.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(end)]
    command += [sys.executable, "-c", SIDE_BY_SIDE, *options]
    with subprocess.Popen(
        command,
        pass_fds=[end],
        env=os.environ | {"TMPDIR": str(place)},
        cwd=tmp_path,
        preexec_fn=hear_signals,
    ) as process:
        os.close(end)
        while process.poll() is None and not list(tmp_path.rglob("history.csv")):
            time.sleep(0.01)
        if not everything_of(process, place)[1:]:
            process.kill()  # else it would be waited for
            pytest.fail("it trains in this process")
        if how == "a closed terminal":
            os.close(terminal)
        else:
            process.send_signal(getattr(signal, how))
            said = b""
            with contextlib.suppress(OSError):  # its end
                while part := os.read(terminal, 10_000):
                    said += part
            os.close(terminal)
            assert b"\nnormlab: interrupted; what was finished is kept in " in said
            assert b"Traceback" not in said
    ended = signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP
    assert process.returncode == 128 + ended
    while everything_of(process, place):
        time.sleep(0.01)  # its helpers go after it


# --- a quick start ----------------------------------------------------------------------------


def test_alone_it_lists_its_commands(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n    {command} " in listed for command in command_line.COMMANDS)


def test_help_names_all_there_is_to_choose_from():
    def names(text):
        return text.replace(" or ", ", ").split(", ")

    assert names(command_line.NAMES) == list(nl.ASSIGNMENTS)
    assert names(command_line.DATASETS)[:-1] == list(DATASETS)
    assert names(command_line.NORMS) == list(NORMS)


@pytest.mark.process
def test_help_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "normlab", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("run", "list", "summary", "data"):
        assert f"\n    {command} " in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"normlab", "argparse"} <= imported
    assert not imported & {"torch", "numpy", "matplotlib", "pandas", "sklearn", "torchvision"}
