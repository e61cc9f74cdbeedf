"""Sweeps on a Dask cluster: a scheduler and workers of this machine, started by Dask's commands."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import normlab as nl
from normlab import cluster
from normlab.files import read_json
from normlab.plans import plan_runs
from normlab.runs import RunFolder
from normlab.sweeps import _attempt

distributed = pytest.importorskip("distributed", reason="Dask is not installed")
cloudpickle = pytest.importorskip("cloudpickle", reason="Dask is not installed")

RECIPE = nl.Recipe(epochs=1, batch_size=64, lr=0.1)
ASSIGNMENT = replace(nl.ASSIGNMENTS["mnist-l1"], recipe=RECIPE, dataset="digits")


FILES = {"config.json", "history.csv", "weights.safetensors", "predictions.safetensors"}


def few_digits() -> nl.Dataset:
    """What the workers load; they find this function by its name."""
    return nl.load_dataset("digits").subset(train=192, test=48)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def started(*words: str):
    """A command of Dask's while the context lasts."""
    # -P: the installed package, not a folder of that name where the tests are started.
    command = [sys.executable, "-P", "-m", "distributed.cli.dask_" + words[0], *words[1:]]
    # It must find the functions of this file by their names.
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **quiet) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler without workers."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    options = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    with started("scheduler", *options):
        yield address


@pytest.fixture
def workers(scheduler, own_cache, tmp_path):
    """`workers(3)` starts so many, which share the test's cache folder."""
    with ExitStack() as stack, distributed.Client(scheduler, set_as_default=False) as client:

        def start(count: int, threads: int = 1) -> list[subprocess.Popen]:
            options = ["--nthreads", str(threads), "--no-nanny", "--no-dashboard"]
            options += ["--local-directory", str(tmp_path)]
            found = [
                stack.enter_context(started("worker", scheduler, *options)) for _ in range(count)
            ]
            client.wait_for_workers(count, timeout=120)
            return found

        yield start


def sweep(address, folder, **options):
    options = {"norms": ["gn"], "data": few_digits, "progress": False, **options}
    return nl.run_sweep(ASSIGNMENT, dask=address, directory=folder, **options)


def test_a_cluster_gives_what_one_machine_gives(scheduler, workers, tmp_path):
    workers(2)
    there = sweep(scheduler, tmp_path / "there", lrs=[0.05, 1e30], seeds=2)
    here = nl.run_sweep(
        ASSIGNMENT, norms=["gn"], lrs=[0.05, 1e30], seeds=2, data=few_digits, progress=False,
        device="cpu", directory=tmp_path / "here",
    )  # fmt: skip
    exact = ["run", "variant", "lr", "seed", "parameters"]
    assert there[exact].equals(here[exact])
    assert there["test_accuracy"].to_numpy() == pytest.approx(
        here["test_accuracy"].to_numpy(), abs=0.02, nan_ok=True
    )  # one thread there, perhaps more here: sums are rounded otherwise
    assert there["test_accuracy"].isna().sum() == 2
    for folder in (tmp_path / "there").glob("runs/*-0-05/seed-*"):
        files = {file.name for file in folder.iterdir()}
        assert files == {
            "config.json", "history.csv", "weights.safetensors", "predictions.safetensors"
        }  # fmt: skip
    # What came home is whole: it is loaded like any run, and nothing is trained.
    again = nl.run_sweep(
        ASSIGNMENT, norms=["gn"], lrs=[0.05], seeds=2, data=few_digits, progress=False,
        directory=tmp_path / "there", after_each=lambda table: pytest.fail("trained again"),
    )  # fmt: skip
    assert len(again) == 2


def test_a_killed_worker_loses_its_unfinished_epoch_alone(scheduler, workers, own_cache, tmp_path):
    processes = workers(3)
    before: dict[int, list[dict]] = {}
    calls: list[int] = []

    def kill_one(table):
        calls.append(len(table))
        if before:
            return
        folders = [RunFolder(folder) for folder in three_with_an_epoch(own_cache)]
        processes[0].send_signal(signal.SIGKILL)  # its run is among them: seven runs keep all busy
        for folder in folders:
            seed = read_json(folder.directory / "config.json")["is"]["recipe"]["seed"]
            before[seed] = folder.history_so_far()

    table = sweep(scheduler, tmp_path, seeds=7, epochs=12, after_each=kill_one)
    assert processes[0].wait() == -signal.SIGKILL
    assert calls == [1, 2, 3, 4, 5, 6, 7]  # each run comes home, and none twice
    assert table["test_accuracy"].notna().all()
    for seed, rows in before.items():  # the seconds of an epoch that is done again would differ
        after = RunFolder(tmp_path / "runs" / "gn" / f"seed-{seed}").history_so_far()
        assert len(after) == 12
        assert after[: len(rows)] == rows
    assert not list((own_cache / "normlab" / "sweeps").iterdir())


