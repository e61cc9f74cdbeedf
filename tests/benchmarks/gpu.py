"""How long the assignments take on a GPU, and how much quicker several trainings at once are.

    python -m tests.benchmarks.gpu --data-root DATA --out gpu.json

The first part is what records are told of: three networks, 20 epochs, a test after each, in
batches of 128 and as shipped, from the images in memory to the finished comparison. The second
trains 1, 4, 8 and 16 copies of one network at once for two epochs, and counts the epochs a second
of the last one alone, so that what is done once, such as capturing steps, is left out.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

import normlab as nl
from normlab.datasets.loading import load_assignment_data
from normlab.runs.jobs import Job
from normlab.runs.trainer import fit_each
from normlab.support.files import write_json


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--assignment", default="cifar10-norms")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="*", default=(128, 64))
    parser.add_argument("--at-once", type=int, nargs="*", default=(1, 4, 8, 16))
    parser.add_argument("--data-root")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    assignment = nl.ASSIGNMENTS[options.assignment]
    data = load_assignment_data(assignment, root=options.data_root)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "images": len(data.train_images),
        "three networks": {},
        "epochs a second": {},
    }
    for batch_size, dtype in itertools.product(options.batches, ("float32", "bfloat16")):
        name = f"batches of {batch_size}, {dtype}"
        changes = {"batch_size": batch_size, "dtype": dtype}
        report["three networks"][name] = _three(assignment, data, options.epochs, changes)
        print(name, report["three networks"][name], flush=True)
    for count in options.at_once:
        report["epochs a second"][count] = _epochs_a_second(assignment, data, count)
        print(count, "at once:", report["epochs a second"][count], flush=True)
    if options.out:
        write_json(options.out, report)


def _three(assignment: nl.Assignment, data: nl.Dataset, epochs: int, changes: dict) -> dict:
    """Seconds of BN, GN and LN together, whole and without the first epoch's preparation."""
    recipe = assignment.recipe.replace(**changes)
    variants = tuple(v for v in assignment.variants if v.norm in ("bn", "gn", "ln"))[:3]
    started = time.perf_counter()
    results = nl.run_assignment(
        replace(assignment, variants=variants, recipe=recipe),
        data=data,
        epochs=epochs,
        device="cuda",
        progress=False,
    )
    seconds = time.perf_counter() - started
    runs = [run for (run,) in results.runs.values()]
    return {
        "seconds": round(seconds, 2),
        "of the first epochs": [round(run.history[0]["seconds"], 2) for run in runs],
        "of the last epochs": [round(run.history[-1]["seconds"], 3) for run in runs],
        "accuracy": [run.last["test_accuracy"] for run in runs],
        "engines": [run.config["from"]["engine"] for run in runs],
    }


def _epochs_a_second(assignment: nl.Assignment, data: nl.Dataset, count: int) -> float:
    """Of `count` copies of the assignment's first network that are trained at once."""
    recipe = assignment.recipe.replace(epochs=3)
    jobs = [
        Job(lambda: nl.build_network(assignment.network, "bn", dropout=0.0, seed=0), recipe)
        for _ in range(count)
    ]
    options = {"device": "cuda", "progress": False, "engine": "untried"}
    runs = dict(fit_each(jobs, data, at_once=count, **options))
    for run in runs.values():
        if isinstance(run, Exception):
            raise run
    return round(count / max(run.history[-1]["seconds"] for run in runs.values()), 2)


if __name__ == "__main__":
    main()
