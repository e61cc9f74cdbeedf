"""Sweeps on a Dask cluster: a scheduler and workers of this machine, started by Dask's commands."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import normlab as nl
from normlab.cli import main
from normlab.runs import cluster
from normlab.support.files import read_json
from tests.runs.test_folder import FILES

distributed = pytest.importorskip("distributed", reason="Dask is not installed")
cloudpickle = pytest.importorskip("cloudpickle", reason="Dask is not installed")

pytestmark = pytest.mark.process

RECIPE = nl.Recipe(epochs=1, batch_size=64, lr=0.1)
ASSIGNMENT = replace(nl.ASSIGNMENTS["mnist-l1"], recipe=RECIPE, dataset="digits")


def few_digits() -> nl.Dataset:
    """What the workers load; they find this function by its name."""
    return nl.load_dataset("digits").subset(train=192, test=48)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def started(*words: str, cache: Path | None = None):
    """A command of Dask's while the context lasts, with this cache folder or the test's."""
    # -P: the installed package, not a folder of that name where the tests are started.
    command = [sys.executable, "-P", "-m", "distributed.cli.dask_" + words[0], *words[1:]]
    # It must find the functions of this file by their names.
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | {"PYTHONPATH": paths}
    env |= {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(command, env=env, **quiet) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def a_scheduler():
    """The address of a scheduler, and its process."""
    port = free_port()
    options = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    with started("scheduler", *options) as process:
        yield f"tcp://127.0.0.1:{port}", process


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler without workers."""
    with a_scheduler() as (address, _):
        yield address


@pytest.fixture(scope="module")
def lasting_cluster(tmp_path_factory):
    """The address of a scheduler with one worker, and that worker's cache folder.

    For all tests that do the worker no harm: its first run takes seconds of imports.
    """
    cache, place = (tmp_path_factory.mktemp(name) for name in ("worker-cache", "worker"))
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(place))
    with a_scheduler() as (address, _), started("worker", address, *options, cache=cache):
        yield address, cache


@pytest.fixture
def one_worker(lasting_cluster, own_cache, monkeypatch) -> str:
    """The address of the lasting cluster, whose cache folder is that of the test."""
    address, cache = lasting_cluster
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return address


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
    assert there["train_loss"].to_numpy() == pytest.approx(
        here["train_loss"].to_numpy(), rel=1e-3, nan_ok=True
    )  # one thread there, perhaps more here: sums are rounded otherwise
    assert there["test_accuracy"].isna().sum() == 2
    for folder in (tmp_path / "there").glob("runs/*-0-05/seed-*"):
        assert {file.name for file in folder.iterdir()} == FILES
    # What came home is whole: it is loaded like any run, and nothing is trained.
    again = nl.run_sweep(
        ASSIGNMENT, norms=["gn"], lrs=[0.05], seeds=2, data=few_digits, progress=False,
        directory=tmp_path / "there", after_each=lambda table: pytest.fail("trained again"),
    )  # fmt: skip
    assert len(again) == 2


def test_a_killed_worker_loses_no_run(scheduler, workers, tmp_path):
    processes, calls = workers(3), []

    def kill_one(table):
        calls.append(len(table))
        processes[0].send_signal(signal.SIGKILL)  # its run is among them: seven keep all busy

    table = sweep(scheduler, tmp_path, seeds=7, epochs=12, after_each=kill_one)
    assert processes[0].wait() == -signal.SIGKILL
    assert calls == [1, 2, 3, 4, 5, 6, 7]  # each run comes home, and none twice
    assert table["test_accuracy"].notna().all()


def test_that_no_workers_are_left_is_said(scheduler, workers, tmp_path, monkeypatch):
    processes, said = workers(1), []
    train = cluster.Cluster.train

    def kill_and_train(*arguments):
        processes[0].kill()
        return train(*arguments)

    def start_another(message):
        said.append(message)
        workers(1)

    monkeypatch.setattr(cluster.Cluster, "train", kill_and_train)
    monkeypatch.setattr(cluster, "warn", start_another)
    table = sweep(scheduler, tmp_path)
    assert table["test_accuracy"].notna().all()
    assert len(said) == 1
    assert (
        f"no workers are left, this waits for one: start it with `dask worker {scheduler}"
        in said[0]
    )


# --- the command ------------------------------------------------------------------------------