def three_with_an_epoch(cache: Path) -> list[Path]:
    """The folders of unfinished runs, once there are three and each has an epoch."""
    for _ in range(600):
        folders = [file.parent for file in cache.glob("normlab/sweeps/*/checkpoint.safetensors")]
        if len(folders) == 3:
            return folders
        time.sleep(0.1)
    raise AssertionError("the workers do not train")


@pytest.fixture
def threads_put_back():
    """A worker sets its process to one thread; here that is the process of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("threads_put_back")
def test_what_could_not_be_delivered_is_not_trained_again(own_cache, tmp_path):
    data = few_digits()
    plan = plan_runs(ASSIGNMENT, [0], 1, tmp_path)[0]
    attempt = partial(_attempt, device="cpu")
    task = partial(cluster._train_away, attempt, few_digits, data.fingerprint, nl.__version__)
    _, lost = task(plan)
    _, again = task(plan)
    assert again == lost  # the seconds of another training would differ
    assert set(lost) == FILES
    cluster._forget([plan.digest(data)])
    assert not list((own_cache / "normlab" / "sweeps").iterdir())


def test_a_task_is_small(scheduler, workers, tmp_path, monkeypatch):
    workers(1)
    sizes = []
    work_off = cluster.work_off

    def measured(task, plans, done, **pool):
        sizes.extend(len(cloudpickle.dumps((task, plan))) for plan in plans)
        work_off(task, plans, done, **pool)

    monkeypatch.setattr(cluster, "work_off", measured)
    sweep(scheduler, tmp_path, batch_sizes=list(range(8, 48)), lrs=[1e30])
    assert len(sizes) == 40
    assert max(sizes) < 100_000
    data = few_digits()
    with pytest.raises(ValueError, match="a function that loads the images, not one that holds"):
        sweep(scheduler, tmp_path / "held", data=lambda: data)


def test_a_scheduler_that_ends_is_said(tmp_path):
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    options = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    worker = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "1")
    with (
        started("scheduler", *options) as process,
        started("worker", address, *worker),
        pytest.raises(ConnectionError, match="the Dask scheduler went away"),
    ):
        sweep(address, tmp_path, seeds=4, after_each=lambda table: process.kill())


def test_an_address_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS_TO_ANSWER", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=f"no Dask scheduler answers at {address} within 1"):
        sweep(address, tmp_path)


def test_a_cluster_without_workers(scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS_TO_ANSWER", 1)
    with pytest.raises(
        RuntimeError, match=f"has no workers: start some with `dask worker {scheduler}"
    ):
        sweep(scheduler, tmp_path)


def test_a_worker_of_another_version_is_named(scheduler, workers, tmp_path, monkeypatch):
    workers(1)
    monkeypatch.setattr(nl, "__version__", "99.0")
    sentence = r"this is normlab 99\.0, but tcp://127\.0\.0\.1:\d+ has (?!99)\d"
    with pytest.raises(RuntimeError, match=sentence):
        sweep(scheduler, tmp_path)


def test_images_that_only_the_client_has(scheduler, workers, tmp_path):
    workers(1)
    data = partial(_images_of_the_client, os.getpid(), "missing")
    with pytest.raises(RuntimeError, match=r"worker tcp://127\S+: there is no data root here"):
        sweep(scheduler, tmp_path / "sweep", data=data)
    kept = nl.run_sweep(
        ASSIGNMENT, norms=["gn"], data=few_digits, directory=tmp_path / "sweep", progress=False,
        device="cpu",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"worker tcp://127\S+: there is no data root here"):
        sweep(scheduler, tmp_path / "sweep", data=data, fresh=True)
    again = sweep(scheduler, tmp_path / "sweep")  # a new training would take other seconds
    assert again.equals(kept)
    data = partial(_images_of_the_client, os.getpid(), "other")
    with pytest.raises(RuntimeError, match=r"worker tcp://127\S+ has other images of digits"):
        sweep(scheduler, tmp_path / "other", data=data)


def _images_of_the_client(client: int, elsewhere: str) -> nl.Dataset:
    if os.getpid() == client:
        return few_digits()
    if elsewhere == "missing":
        raise FileNotFoundError("there is no data root here")
    return few_digits().subset(train=100)


def test_a_run_that_kills_every_worker_ends_the_sweep_with_a_sentence(scheduler, workers, tmp_path):
    workers(4)
    data = partial(_deadly_images, os.getpid())
    with pytest.raises(RuntimeError, match="ended the process of every worker"):
        sweep(scheduler, tmp_path, data=data)


def _deadly_images(client: int) -> nl.Dataset:
    if os.getpid() != client:
        os.kill(os.getpid(), signal.SIGKILL)
    return few_digits()


def test_threads_that_only_wait_are_counted(scheduler, workers, tmp_path):
    workers(1, threads=3)
    with pytest.warns(UserWarning, match="2 threads will only wait"):
        table = sweep(scheduler, tmp_path, seeds=3)
    assert table["test_accuracy"].notna().all()
