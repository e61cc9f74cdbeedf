"""Sweeps: which runs they are made of, what their table holds, what is done is not done again."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas
import pytest
import torch
from filelock import FileLock

import normlab as nl
from normlab.comparisons.sweeps import COLUMNS, MEASURED, _read
from normlab.runs import cluster
from normlab.runs import processes as parallel
from normlab.runs.folder import remove_runs
from normlab.runs.trainer import fit_job
from normlab.support.locks import InUse
from normlab.support.seeding import seeded


def sweep(assignment, data, **options):
    return nl.run_sweep(assignment, data=data, device="cpu", **{"progress": False, **options})


def test_a_sweep_is_the_product_of_its_axes(tiny_assignment, tiny):
    options = {"norms": ["gn", "none"], "batch_sizes": [8, 32], "lrs": [0.1, 0.2], "seeds": 2}
    table = sweep(tiny_assignment, tiny, epochs=1, **options)
    assert list(table.columns) == list(COLUMNS)
    cells = set(table[["norm", "batch_size", "lr", "seed"]].itertuples(index=False, name=None))
    assert len(table) == len(cells) == 16
    assert len(set(table["run"])) == 16
    assert set(table["variant"]) == {"GN", "none"}
    assert table["test_accuracy"].between(0, 1).all()


@pytest.mark.parametrize("of", [np.array, torch.tensor, pandas.Series], ids=lambda of: of.__name__)
def test_axes_may_be_held_by_anything(tiny_assignment, tiny, of):
    axes = {"batch_sizes": [16, 32], "lrs": [0.125, 0.25], "seeds": [0, 2]}
    held = {name: of(values) for name, values in axes.items()}
    tables = [
        sweep(tiny_assignment, tiny, norms="gn", epochs=1, **each).drop(columns="seconds")
        for each in (axes, held)
    ]
    assert len(tables[0]) == 8
    pandas.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("of", [lambda value: value, np.array, torch.tensor])
def test_an_axis_of_one_value_needs_no_list(tiny_assignment, tiny, of):
    axes = {"batch_sizes": of(32), "lrs": of(0.125), "seeds": of(2)}
    table = sweep(tiny_assignment, tiny, norms="gn", epochs=1, **axes)
    assert table[["norm", "batch_size", "lr", "seed"]].to_numpy().tolist() == [
        ["gn", 32, 0.125, 0],
        ["gn", 32, 0.125, 1],
    ]


def test_a_run_of_a_sweep_is_that_of_fit(tiny_assignment, tiny, tiny_network):
    table = sweep(tiny_assignment, tiny, norms=["ln"], batch_sizes=[8], lrs=[0.2], seeds=[3])
    with seeded(3, "weights"):
        network = type(tiny_network())("ln")
    recipe = tiny_assignment.recipe.replace(batch_size=8, lr=0.2, seed=3)
    run = nl.fit(network, tiny, recipe, device="cpu", progress=False)
    for name in MEASURED:
        assert table[name][0] == run.last[name]
    assert table["parameters"][0] == run.parameters


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_the_rate_follows_the_batch_size(tiny_assignment, tiny, scaling, factor):
    sizes = [16, 64]  # the recipe's is 16
    table = sweep(tiny_assignment, tiny, norms=["gn"], batch_sizes=sizes, scaling=scaling, epochs=1)
    assert table["lr"].tolist() == pytest.approx([0.1, 0.1 * factor])
    assert table["base_lr"].tolist() == [0.1, 0.1]


def test_variants_of_the_assignment_keep_what_they_declare(tiny_assignment, tiny):
    table = sweep(tiny_assignment, tiny, norms=["bn"], batch_sizes=[16], epochs=1)
    own = nl.run_assignment(tiny_assignment, data=tiny, epochs=1, device="cpu", progress=False)
    assert table["variant"].tolist() == ["BN + L1"]
    assert table["train_loss"][0] == own["BN + L1"][0].last["train_loss"]


def test_a_loss_that_diverges_is_a_row_and_the_others_go_on(tiny_assignment, tiny, capsys):
    options = {"norms": ["gn", "ln"], "lrs": [1e30, 0.1], "epochs": 1}
    table = sweep(tiny_assignment, tiny, progress=True, **options)
    assert table["test_accuracy"].isna().tolist() == [True, False, True, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 4: GN, rate 1e+30, seed 0: the ")
    assert "%" in lines[1]


def test_what_is_done_is_loaded(tiny_assignment, tiny, tmp_path, capsys, monkeypatch):
    options = {"norms": ["gn", "ln"], "epochs": 1, "directory": tmp_path}
    table = sweep(tiny_assignment, tiny, **options)
    assert (tmp_path / "sweep.csv").read_text().count("\n") == 3
    remove_runs(folder_of(tmp_path, "ln"))
    head, gn, _ = (tmp_path / "sweep.csv").read_text().splitlines()
    (tmp_path / "sweep.csv").write_text(f"{head}\n{gn}\n")
    again = sweep(tiny_assignment, tiny, progress=True, **options)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 of 2 runs are loaded, 1 trained"
    assert second.startswith("2 of 2: LN, seed 0: ")
    assert again.drop(columns="seconds").equals(table.drop(columns="seconds"))
    monkeypatch.setattr(
        parallel, "fit_each", lambda jobs, *_, **__: (job for job in jobs)
    )  # nothing is left to train
    assert sweep(tiny_assignment, tiny, **options).equals(again)


def test_rows_of_a_kept_table_are_taken_for_the_same_runs_alone(tiny_assignment, tiny, tmp_path):
    options = {"norms": ["gn"], "batch_sizes": [8, 16], "epochs": 1}
    first = sweep(tiny_assignment, tiny, directory=tmp_path, **options)
    trained = []
    options |= {"kept": tmp_path / "sweep.csv", "after_each": trained.append}
    assert sweep(tiny_assignment, tiny, **options).equals(first)
    assert trained == []
    sweep(tiny_assignment, tiny.subset(train=80), **options)
    assert len(trained) == 2


def test_a_run_that_diverged_is_not_tried_again(tiny_assignment, tiny, tmp_path):
    options = {"norms": ["gn"], "lrs": [1e30], "epochs": 1, "directory": tmp_path}
    first = sweep(tiny_assignment, tiny, **options)
    trained = []
    assert sweep(tiny_assignment, tiny, after_each=trained.append, **options).equals(first)
    assert trained == []


def test_kept_rows_get_the_labels_of_this_sweep(tiny_assignment, tiny, tmp_path):
    options = {"norms": ["gn"], "batch_sizes": [32], "epochs": 1, "directory": tmp_path}
    sweep(tiny_assignment, tiny, lrs=[0.1], scaling="linear", **options)  # trained at 0.2
    trained = []
    table = sweep(tiny_assignment, tiny, lrs=[0.2], after_each=trained.append, **options)
    assert trained == []
    assert table["base_lr"].tolist() == table["lr"].tolist() == [0.2]


def folder_of(place, variant, seed=0):
    """The folder of a sweep's run."""
    (found,) = place.glob(f"runs/{variant}/seed-{seed}-*")
    return found