def make_folder(place: Path) -> Path:
    """A folder of images of two classes, 8 for training and 4 for testing of each."""
    for part, count in (("train", 8), ("test", 4)):
        for shade in (60, 200):
            folder = place / part / str(shade)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (20, 20), shade + number).save(folder / f"{number}.png")
    return place


def test_the_command_has_the_workers_train(one_worker, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "shades")
    monkeypatch.chdir(tmp_path)  # not where the worker was started
    options = ["--norms", "gn", "--epochs", "1", "--dask", one_worker]
    assert main(["sweep", "mnist-l1", "--dataset", "shades", "--out", "out", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 of 1: GN, seed 0: ")
    assert said.err == ""
    (file,) = tmp_path.glob("out/runs/gn/seed-0-*/config.json")
    config = read_json(file)
    assert config["from"]["data_source"] == "shades"
    assert (tmp_path / "out" / "sweep.png").is_file()


def test_a_data_root_that_only_the_client_has(one_worker, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    root.mkdir()
    connect = cluster._connect

    def hidden(*arguments):  # the images here are loaded; the worker finds no such folder
        root.rmdir()
        return connect(*arguments)

    monkeypatch.setattr(cluster, "_connect", hidden)
    options = ["--dataset", "digits", "--data-root", str(root), "--norms", "gn", "--epochs", "1"]
    command = ["sweep", "mnist-l1", *options, "--dask", one_worker, "--out", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert re.match(rf"normlab: worker tcp://127\S+: the data root {root} is not a folder\n$", said)


def test_a_task_is_small(one_worker, tmp_path, monkeypatch):
    sizes = []

    def measured(self, device, sent):
        sizes.extend(len(cloudpickle.dumps((self.load, each))) for each in sent.values())
        yield from ((job, FloatingPointError("measured")) for job in sent)

    monkeypatch.setattr(cluster.Cluster, "train", measured)
    sweep(one_worker, tmp_path, batch_sizes=list(range(8, 48)), lrs=[1e30])
    assert len(sizes) == 40
    assert max(sizes) < 100_000


def test_a_scheduler_that_ends_is_said(tmp_path):
    worker = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "1")
    with (
        a_scheduler() as (address, process),
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


def test_a_worker_of_another_version_is_named(one_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(nl, "__version__", "99.0")
    sentence = r"this is normlab 99\.0, but tcp://127\.0\.0\.1:\d+ has (?!99)\d"
    with pytest.raises(RuntimeError, match=sentence):
        sweep(one_worker, tmp_path)


def test_images_that_only_the_client_has(one_worker, tmp_path):
    data = partial(_images_of_the_client, os.getpid(), "missing")
    kept = sweep(None, tmp_path / "sweep", data=data)
    with pytest.raises(RuntimeError, match=r"worker tcp://127\S+: there is no data root here"):
        sweep(one_worker, tmp_path / "sweep", data=data, fresh=True)
    pd.testing.assert_frame_equal(sweep(None, tmp_path / "sweep", data=data), kept)
    data = partial(_images_of_the_client, os.getpid(), "other")
    with pytest.raises(RuntimeError, match=r"worker tcp://127\S+: it has other images of digits"):
        sweep(one_worker, tmp_path / "other", data=data)


def _images_of_the_client(client: int, elsewhere: str) -> nl.Dataset:
    if os.getpid() == client:
        return few_digits().subset(test=40)  # which no worker has from another test
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


def test_workers_train_what_the_session_has(one_worker, one_thread):
    factor = 3.0

    class Own(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.linear = nl.make_norm(norm, 1), torch.nn.Linear(28, 10)

        def forward(self, x):
            return factor * self.linear(self.norm(x).mean((1, 2)))

    own = replace(ASSIGNMENT, network=None, build=Own, variants=(nl.Variant("BN", "bn"),))
    there = nl.run_sweep(own, data=few_digits, progress=False, dask=one_worker)
    here = nl.run_sweep(own, data=few_digits, progress=False, device="cpu")
    assert there.drop(columns="seconds").equals(here.drop(columns="seconds"))


def test_threads_of_a_worker_train_one_after_another(scheduler, workers, tmp_path):
    workers(1, threads=3)
    table = sweep(scheduler, tmp_path, seeds=3)
    assert table["test_accuracy"].notna().all()
