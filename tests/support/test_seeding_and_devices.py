"""Streams of random numbers that do not disturb each other, and the choice of a device."""

import itertools

import pytest
import torch

from normlab import build_network, summary
from normlab.support.devices import available_devices, check_dtype, exact_float32, pick_device
from normlab.support.seeding import derive_seed, generator, seeded


def test_derived_seeds_never_change():
    # A change here would change the result of every run that anybody has reported.
    assert derive_seed(0, "order", 1) == 1332101017241992705
    assert derive_seed(123, "weights", 0) == 834000675361779729


def test_derived_seeds_are_distinct_and_fit_a_generator():
    purposes = ["order", "augment", "dropout", "weights"]
    seeds = [
        derive_seed(seed, purpose, number)
        for seed, purpose, number in itertools.product(range(20), purposes, range(20))
    ]
    # LayerBuilder that would run together when they are joined as text stay apart.
    seeds += [derive_seed(1, 23), derive_seed(12, 3), derive_seed(123)]
    seeds += [
        derive_seed(0, "ab"),
        derive_seed(0, "a", "b"),
        derive_seed(0, 1),
        derive_seed(0, "1"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat_for_a_purpose_and_leave_the_global_state():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=generator(0, "order", epoch)) for epoch in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def random_states(device: str) -> list[torch.Tensor]:
    """The state of the CPU's generator and of the device's."""
    if device == "cpu":
        return [torch.get_rng_state()]
    return [torch.get_rng_state(), torch.get_device_module(device).get_rng_state()]


@pytest.mark.parametrize("device", available_devices())
def test_seeded_repeats_inside_and_restores_the_state(device):
    before = random_states(device)
    drawn = []
    for purpose in ("dropout", "dropout", "other"):
        with seeded(3, purpose, device=device):
            drawn.append(torch.rand(4, device=device))
            with seeded(4, "inner", device=device):
                torch.rand(4, device=device)
            drawn[-1] = torch.cat([drawn[-1], torch.rand(4, device=device)])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(map(torch.equal, random_states(device), before))


def draw_and_fail(device: str) -> None:
    with seeded(0, device=device):
        torch.rand(4, device=device)
        raise KeyboardInterrupt


@pytest.mark.parametrize("device", available_devices())
def test_seeded_restores_the_state_after_an_exception(device):
    before = random_states(device)
    with pytest.raises(KeyboardInterrupt):
        draw_and_fail(device)
    assert all(map(torch.equal, random_states(device), before))


def draw_seeded() -> None:
    with seeded(0, "dropout", device="cpu"):
        torch.rand(4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "work",
    [
        draw_seeded,
        lambda: build_network("mnist-l1", seed=0),
        lambda: summary(build_network("mnist-l1", seed=0), (1, 28, 28)),
    ],
    ids=["seeded", "build_network", "summary"],
)
def test_work_on_the_cpu_leaves_the_gpu_state(work):
    # torch.manual_seed seeds every device, not the CPU alone.
    torch.cuda.manual_seed(77)
    before = torch.cuda.get_rng_state()
    work()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.fixture
def machine(monkeypatch):
    """Makes torch report these numbers of devices, whatever this machine has."""

    def has(*, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


@pytest.mark.parametrize(
    ("devices", "fastest"),
    [
        ({}, "cpu"),
        ({"mps": True}, "mps"),
        ({"cuda": 1}, "cuda"),
        ({"cuda": 1, "mps": True}, "cuda"),
    ],
)
def test_fastest_device_is_picked_unless_one_is_asked_for(machine, devices, fastest):
    machine(**devices)
    assert pick_device() == torch.device(fastest)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


def test_indexed_device_must_exist(machine):
    machine(cuda=2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' does not exist: cuda has the number 0 to 1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", torch.device("cuda")])
def test_missing_device_is_refused_with_those_there_are(machine, name):
    machine()
    with pytest.raises(ValueError, match=f"'{name}' is not available .* which has cpu$"):
        pick_device(name)


@pytest.mark.parametrize(("typed", "meant"), [("CUDA", "cuda"), ("cudda:0", "cuda"), ("cp", "cpu")])
def test_unknown_device_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"cpu, cuda, mps; did you mean '{meant}'"):
        pick_device(typed)


@pytest.mark.parametrize("typed", ["", "tpu", "meta", "cpu:x", "cpu:", 3])
def test_what_is_no_device_is_refused(typed):
    with pytest.raises(ValueError, match=f"device '{typed}'"):
        pick_device(typed)


def test_asking_for_a_gpu_is_not_answered_with_the_cpu():
    # "gpu" resembles "cpu" in its letters and in nothing else.
    with pytest.raises(ValueError, match="unknown device 'gpu'") as raised:
        pick_device("gpu")
    assert "did you mean 'cpu'" not in str(raised.value)


# --- precision -------------------------------------------------------------------------------

BACKENDS = torch.backends


def settings() -> dict[str, object]:
    """All that torch tells of how float32 is computed, by older and newer names."""
    newer = (
        *(BACKENDS, BACKENDS.cudnn, BACKENDS.mkldnn, BACKENDS.cuda.matmul),
        *(getattr(BACKENDS.cudnn, part, None) for part in ("conv", "rnn")),
        *(getattr(BACKENDS.mkldnn, part, None) for part in ("conv", "matmul")),
    )
    asked = {
        "cudnn": lambda: BACKENDS.cudnn.allow_tf32,
        "matmul": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    found = {place: getattr(each, "fp32_precision", None) for place, each in enumerate(newer)}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except RuntimeError:  # where older and newer names were mixed
            found[name] = "mixed"
    return found


SET = {
    "as it comes": lambda: None,
    "older": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "coarse": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "newer, one": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize("name", SET)
def test_float32_is_exact_inside_and_settings_are_put_back(name, recwarn):
    if "newer" in name and not hasattr(BACKENDS.cudnn, "conv"):
        pytest.skip("this torch has older names alone")
    with exact_float32():  # which also puts back what the test sets
        BACKENDS.cudnn.allow_tf32 = True  # as it comes
        SET[name]()
        before = settings()
        with exact_float32():
            assert not BACKENDS.cudnn.allow_tf32
            assert not BACKENDS.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert settings() == before
    assert not recwarn.list


@pytest.mark.parametrize(("lacks", "device"), [(True, "cuda"), (False, "cuda"), (True, "mps")])
def test_a_device_without_bfloat16_is_one_sentence(lacks, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not lacks)
    device = torch.device(device)
    check_dtype(device, "float32")
    check_dtype(torch.device("cpu"), "bfloat16")
    if not lacks:
        check_dtype(device, "bfloat16")
        return
    with pytest.raises(ValueError, match=r"'bfloat16' is not available on .*: use dtype='float32'"):
        check_dtype(device, "bfloat16")
