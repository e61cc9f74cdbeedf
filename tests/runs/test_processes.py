"""Runs side by side in processes give what runs one after another give."""

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch
from conftest import everything_of
from torch import nn

import normlab as nl
from normlab.runs import processes as parallel
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.jobs import Job, build_variant
from normlab.support.files import read_json, write_json
from normlab.support.locks import scratch_folder
from tests.runs.test_folder import FILES, interrupted


@pytest.fixture
def two_cores(monkeypatch):
    """Any amount of work is worth two processes."""
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 2)
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)


def own_assignment(build, labels=("BN", "LN")):
    variants = tuple(nl.Variant(label, label.lower()) for label in labels)
    return nl.Assignment(
        name="own", title="Own", dataset="digits", variants=variants, build=build,
        recipe=nl.Recipe(epochs=2, batch_size=32),
    )  # fmt: skip


def small_network(norm):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nl.make_norm(norm, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def rows(run):
    return [{key: row[key] for key in row if key != "seconds"} for row in run.history]


def test_small_work_and_single_runs_stay_in_one_process(tiny, monkeypatch):
    job = Job(lambda: small_network("bn"), nl.Recipe(epochs=2))
    work = 3 * (8 * 9 * 100 + 32 * 4) * 2 * 96  # of a convolution to 10×10 and a linear layer
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 2)
    monkeypatch.setattr(parallel, "WORTHWHILE", 3 * work)
    assert parallel.are_worthwhile([job] * 3, tiny)
    assert not parallel.are_worthwhile([job] * 2, tiny)
    monkeypatch.setattr(parallel, "WORTHWHILE", work)
    assert not parallel.are_worthwhile([job], tiny)
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 1)
    assert not parallel.are_worthwhile([job] * 3, tiny)


@pytest.mark.parametrize(
    ("jobs", "cores", "workers"),
    [(6, 2, 2), (3, 2, 3), (7, 2, 3), (1, 2, 1), (3, 16, 3), (18, 16, 18)],
)
def test_no_core_is_idle_at_the_end(jobs, cores, workers, tiny, tmp_path, monkeypatch):
    seen = []

    def pool(task, left, some, workers, look):
        seen.append((len(some), workers))
        left.clear()
        yield from ()
        return []

    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: cores)
    monkeypatch.setattr(parallel, "_in_pool", pool)
    sent = {Job(small_network, nl.Recipe(), tmp_path / str(n)): b"" for n in range(jobs)}
    assert list(parallel.in_processes(tiny, sent, progress=False)) == []
    assert seen == [(jobs, workers)]


def test_where_no_process_can_be_started_it_is_trained_here(tiny, two_cores, monkeypatch):
    def refuse(*_, **__):  # as semaphores are on a full /dev/shm
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", refuse)
    said = (
        r"^BN, seed 0 and 1 more: trained in this process, not beside it: no process can be "
        r"started \(No space left on device\): make room for semaphores in /dev/shm$"
    )
    with pytest.warns(UserWarning, match=said):
        results = nl.run_assignment(
            own_assignment(small_network), data=tiny, device="cpu", progress=False
        )
    assert [len(results[label][0].history) for label in results] == [2, 2]


@pytest.mark.process
def test_an_interrupted_run_with_a_damaged_history_goes_on(tiny, two_cores, tmp_path):
    assignment = own_assignment(small_network)
    assignment = replace(assignment, recipe=assignment.recipe.replace(epochs=3))
    folder, variant = tmp_path / "ln" / "seed-0", assignment.variants[1]
    network = build_variant(assignment, variant, tiny, seed=0)
    interrupted(network, tiny, folder, assignment.recipe)
    file, before = folder / "history.csv", RunFolder(folder).history_so_far()
    file.write_text(file.read_text()[:-50])
    results = nl.run_assignment(
        assignment, data=tiny, directory=tmp_path, device="cpu", progress=False
    )
    assert len(before) == 2
    assert results["LN"][0].history[:2] == before  # to the second: they were not trained again