@pytest.mark.parametrize(
    "other",
    [
        {"scaling": "linear"},
        {"epochs": 2},
        {"recipe": {"weight_decay": 0.01}},
        {"data": {"train": 80}},
        {"build": {"dropout": 0.5}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_sweeps_that_differ_in_anything_share_a_folder(
    other, tiny_assignment, tiny, tiny_network, tmp_path
):
    options = {"norms": ["gn"], "batch_sizes": [8, 32], "epochs": 1, "directory": tmp_path}
    changed = tiny_assignment.recipe.replace(**other.pop("recipe", {}))
    build = partial(tiny_network().__class__, **other.pop("build", {}))
    assignments = tiny_assignment, replace(tiny_assignment, recipe=changed, build=build)
    images = tiny, tiny.subset(**other.pop("data", {}))
    first = sweep(assignments[0], images[0], **options)
    before = files_in(tmp_path / "runs")
    second = sweep(assignments[1], images[1], **options | other)
    after = files_in(tmp_path / "runs")
    assert not set(first["run"]) & set(second["run"])
    assert after.items() >= before.items()
    assert len(after) == 2 * len(before)
    names = {file.parent.name for file in after}
    assert names == {f"seed-0-{run}" for run in (*first["run"], *second["run"])}
    (tmp_path / "sweep.csv").unlink()
    trained = []
    for table, index, more in ((first, 0, {}), (second, 1, other)):
        options |= {"after_each": trained.append}
        assert sweep(assignments[index], images[index], **options | more).equals(table)
    assert trained == []


def test_a_network_that_computes_something_else_does_not_get_the_rows_of_a_former_one(
    tiny, tiny_network, tmp_path
):
    def sweep(slope, **options):
        def build(norm):
            network = tiny_network(norm)
            network.pool.register_forward_hook(lambda layer, images, output: slope * output)
            return network

        recipe = nl.Recipe(epochs=1, batch_size=32)
        own = nl.Assignment("own", "Own", "tiny", (nl.Variant("BN", "bn"),), recipe, build=build)
        table = nl.run_sweep(own, data=tiny, device="cpu", progress=False, **options)
        return table.drop(columns="seconds")

    first = sweep(1.0, directory=tmp_path)
    assert sweep(1.0, directory=tmp_path).equals(first)
    with pytest.raises(ValueError, match="something else"):
        sweep(3.0, directory=tmp_path)
    assert sweep(3.0, directory=tmp_path, fresh=True).equals(sweep(3.0))


def files_in(folder):
    """What the files below a folder hold, by their paths."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_cluster_that_does_not_answer_costs_nothing(tiny_assignment, tiny, tmp_path, monkeypatch):
    options = {"norms": ["gn"], "epochs": 1, "directory": tmp_path}
    sweep(tiny_assignment, tiny, **options)
    before = files_in(tmp_path)
    monkeypatch.setattr(cluster, "SECONDS_TO_ANSWER", 1)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers"):
        sweep(tiny_assignment, lambda: tiny, fresh=True, dask="tcp://127.0.0.1:1", **options)
    assert files_in(tmp_path) == before


def test_fresh_removes_nothing_before_all_is_checked(tiny_assignment, tiny, tiny_network, tmp_path):
    def build(norm):
        network = tiny_network(norm)
        network.pool = torch.nn.AvgPool2d(4 if norm == "gn" else 6)  # else it does not fit
        return network

    assignment = replace(tiny_assignment, build=build)
    options = {"epochs": 1, "directory": tmp_path}
    sweep(assignment, tiny, norms=["gn"], **options)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="cannot take images"):
        sweep(assignment, tiny, norms=["gn", "ln"], fresh=True, **options)
    assert files_in(tmp_path) == before
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"sweep\.csv is no table of a sweep"):
        sweep(assignment, tiny, norms=["gn"], fresh=True, **options)
    assert files_in(tmp_path) == before


def test_rows_of_another_sweep_stay_in_the_file(tiny_assignment, tiny, tmp_path):
    options = {"epochs": 1, "directory": tmp_path}
    diverged = sweep(tiny_assignment, tiny, norms=["gn"], lrs=[1e30], **options)
    others = sweep(tiny_assignment, tiny, norms=["ln", "none"], seeds=2, **options)
    assert len(others) == 4
    file = tmp_path / "sweep.csv"
    *rows, last = file.read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == others["run"].tolist()  # its own come first
    assert last.split(",")[0] == diverged["run"][0]
    for fresh in (False, True):
        seen = []
        narrow = {"norms": ["ln"], "fresh": fresh, "after_each": seen.append}
        table = sweep(tiny_assignment, tiny, **narrow, **options)
        assert table["run"].tolist() == [others["run"][0]]
        assert [len(each) for each in seen] == [1] * fresh
        after = file.read_text().splitlines()[1:]
        assert len(after) == 5
        assert set(rows[1:]) | {last} <= set(after)
        assert (rows[0] in after) != fresh  # trained anew, it took other seconds
    trained = []
    sweep(tiny_assignment, tiny, norms=["gn"], lrs=[1e30], after_each=trained.append, **options)
    assert trained == []


def test_a_file_that_is_no_table_is_named(tiny_assignment, tiny, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is no table of a sweep"):
        sweep(tiny_assignment, tiny, kept=tmp_path / "other.csv")


def test_the_table_grows_as_runs_finish(tiny_assignment, tiny, tmp_path):
    seen = []

    def look(table):
        seen.append((len(table), (tmp_path / "sweep.csv").read_text().count("\n") - 1))

    options = {"norms": ["gn", "ln"], "seeds": 2, "epochs": 1}
    sweep(tiny_assignment, tiny, directory=tmp_path, after_each=look, **options)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norms": []}, "norms is empty: that is a sweep without runs"),
        ({"batch_sizes": [8, 8]}, "batch_sizes names a value twice: 8, 8"),
        ({"norms": "batchnrom"}, "batchnrom"),
        ({"lrs": np.array([0.1, 0.1])}, "lrs names a value twice: 0.1, 0.1"),
        ({"lrs": np.array([])}, "lrs is empty"),
        ({"batch_sizes": [0]}, "each of batch_sizes must be at least 1"),
        ({"lrs": [-0.1]}, "each of lrs must be greater than 0"),
        ({"scaling": "liner"}, "did you mean 'linear'"),
        ({"dask": "tcp://127.0.0.1:1"}, "give data as a function"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(tiny_assignment, tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep(tiny_assignment, tiny, **options)


@pytest.fixture
def two_cores(monkeypatch):
    """Any amount of work is worth two processes."""
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 2)
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)


@pytest.mark.process
@pytest.mark.usefixtures("two_cores")
def test_processes_give_what_one_process_gives(tmp_path, monkeypatch):
    data = nl.load_dataset("digits").subset(train=64, test=16)
    assignment = replace(nl.ASSIGNMENTS["mnist-l1"], recipe=nl.Recipe(epochs=1, batch_size=32))
    options = {"norms": ["gn", "ln"], "lrs": [0.05, 1e30]}
    seen, portions, in_processes = [], [], parallel.in_processes

    def noted(data, sent, **options):
        portions.append(len(sent))
        return in_processes(data, sent, **options)

    monkeypatch.setattr(parallel, "in_processes", noted)
    apart = sweep(assignment, data, directory=tmp_path, after_each=seen.append, **options)
    assert [len(table) for table in seen] == [1, 2, 3, 4]
    assert apart["test_accuracy"].isna().tolist() == [False, True, False, True]
    monkeypatch.setattr(parallel, "WORTHWHILE", math.inf)
    here = sweep(assignment, data, **options)
    assert portions == [4]
    exact = ["run", "variant", "lr", "parameters"]
    assert apart[exact].equals(here[exact])
    losses = here["train_loss"].to_numpy()  # perhaps of several threads, which round otherwise
    assert apart["train_loss"].to_numpy() == pytest.approx(losses, rel=1e-3, nan_ok=True)


@pytest.mark.usefixtures("two_cores")
def test_a_single_run_that_is_left_has_as_many_threads_as_before(
    tiny_assignment, tiny, tmp_path, monkeypatch
):
    options = {"norms": ["gn", "ln"], "epochs": 1, "directory": tmp_path}
    left = []

    def instead(data, sent, **_):
        left.append([job.label for job in sent])
        for job in sent:
            fit_job(job, data, device="cpu", progress=False)
            yield job, None

    monkeypatch.setattr(parallel, "in_processes", instead)
    sweep(tiny_assignment, tiny, **options)
    remove_runs(folder_of(tmp_path, "ln"))
    (tmp_path / "sweep.csv").unlink()
    sweep(tiny_assignment, tiny, **options)
    assert left == [["GN, seed 0", "LN, seed 0"], ["LN, seed 0"]]


def test_the_title_names_the_data(tiny, tiny_assignment):
    table = sweep(tiny_assignment, tiny, norms=("gn",), epochs=1)
    title = "Test accuracy, made-up patterns, last epoch, one seed"
    assert nl.plot_sweep(table).axes[0].get_title() == title
    assert nl.plot_sweep(table, title="Mine").axes[0].get_title() == "Mine"


# --- what is believed of the files -------------------------------------------------------------


def measured(table):
    return table.drop(columns="seconds")


@pytest.fixture
def swept(tiny_assignment, tiny, tmp_path):
    """A function that makes the same sweep in `tmp_path` again: GN at a good and at a bad rate."""
    options = {"norms": ["gn"], "lrs": [0.1, 1e30], "epochs": 1, "directory": tmp_path}
    return lambda **more: sweep(tiny_assignment, tiny, **options | more)


def test_a_digit_that_was_changed_in_the_table_does_not_show(swept, tmp_path):
    table, file = swept(), tmp_path / "sweep.csv"
    loss, before = repr(table["test_loss"].tolist()[0]), file.read_text()
    file.write_text(before.replace(loss, "0.999"))
    assert file.read_text() != before
    assert swept().equals(table)
    assert file.read_text() == before


def test_a_row_that_says_diverged_is_not_believed_of_a_finished_run(swept, tmp_path):
    table, file = swept(), tmp_path / "sweep.csv"
    head, good, bad = file.read_text().splitlines()
    emptied = ",".join([*good.split(",")[:9], *[""] * 5])
    file.write_text("\n".join([head, emptied, bad]))
    assert swept().equals(table)


def test_a_row_of_a_run_that_is_lost_is_trained_again(swept, tmp_path):
    table = swept()
    (weights,) = tmp_path.glob("runs/*/*/weights.safetensors")
    remove_runs(weights.parent)
    trained = []
    assert measured(swept(after_each=trained.append)).equals(measured(table))
    assert len(trained) == 1


@pytest.mark.parametrize("cell", [4, 5, 6, 7, 8])
def test_a_row_of_another_run_does_not_tell_that_one_diverged(swept, tmp_path, cell):
    swept()
    head, good, bad = (tmp_path / "sweep.csv").read_text().splitlines()
    cells = bad.split(",")
    cells[cell] = "7"
    (tmp_path / "sweep.csv").write_text("\n".join([head, good, ",".join(cells)]))
    trained = []
    swept(after_each=trained.append)
    assert len(trained) == (cell != 4)  # the base rate is the sweep's own


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row[:-40],
        lambda row: row + ",1",
        lambda row: row.replace("0.", "1.", 3),
        lambda row: row.replace(",1,", ",one,"),
        lambda row: row.replace(",1,", f",{10**30},"),
        lambda row: row.rpartition(",")[0] + ",-1",
        lambda row: row.rpartition(",")[0] + ",inf",
    ],
)
def test_a_damaged_row_is_named_with_its_line(swept, tmp_path, damage):
    swept()
    file = tmp_path / "sweep.csv"
    head, good, bad = file.read_text().splitlines()
    for rows in ([damage(good), bad], [bad, damage(good)]):
        file.write_text("\n".join([head, *rows]))
        with pytest.raises(ValueError, match=r"sweep\.csv is no table of a sweep: ") as caught:
            swept()
        assert "mend it or delete it" in str(caught.value)
    file.unlink()
    assert len(swept()) == 2


@pytest.mark.parametrize("name", ["history.csv", "weights.safetensors", "predictions.safetensors"])
def test_a_damaged_run_is_named_rather_than_tabulated(swept, tmp_path, name):
    swept()
    (file,) = tmp_path.glob(f"runs/*/*/{name}")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (tmp_path / "sweep.csv").unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged: delete the folder"):
        swept()
    assert len(swept(fresh=True)) == 2


def test_a_run_without_its_config_is_trained_anew_only_with_fresh(swept, tmp_path):
    table = swept()
    (weights,) = tmp_path.glob("runs/*/*/weights.safetensors")
    (weights.parent / "config.json").unlink()
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing: delete .*--fresh"):
        swept()
    assert files_in(tmp_path) == before
    assert measured(swept(fresh=True)).equals(measured(table))


def test_sweeps_of_networks_that_compute_something_else_do_not_share_a_folder(
    tiny_assignment, tiny, tiny_network, tmp_path
):
    factor = [1.0]

    def build(norm):
        network = tiny_network(norm)
        network.norm.register_forward_hook(lambda *call: factor[0] * call[-1])
        return network

    assignment = replace(tiny_assignment, build=build)
    options = {"norms": ["gn"], "lrs": [0.1, 1e30], "epochs": 1, "directory": tmp_path}
    table = sweep(assignment, tiny, **options)
    factor[0] = 2.0
    with pytest.raises(
        ValueError, match=r"something else \(logits_by_drawn_weights\.evaluation.*choose another"
    ):
        sweep(assignment, tiny, **options)
    trained = []
    options |= {"lrs": [1e30], "after_each": trained.append}
    sweep(assignment, tiny, **options)
    assert len(trained) == 1  # that the other network diverged tells nothing of this one
    factor[0] = 1.0
    assert sweep(assignment, tiny, **options | {"lrs": [0.1]}).equals(table[:1])


def test_the_kept_tables_are_whole():
    for file in Path(__file__).parents[2].glob("notebooks/results/**/*.csv"):
        if file.read_text().startswith(",".join(COLUMNS)):
            assert _read(file), file


# --- another process in the same folder -------------------------------------------------------

ANOTHER = """
import sys, normlab as nl
options = {"epochs": 1, "directory": sys.argv[1], "device": "cpu", "norms": sys.argv[2:]}
nl.run_sweep("mnist-l1", data=nl.load_dataset("digits").subset(train=64, test=16), **options)
"""


def another(place, norm):
    command = [sys.executable, "-c", ANOTHER, str(place), norm]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.process
def test_no_row_of_a_table_is_lost_where_two_write_it(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert another(other, "ln").wait() == 0
    with FileLock(one / ".lock") as lock, another(one, "gn") as process:
        assert process.stderr.readline() == f"{one} is in use by another process; waiting\n"
        shutil.copy(other / "sweep.csv", one)
        (one / ".sweep.csv.0123.part").touch()
        lock.release()
        assert process.stderr.read() == ""
    assert set(pandas.read_csv(one / "sweep.csv")["norm"]) == {"gn", "ln"}
    assert {file.name for file in one.iterdir()} == {"sweep.csv", "runs"}


def test_a_fresh_sweep_refuses_a_run_in_use_and_changes_nothing(tiny, tiny_assignment, tmp_path):
    options = {"data": tiny, "directory": tmp_path, "device": "cpu", "progress": False}
    nl.run_sweep(tiny_assignment, norms=["gn", "ln"], **options)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with (
        FileLock(folder_of(tmp_path, "ln") / ".lock"),
        pytest.raises(InUse, match=r"in use by another process: wait for its end, or choose"),
    ):
        nl.run_sweep(tiny_assignment, norms=["gn", "ln"], fresh=True, **options)
    assert before == {file: file.read_bytes() for file in before}
