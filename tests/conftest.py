"""What the tests share: small data sets, a small network, and nothing of the machine's own."""

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn

import normlab as nl
from normlab.engines import choice
from normlab.engines.cuda_graph import GraphEngine
from normlab.lessons import checking

REAL_DATA = os.environ.get("NORMLAB_DATA")  # before the fixture below hides it

matplotlib.use("Agg")
# The commands that tests start draw without a display, and without listing all fonts anew in the
# temporary cache folder.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())
# Importing torch's optimisers makes this folder, which is none of ours, in the temporary one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "torchinductor")))


# For `tests.benchmarks`; at the end, so that the installed package goes before the folder.
sys.path.append(str(Path(__file__).parents[1]))

LONGEST = (
    *("test_cluster", "test_cli", "test_processes", "test_transfer", "test_notebooks"),
    "test_engines",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of two processes neither has one left at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> Path:
    """A cache folder of each test's own, and no data folder: no test depends on the machine."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    return folder


@pytest.fixture
def one_thread():
    """Sums are in one order, so that results repeat bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def enough_time(monkeypatch):
    """Checks of students' code may take long, so that no test depends on how fast it runs."""
    monkeypatch.setattr(checking, "SECONDS", 60)


@pytest.fixture(autouse=True)
def no_capture_has_failed(monkeypatch):
    """The process remembers a failed capture; the next test begins as if there had been none."""
    monkeypatch.setattr(GraphEngine, "failed", "")


@pytest.fixture(autouse=True)
def no_figure_left():
    """Closes what a test drew: a figure that stays open would be the next test's figure too."""
    yield
    pyplot.close("all")


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """The folder in which MNIST lies, as NORMLAB_DATA named it before the tests started."""
    if not REAL_DATA:
        pytest.skip("NORMLAB_DATA does not name a folder with MNIST")
    root = Path(REAL_DATA).expanduser()
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip("the folder in NORMLAB_DATA holds no MNIST/raw/train-images-idx3-ubyte")
    return root.absolute()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def full_disk():
    """`with full_disk():` lets no file of this process grow beyond 4 kB, as on a full disk."""
    resource = pytest.importorskip("resource", reason="there is no limit to set on this system")

    @contextmanager
    def limited(size: int = 4096):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def digits() -> nl.Dataset:
    """The bundled digits, 1×28×28."""
    return nl.load_dataset("digits")


def make_tiny(train: int = 96, test: int = 40, *, seed: int = 0) -> nl.Dataset:
    """Noisy pictures of four patterns, 1×12×12: a network learns them in an epoch or two."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 2, (4, 1, 12, 12), generator=random) * 120

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 136, (count, 1, 12, 12), generator=random)
        return (patterns[labels] + noise).to(torch.uint8), labels

    return nl.Dataset("tiny", *part(train), *part(test), tuple("abcd"), "made-up patterns")


@pytest.fixture(scope="session")
def tiny() -> nl.Dataset:
    """96 + 40 images of four classes."""
    return make_tiny()


class TinyNetwork(nn.Module):
    """A network such as a student writes, with a normalization to choose."""

    def __init__(self, norm: str = "bn", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nl.make_norm(norm, 8, groups=2, size=(12, 12))
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(8 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.linear(self.dropout(x).flatten(1))


def make_tiny_network(norm: str = "bn", seed: int = 0, *, dropout: float = 0.0) -> TinyNetwork:
    """An untrained `TinyNetwork` whose weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNetwork(norm, dropout)


@pytest.fixture(scope="session")
def tiny_network():
    """`tiny_network(norm="bn", seed=0)` makes a network for `tiny`."""
    return make_tiny_network


@pytest.fixture(scope="session")
def tiny_assignment() -> nl.Assignment:
    """A comparison of three `TinyNetwork`s that takes a moment."""
    return nl.Assignment(
        name="tiny-norms",
        title="BN with L1, GN and LN on patterns",
        dataset="tiny",
        build=TinyNetwork,
        recipe=nl.Recipe(epochs=2, batch_size=16, lr=0.1),
        variants=(
            nl.Variant("BN + L1", "bn", changes={"l1": 1e-4}),
            nl.Variant("GN", "gn"),
            nl.Variant("LN", "ln"),
        ),
    )


# --- engines ---------------------------------------------------------------------------------


@pytest.fixture
def few_digits(digits):
    """90 images: batches of 32 end with a short one."""
    return digits.subset(train=90, test=40)


@pytest.fixture
def fit_with(monkeypatch):
    """`fit` on the CPU with an engine of a kind, whatever it is made for.

    Without a GPU the graph's step is called instead of replayed: its bookkeeping (places, learning
    rates, sums, short batches, what the warm-ups leave behind) is the same.
    """

    def fit(kind, data, recipe, *, network=None, **options):
        monkeypatch.setattr(choice, "_fastest", lambda *_: (kind, "a test"))
        network = network or nl.build_network("mnist-l1", dropout=0.0, seed=1)
        run = nl.fit(network, data, recipe, device="cpu", progress=False, **options)
        assert run.config["from"]["engine"] == kind.name
        return run

    return fit


@pytest.fixture
def assert_close():
    """`assert_close(run, other, tolerance)`: histories, weights and running statistics agree."""

    def compare(one, other, tolerance):
        for mine, theirs in zip(one.history, other.history, strict=True):
            for key in ("train_loss", "test_loss", "penalty", "lr"):
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-15), key
            for key in ("train_accuracy", "test_accuracy"):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-9)
        mine, theirs = map(_numbers, (one.network, other.network))
        assert (mine - theirs).norm() < tolerance * theirs.norm()

    return compare


def _numbers(network):
    """Without BN's count of batches, which would outweigh them."""
    state = network.state_dict().values()
    return torch.cat([value.flatten() for value in state if value.is_floating_point()])


# --- processes -------------------------------------------------------------------------------


def everything_of(process: subprocess.Popen, temporary: Path) -> list[Path]:
    """What there is of a process that leads a session, on Linux.

    All processes of the session, its files in the temporary folder, and those in shared memory.
    """
    found = list(Path("/dev/shm").glob(f"*[-_]{process.pid}[-_]*"))
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, _, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            found += [place] if state != "Z" and session == str(process.pid) else []
    return [*found, *temporary.iterdir()]
