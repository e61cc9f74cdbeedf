"""What `normlab doctor` tells: true of this machine, also where something is broken."""

import re
from types import SimpleNamespace

import pytest
import torch

import normlab as nl
from normlab.engines import doctor as room


@pytest.fixture
def short(monkeypatch):
    """Of two networks, one of which is that of the estimate."""
    two = {name: nl.ASSIGNMENTS[name] for name in ("mnist-eva6", room.ESTIMATED)}
    monkeypatch.setattr(room, "ASSIGNMENTS", two)


def test_it_tells_what_is_here_and_that_all_is_well(
    short, capsys, tmp_path, monkeypatch, no_network
):
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    monkeypatch.setenv("NORMLAB_DATA", str(tmp_path))
    nl.doctor("cpu")
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert f"cifar10: {tmp_path}" in text
    assert "mnist: not here; it would be downloaded" in text
    assert re.search(r"cache: .* GiB free", text)
    found = re.findall(r"^  (\S+) +[\d,]+ +[\d,]+  cpu-channels-last agrees", text, re.M)
    assert found == ["mnist-eva6", "cifar10-norms"]
    assert re.search(r"3 × 20 epochs of cifar10-norms on 50,000 images: about [\d,]+ s", text)


def test_an_engine_that_disagrees_and_an_error_are_told(short, capsys, monkeypatch):
    def out_of_memory(assignment, data, device):
        if assignment.name == "mnist-eva6":
            raise RuntimeError("CUDA error:\nout of memory")
        return examined(assignment, data, device)

    examined = room._examined
    monkeypatch.setattr(room, "_examined", out_of_memory)
    monkeypatch.setattr(
        room, "disagreement", lambda engine: "weights differ by 90% of their change"
    )
    nl.doctor("cpu")
    text = capsys.readouterr().out
    assert "mnist-eva6     fails: RuntimeError: CUDA error: out of memory" in text
    assert re.search(r"cifar10-norms +[\d,]+ +[\d,]+  weights differ by 90%", text)


def test_a_gpu_is_told_with_its_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla T4")
    done = SimpleNamespace(stdout="580.1\n580.1\n")
    monkeypatch.setattr(room.subprocess, "run", lambda *_, **options: done)
    assert "GPU 0: Tesla T4, 8.0 of 16.0 GiB free, driver 580.1" in list(room._hardware())