@pytest.mark.process
def test_processes_give_the_same_as_one_thread_here(tiny, two_cores, tmp_path, monkeypatch):
    assignment = own_assignment(small_network)
    apart = nl.run_assignment(
        assignment, data=tiny, directory=tmp_path, device="cpu", progress=False
    )
    assert all(
        (tmp_path / name / "seed-0" / "weights.safetensors").is_file() for name in ("bn", "ln")
    )
    monkeypatch.setattr(parallel, "WORTHWHILE", float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = nl.run_assignment(assignment, data=tiny, device="cpu", progress=False)
    finally:
        torch.set_num_threads(threads)
    for label in here:
        assert rows(apart[label][0]) == rows(here[label][0])


@pytest.mark.process
def test_progress_of_processes_is_shown_line_by_line(tiny, two_cores, capsys):
    nl.run_assignment(own_assignment(small_network), data=tiny, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    for label in ("BN", "LN"):
        mine = [line for line in lines if line.startswith(f"{label}, seed 0: epoch")]
        assert [line.split("epoch ")[1][:3] for line in mine] == ["1/2", "2/2"]


@pytest.mark.process
def test_the_last_unfinished_run_is_not_trained_in_this_process(tiny, two_cores, tmp_path):
    def build(norm):
        network = small_network(norm)
        network.register_forward_pre_hook(lambda *_: (tmp_path / f"{norm}-{os.getpid()}").touch())
        return network

    def run(**options):
        options |= {"directory": tmp_path / "runs", "device": "cpu", "progress": False}
        return nl.run_assignment(own_assignment(build), data=tiny, **options)

    run()
    trained = {file.name for file in tmp_path.glob("ln-*")} - {f"ln-{os.getpid()}"}
    for file in tmp_path.glob("ln-*"):
        file.unlink()
    remove_runs(tmp_path / "runs" / "ln" / "seed-0")
    threads = torch.get_num_threads()
    run()
    again = {file.name for file in tmp_path.glob("ln-*")} - {f"ln-{os.getpid()}"}
    assert trained
    assert again
    assert torch.get_num_threads() == threads


def killing(marker, *, once):
    """A `build` of networks that kill other processes, the first time or every time."""
    parent = os.getpid()

    def kill(*_):
        if os.getpid() != parent and not (once and marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def build(norm):
        network = small_network(norm)
        if norm == "ln":
            network.register_forward_pre_hook(kill)
        return network

    return build


@pytest.mark.process
def test_a_killed_process_loses_nothing(tiny, two_cores, tmp_path):
    assignment = own_assignment(killing(tmp_path / "killed", once=True))
    results = nl.run_assignment(
        assignment, data=tiny, directory=tmp_path / "runs", device="cpu", progress=False
    )
    assert (tmp_path / "killed").exists()
    assert [len(results[label][0].history) for label in results] == [2, 2]


@pytest.mark.process
def test_a_killed_process_goes_on_from_its_checkpoint(tiny, two_cores, tmp_path):
    folder = RunFolder(tmp_path / "runs" / "ln" / "seed-0")
    kept = tmp_path / "kept-when-killed.json"
    parent = os.getpid()

    def build(norm):
        network = small_network(norm)

        def die_in_the_second_epoch(*_):
            if os.getpid() == parent or norm != "ln" or kept.exists():
                return
            if rows := folder.history_so_far():
                write_json(kept, rows)
                os.kill(os.getpid(), signal.SIGKILL)

        network.register_forward_pre_hook(die_in_the_second_epoch)
        return network

    nl.run_assignment(
        own_assignment(build), data=tiny, directory=tmp_path / "runs", device="cpu", progress=False
    )
    before, after = read_json(kept), folder.history_so_far()
    assert (len(before), len(after)) == (1, 2)
    assert after[:1] == before  # to the second that it took: it was not trained again


@pytest.mark.process
def test_a_process_that_is_killed_again_is_named_and_the_others_are_trained(
    tiny, two_cores, tmp_path
):
    build = killing(tmp_path / "killed", once=False)
    assignment = own_assignment(build, labels=("LN", "BN", "IN", "None"))
    runs = tmp_path / "runs"
    with pytest.raises(RuntimeError, match=r"trained LN, seed 0 was killed, and again .*goes on"):
        nl.run_assignment(assignment, data=tiny, directory=runs, device="cpu", progress=False)
    finished = {v.label: RunFolder(runs / v.folder / "seed-0").is_finished() for v in
                assignment.variants}  # fmt: skip
    assert finished == {"LN": False, "BN": True, "IN": True, "None": True}


@pytest.mark.process
def test_a_loss_that_diverges_in_a_process_is_said_here(tiny, two_cores):
    assignment = own_assignment(small_network)
    assignment = nl.Assignment(**vars(assignment) | {"recipe": nl.Recipe(epochs=2, lr=1e30)})
    with pytest.raises(FloatingPointError, match=r"seed 0: the (training|test) loss became"):
        nl.run_assignment(assignment, data=tiny, device="cpu", progress=False)


@pytest.mark.process
def test_one_that_diverges_leaves_those_beside_it_and_after_it_to_be_trained(
    tiny, two_cores, tmp_path
):
    # Five jobs, two of them begun at once: some are left whenever the first one ends.
    assignment = own_assignment(small_network, labels=("BN", "LN", "IN", "None"))
    high = nl.Variant("High", "ln", changes={"lr": 1e30})
    assignment = replace(assignment, variants=(high, *assignment.variants))
    with (
        pytest.warns(UserWarning, match="^High, seed 0: the training .*; the others go on"),
        pytest.raises(FloatingPointError, match=r"^High, seed 0"),
    ):
        nl.run_assignment(assignment, data=tiny, directory=tmp_path, device="cpu", progress=False)
    for name in ("bn", "ln", "in", "none"):
        assert RunFolder(tmp_path / name / "seed-0").is_finished()


def test_processes_map_the_images_instead_of_copying_them(tiny, tmp_path):
    tiny.save(tmp_path / "data.safetensors")
    data = nl.Dataset.open(tmp_path / "data.safetensors")
    start = data.train_images.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= start < high:
                assert line.rstrip().endswith("data.safetensors")
                return
    pytest.fail("the images lie in no mapping")


SIDE_BY_SIDE = """
import joblib, normlab as nl
from normlab.runs import processes as parallel
joblib.cpu_count = lambda *_, **__: 2
parallel.WORTHWHILE = 0
data = nl.load_dataset("digits")
nl.run_assignment("mnist-l1", data=data, epochs=500, directory="runs", device="cpu")
"""


def children(process: subprocess.Popen) -> list[Path]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path("/proc", child) for child in listed]


@pytest.mark.process
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("when", ["they train", "they start"])
def test_processes_end_when_their_parent_is_killed(when, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    parent = subprocess.Popen(
        [sys.executable, "-c", SIDE_BY_SIDE], cwd=tmp_path, stdout=subprocess.PIPE
    )
    if when == "they train":
        parent.stdout.readline()  # a first epoch is done
    while len(listed := children(parent)) < 3:  # joblib's own, and those that import torch
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    patience = 6000
    while any(child.exists() for child in listed) and patience:
        time.sleep(0.1)
        patience -= 1
    assert patience, "a process went on without its parent"
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert list(folder.iterdir())
    with scratch_folder() as mine:
        assert list(folder.iterdir()) == [mine]
    # A semaphore that was made and not registered yet has been left until now.
    assert not [file for file in Path("/dev/shm").glob("*") if f"-{parent.pid}-" in file.name]


KILLED = SIDE_BY_SIDE.replace("data=data, epochs=500", "data=data.subset(train=256), epochs=6")


def started(folder: Path) -> subprocess.Popen:
    """Three runs side by side, in a session of their own."""
    return subprocess.Popen(
        [sys.executable, "-c", KILLED],
        **{"cwd": folder, "env": os.environ | {"TMPDIR": str(folder / "temporary")}},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True},
    )


def results(folder: Path) -> dict[str, tuple]:
    """What every run has measured and learned, but for its seconds."""
    found = {}
    for file in folder.glob("runs/*/seed-0/config.json"):
        history = RunFolder(file.parent).history_so_far()
        measured = [[value for name, value in row.items() if name != "seconds"] for row in history]
        found[file.parent.parent.name] = (read_json(file)["final_weights"], measured)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "temporary").mkdir()
    started(folder).communicate()
    return results(folder)


def kill_somebody(process: subprocess.Popen, chance: random.Random) -> None:
    """After a random number of lines, or as soon as it has children."""
    for _ in range(chance.randrange(16)):
        process.stdout.readline()
    while process.poll() is None and len(children(process)) < 3:
        time.sleep(0.01)
    whom = chance.choice(["the parent", "a child", "all"])
    with suppress(OSError):  # it has just ended
        if whom == "a child":
            os.kill(int(chance.choice(children(process)).name), signal.SIGKILL)
        elif whom == "the parent":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.process
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_after_kills_at_random_the_next_call_leaves_the_runs_alone(rounds, undisturbed, tmp_path):
    chance = random.Random(rounds)
    for number in range(rounds):
        folder = tmp_path / str(number)
        (folder / "temporary").mkdir(parents=True)
        process = started(folder)
        kill_somebody(process, chance)
        process.communicate()
        again = started(folder)
        again.communicate()
        assert again.returncode == 0
        for each in (process, again):
            while left := everything_of(each, folder / "temporary"):
                assert all(file.parent == Path("/proc") for file in left), left
                time.sleep(0.01)  # it is ending
        assert {file.name for file in folder.glob("runs/*/seed-0/*")} == FILES
        assert {file.name for file in folder.rglob(".*")} == set()
        assert results(folder) == undisturbed
