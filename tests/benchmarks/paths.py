"""One measurement in a process of its own: `python -m tests.benchmarks.paths '{"path": …}'`.

Prints a JSON line with the data set, the images trained on, the seconds and the peak memory.
Imports and the reading of the data set from its cache file are not counted; all else is: making
the loaders, training, a test after every epoch, histories, and starting processes with what those
import.
"""

import contextlib
import importlib
import io
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from joblib.externals.loky import get_reusable_executor

import normlab as nl
from normlab.assignments import find_assignment
from normlab.datasets.loading import load_assignment_data
from normlab.runs.jobs import build_variant
from tests.benchmarks import peers

OURS = ("normlab", "normlab as shipped", "normlab plain")
PEERS = {
    "students' loop, 0 workers": (peers.students_loop, 0),
    "students' loop, 2 workers": (peers.students_loop, 2),
    "Lightning": (peers.lightning, 0),
    "fastai": (peers.fastai, 0),
}
PATHS = (*PEERS, *OURS)
UNITS_A_MIB = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, else KiB


def measure(job: dict) -> dict:
    """Trains the variants that `job` names along its path; see `__main__` for the fields."""
    assignment = find_assignment(job["assignment"])
    wanted = [v for v in assignment.variants if v.label in job["variants"]]
    shipped = job["path"] == "normlab as shipped"
    recipe = assignment.recipe if shipped else peers.recipe(assignment.recipe.augment)
    recipe = recipe.replace(epochs=job["epochs"])
    dropout = assignment.dropout if shipped else job["dropout"]
    assignment = nl.Assignment(
        **vars(assignment) | {"variants": tuple(wanted), "recipe": recipe, "dropout": dropout}
    )
    data = load_assignment_data(assignment, root=job["data_root"])
    source = data.source
    if job["images"]:
        data = data.subset(train=job["images"], test=job["images"] // 5)
    _ = data.mean
    # Optimisers import the first at their first use, in 2 to 3 s.
    for module in ("torch._dynamo", *peers.MODULES.get(job["path"], ())):
        importlib.import_module(module)
    train = _train_ours if job["path"] in OURS else _train_peers
    start = time.perf_counter()
    train(assignment, data, job)
    seconds = time.perf_counter() - start
    images = len(data.train_images) * job["epochs"] * len(wanted) * job["seeds"]
    return {"source": source, "images": images, "seconds": seconds, "peak_mib": _peak_memory()}


def _train_ours(assignment: nl.Assignment, data: nl.Dataset, job: dict) -> None:
    engine = "plain" if job["path"] == "normlab plain" else "auto"
    with tempfile.TemporaryDirectory() as folder:
        nl.run_assignment(
            assignment,
            data=data,
            seeds=job["seeds"],
            directory=Path(folder),
            device=job["device"],
            progress=False,
            engine=engine,
        )


def _train_peers(assignment: nl.Assignment, data: nl.Dataset, job: dict) -> None:
    train, workers = PEERS[job["path"]]
    for variant in assignment.variants:
        network = build_variant(assignment, variant, data, seed=0)
        l1 = variant.changes.get("l1", 0.0)
        done = train(network, data, job["epochs"], job["device"], workers=workers, l1=l1)
        list(done or ())  # the students' loop hands out its epochs one by one


def _peak_memory() -> float:
    """MiB of the largest process, this one or one that it started and that has ended."""
    get_reusable_executor().shutdown(wait=True)  # what joblib keeps for the next call
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(one.ru_maxrss for one in usage) / UNITS_A_MIB


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        result = measure(json.loads(sys.argv[1]))
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        result["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(result))
