"""Trainings that several processes share, against one process with the whole batch."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import replicas_worker
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normlab as nl
from normlab.devices import pick_device
from normlab.replicas import Replicas
from normlab.runs import RunFolder, identity
from normlab.synchronized import synchronized, synchronized_by_torch

WORKER = Path(__file__).with_name("replicas_worker.py")


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    with ExitStack() as stack:
        places = [stack.enter_context(socket.socket()) for _ in range(count)]
        for place in places:
            place.bind(("127.0.0.1", 0))
        return [place.getsockname()[1] for place in places]


def start(task: str, out: Path, processes: int) -> list[subprocess.Popen]:
    """The processes of one task, each of one thread, as torchrun would start them."""
    ports = list(map(str, free_ports(1 + len(replicas_worker.WISHES))))
    common = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": ports[0],
        "PORTS": " ".join(ports[1:]),  # for groups that follow one another
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(WORKER), task, str(out)]
    return [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and last line of what each process said."""
    ends = [process.communicate(timeout=240)[1] for process in processes]
    lines = [text.strip().splitlines()[-1] if text.strip() else "" for text in ends]
    return [(p.returncode, line) for p, line in zip(processes, lines, strict=True)]


def run_together(task: str, out: Path, processes: int) -> None:
    for status, said in finish(start(task, out, processes)):
        assert status == 0, said


@pytest.fixture(scope="module")
def in_two(tmp_path_factory) -> Path:
    """What two processes made of all the worker's wishes."""
    out = tmp_path_factory.mktemp("two")
    run_together("histories", out, 2)
    return out


@pytest.fixture(scope="module")
def in_one() -> dict[str, nl.Run]:
    """The same in one process, as every training is."""
    return {name: replicas_worker.trained(name) for name in replicas_worker.WISHES}


def gap(in_two: Path, name: str, alone: nl.Run) -> float:
    """The largest difference of weights and of history (relative) between two processes and one."""
    history = json.loads((in_two / name / "run.json").read_text())["history"]
    weights = load_file(in_two / name / "weights.safetensors")
    gaps = [
        abs(mine[key] - row[key]) / max(abs(row[key]), 1e-12)
        for mine, row in zip(history, alone.history, strict=True)
        for key in row.keys() - {"seconds"}
    ]
    state = alone.network.state_dict()
    return max(*gaps, *((weights[k] - state[k]).abs().max().item() for k in state))


@pytest.mark.parametrize("name", [name for name in replicas_worker.WISHES if name != "bn"])
def test_two_processes_compute_what_one_computes(name, in_two, in_one):
    assert gap(in_two, name, in_one[name]) < 1e-9
    config = json.loads((in_two / name / "run.json").read_text())
    assert config["is"] == in_one[name].config["is"]
    assert config["from"]["because"] == "shared by 2 processes"


def test_batch_norm_of_each_process_is_another_training_and_says_so(in_two, in_one):
    assert gap(in_two, "bn", in_one["bn"]) > 1e-4
    config = json.loads((in_two / "bn" / "run.json").read_text())
    assert config["is"] == in_one["bn"].config["is"] | {"batch_norm_apart_in": 2}


@pytest.mark.parametrize("processes", [2, 3])
def test_synchronized_batch_norm_is_that_of_the_whole_batch(processes, tmp_path):
    random = torch.Generator().manual_seed(0)
    x, factor = torch.randn(2, 7, 3, 4, 5, dtype=torch.float64, generator=random) * 3 + 1
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2, generator=random)
        layer.bias.uniform_(-1, 1, generator=random)
    before = {f"layer.{k}": v.clone() for k, v in layer.state_dict().items()}
    save_file(before | {"x": x, "factor": factor}, tmp_path / "whole.safetensors")
    run_together("batch_norm", tmp_path, processes)

    x.requires_grad_()
    y = layer(x)
    (y * factor).sum().backward()
    parts = [load_file(tmp_path / f"{processes}-{rank}.safetensors") for rank in range(processes)]
    for name, whole in (("y", y), ("x.grad", x.grad)):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole, rtol=0, atol=1e-10)
    wanted = {f"{k}.grad": v.grad for k, v in layer.named_parameters()} | layer.state_dict()
    for part in parts:
        for name, value in wanted.items():
            torch.testing.assert_close(part[name], value, rtol=0, atol=1e-10)
        # What notebook 8 counts the bytes of: the sums and a count, the squares; and both back.
        assert part["exchanged"].tolist() == [3 + 1, 3, 3, 3 + 1]


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(tmp_path):
    (status, said), (killed, _) = finish(start("dies", tmp_path, 2))
    assert (status, killed) == (1, -9)
    assert "process 0 lost another of the 2" in said
    kept = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(kept) == 2  # a header and the first epoch
    run_together("resumes", tmp_path, 3)  # with another number of processes
    whole = replicas_worker.trained("gn", epochs=3)
    for rank in range(3):
        resumed = json.loads((tmp_path / f"resumed-{rank}.json").read_text())
        # One left over may abort the process as it ends. (Where /proc is not, none is seen.)
        assert resumed["threads"] == []
        for mine, row in zip(resumed["history"], whole.history, strict=True):
            assert mine["train_loss"] == pytest.approx(row["train_loss"], rel=1e-9)
            assert mine["test_accuracy"] == pytest.approx(row["test_accuracy"], rel=1e-9)


def test_a_process_that_hangs_is_waited_for_only_so_long(tmp_path):
    waiting, hanging = start("hangs", tmp_path, 2)
    (status, said), *_ = finish([waiting])
    hanging.kill()
    hanging.communicate(timeout=60)
    assert status == 1
    assert "process 0 lost another of the 2, which ended or did not answer" in said


