"""What is on this machine, whether its engines compute the same, and how fast: `normlab doctor`."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version

import joblib
import torch

from normlab.assignments import ASSIGNMENTS, Assignment
from normlab.data import Dataset
from normlab.datasets.cache import cache_folder, cache_size
from normlab.datasets.downloads import SOURCES, data_roots
from normlab.datasets.loading import load_assignment_data
from normlab.engines.agreement import disagreement
from normlab.engines.choice import make_engine
from normlab.engines.plain import PlainEngine, training_batches
from normlab.model import build_network
from normlab.support.devices import exact_float32, pick_device

GIB = 2**30
EPOCHS = 2  # of which the quicker one counts: the first finds memory and algorithms
ESTIMATED, IMAGES, TESTED = "cifar10-norms", 50_000, 10_000


def doctor(device: str | torch.device | None = None) -> None:
    """Prints what is here, whether the engines agree with the plain loop, and how fast they are.

    It takes less than a minute, on the bundled digits; nothing is downloaded or kept. The text is
    meant to be pasted into a question.

    Args:
        device: as for `fit`; without it, the fastest there is.
    """
    chosen = pick_device(device)
    for line in (*_hardware(), *_data(), ""):
        print(line, flush=True)
    for each in dict.fromkeys((chosen, torch.device("cpu"))):
        for line in _engines(each, estimate=each == chosen):
            print(line, flush=True)


def _hardware() -> Iterator[str]:
    from normlab import __version__

    yield (
        f"normlab {__version__}, torch {torch.__version__}, torchvision {version('torchvision')}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    )
    cores = f"{joblib.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cores += f", {memory / GIB:.1f} GiB of memory"
    yield cores
    for number in range(torch.cuda.device_count()):
        free, size = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield f"GPU {number}: {name}, {free / GIB:.1f} of {size / GIB:.1f} GiB free, {_driver()}"
    if not torch.cuda.is_available():
        yield f"no NVIDIA GPU that torch sees (it is built for CUDA {torch.version.cuda})"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "driver unknown"
    return f"driver {done.stdout.split()[0]}"


def _data() -> Iterator[str]:
    for name, source in SOURCES.items():
        places = [place for place in data_roots() if source.is_in(place) or source.jpegs_in(place)]
        yield f"{name}: {places[0] if places else 'not here; it would be downloaded'}"
    folder = cache_folder()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    yield f"cache: {folder}, {cache_size() / GIB:.2f} GiB, {free / GIB:.1f} GiB free beside it"


def _engines(device: torch.device, *, estimate: bool) -> Iterator[str]:
    """A line for each network, and for one assignment how long it would take."""
    yield f"On {device}: images a second in training, plain loop and engine, on the digits"
    for name, assignment in ASSIGNMENTS.items():
        data = load_assignment_data(assignment, "digits")
        data = data if device.type == "cuda" else data.subset(train=320, test=64)
        try:
            with exact_float32(), torch.inference_mode(False), torch.enable_grad():
                plain, rate, verdict = _examined(assignment, data, device)
        except Exception as error:  # whatever it is, it is what the doctor is asked for
            yield f"  {name:14} fails: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        yield f"  {name:14} {plain:9,.0f} {rate:9,.0f}  {verdict}"
        if estimate and name == ESTIMATED:
            images = 3 * assignment.recipe.epochs * (IMAGES + TESTED / 3)  # a test goes one way
            text = f"  3 × {assignment.recipe.epochs} epochs of {name} on {IMAGES:,} images"
            last = (
                f"{text}: about {images / max(plain, rate):,.0f} s, an estimate from these speeds"
            )
    if estimate:
        yield last


def _examined(
    assignment: Assignment, data: Dataset, device: torch.device
) -> tuple[float, float, str]:
    """Images a second of the plain loop and of the engine taken here, and whether they agree."""
    norm, shape = assignment.variants[0].norm, data.input_shape
    recipe = assignment.recipe_for(assignment.variants[0], seed=0, epochs=EPOCHS)
    rates = []
    for choice in ("plain", "auto"):
        network = build_network(assignment.network, norm, dropout=0.0, input_shape=shape, seed=0)
        train = training_batches(data, recipe, device)
        tests = data.loader(False, 512, device=device)
        engine, _ = make_engine(choice, network.to(device), recipe, train, tests)
        problem = disagreement(engine) if choice == "auto" else ""
        with closing(engine):
            rates.append(_speed(engine) if not problem else rates[0])
    return *rates, problem or f"{engine.name} agrees with the plain loop"


def _speed(engine: PlainEngine) -> float:
    """Images a second in the quicker epoch."""
    if problem := engine.prepare():
        raise RuntimeError(problem)
    trained = [engine.do_epoch(epoch)[0] for epoch in range(EPOCHS)]
    return max(each.images / each.seconds for each in trained)