def test_a_process_that_dies_under_torchrun_ends_the_other_with_a_sentence(tmp_path):
    command = torchrun("--epochs", "50", "--device", "cpu", "--out", str(tmp_path))
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    history = tmp_path / "runs" / "bn-l1" / "seed-0" / "history.csv"
    try:
        wait_until(lambda: history.is_file() and len(history.read_text().splitlines()) > 1)
        [child] = [p for p in psutil.Process(started.pid).children() if rank_of(p) == 1]
        child.kill()
        said = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 1
    assert "process 0 " in said
    assert "the same command" in said
    assert len(history.read_text().splitlines()) > 1


def rank_of(process: psutil.Process) -> int:
    return int(process.environ().get("RANK", "-1"))


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} seconds"
        time.sleep(0.05)


def test_what_cannot_be_trained_together_is_one_sentence_in_each_process(tmp_path):
    run_together("refused", tmp_path, 2)
    for rank in (0, 1):
        said = json.loads((tmp_path / f"refused-{rank}.json").read_text())
        assert "2 processes cannot share a batch of 1 images" in said["too_many"]
        other = "process 1 (here) would train something else than process 0 (there): "
        assert said["disagree"].startswith(other + "data.fingerprint differs; recipe.epochs is 2")
        assert said["idle"].startswith("some parameters of Sequential have no part in its output")


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("same", [synchronized, synchronized_by_torch])
def test_a_batch_norm_with_a_forward_of_its_own_is_refused(same):
    with (
        pytest.raises(ValueError, match="OwnBatchNorm has a forward of its own"),
        same(nn.Sequential(nn.Conv2d(1, 2, 3), OwnBatchNorm(2))),
    ):
        pass


def test_torch_s_synchronised_layers_leave_the_network_s_own_behind():
    network = nl.build_network("mnist-l1", "bn", seed=0)
    layers = dict(network.named_modules())
    weights = list(network.parameters())
    with synchronized_by_torch(network):
        inside = [type(layer) for layer in network.modules()]
        assert nn.SyncBatchNorm in inside
        assert nn.BatchNorm2d not in inside
        assert all(a is b for a, b in zip(network.parameters(), weights, strict=True))
    assert dict(network.named_modules()) == layers


def test_a_run_whose_batch_norm_was_taken_apart_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    replicas_worker.trained("bn", tmp_path)
    monkeypatch.setattr("normlab.replicas._here", Replicas(0, 2))
    what = identity(replicas_worker.build(replicas_worker.WISHES["bn"]), *digits_and_recipe())
    with pytest.raises(ValueError, match="batch_norm_apart_in is None there and 2 here"):
        RunFolder(tmp_path).open(what)


def digits_and_recipe() -> tuple[nl.Dataset, nl.Recipe]:
    return replicas_worker.few_digits(), replicas_worker.RECIPE


def test_what_the_first_process_makes_reaches_the_others(tmp_path):
    run_together("told", tmp_path, 2)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["value"] for each in told] == [{"rank": 0}] * 2
    assert [each["calls"] for each in told] == [[1, 2, "division by zero"], [2, "division by zero"]]
    here = {"rank": 1, "count": 2, "sync_batch_norm": False, "device": "cpu"}
    assert told[1]["here"] == here


def test_nothing_is_removed_where_a_batch_cannot_be_shared(
    tiny_assignment, tiny, tmp_path, monkeypatch
):
    options = {"data": tiny, "directory": tmp_path, "device": "cpu", "progress": False}
    nl.run_assignment(tiny_assignment, **options)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr("normlab.replicas._here", Replicas(0, 200))
    with pytest.raises(ValueError, match="200 processes cannot share a batch"):
        nl.run_assignment(tiny_assignment, fresh=True, **options)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "each of the 2 processes on this machine needs a GPU of its own"),
        ("mps", "'mps'"),
    ],
)
def test_a_device_that_the_processes_cannot_share_is_refused(device, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=says), nl.data_parallel(device=device):
        pass


def test_processes_that_share_a_training_use_the_device_they_joined_for(monkeypatch):
    monkeypatch.setattr("normlab.devices.available_devices", lambda: ["cuda", "cpu"])
    monkeypatch.setattr("normlab.replicas._here", Replicas(0, 2, device="cpu"))
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="were joined for cpu"):
        pick_device("cuda")


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with (
            pytest.raises(RuntimeError, match=r"and the port free\? .*EADDRINUSE"),
            nl.data_parallel(device="cpu"),
        ):
            pass


def test_an_address_that_nobody_listens_at_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    monkeypatch.setattr("normlab.replicas.PATIENCE", timedelta(seconds=2))
    with (
        pytest.raises(RuntimeError, match="did not find each other"),
        nl.data_parallel(device="cpu"),
    ):
        pass


def torchrun(*options: str) -> list[str]:
    """`normlab run` on the digits in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_ports(1)[0]}", "-m", "normlab", "run", "mnist-l1"]
    return [*command, "--dataset", "digits", *options]


def test_the_command_works_under_torchrun(tmp_path):
    options = ("--epochs", "1", "--sync-batch-norm", "--out", str(tmp_path))
    done = subprocess.run(torchrun(*options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| BN + L1 |") == 1  # the first process alone speaks
    assert (tmp_path / "report.md").is_file()
    config = json.loads((tmp_path / "runs" / "gn" / "seed-0" / "config.json").read_text())
    assert config["from"]["engine"] == "data-parallel"
