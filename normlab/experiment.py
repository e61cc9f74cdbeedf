"""A whole assignment: all variants and seeds, those that are done already taken from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from normlab.assignments import Assignment, find_assignment
from normlab.data import Dataset
from normlab.datasets.loading import load_images
from normlab.engines.choice import ENGINES
from normlab.history import Run
from normlab.runs.folder import remove_runs
from normlab.runs.jobs import find_all, make_jobs, results_of, say_limits, seed_numbers
from normlab.runs.processes import train
from normlab.support.checks import one_of
from normlab.support.devices import pick_device
from normlab.support.files import user_path
from normlab.support.locks import scratch_folder
from normlab.support.type_hints import DataFrame


@dataclass(repr=False)
class Results(Mapping[str, list[Run]]):
    """The runs of an assignment: `results[label]` holds one for each seed."""

    assignment: Assignment
    data: Dataset
    runs: dict[str, list[Run]]

    def __getitem__(self, label: str) -> list[Run]:
        return self.runs[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return self.table().to_string(index=False)

    def table(self) -> DataFrame:
        """A pandas DataFrame, a row for each variant.

        `test_accuracy` is the mean over seeds of the last epoch's, a fraction, and `sd` its
        standard deviation (none for one seed). `best_accuracy` is the highest mean of any epoch,
        `best_epoch`: optimistic, since the test set picked it. `seconds` is the mean over seeds.
        """
        import pandas

        return pandas.DataFrame([self._row(label, runs) for label, runs in self.runs.items()])

    def _row(self, label: str, runs: list[Run]) -> dict:
        accuracy = np.array([[row["test_accuracy"] for row in run.history] for run in runs])
        by_epoch = accuracy.mean(0)
        return {
            # On a narrow terminal pandas leaves out the columns in the middle.
            "variant": label,
            "test_accuracy": by_epoch[-1],
            "sd": float(accuracy[:, -1].std(ddof=1)) if len(runs) > 1 else np.nan,
            "best_accuracy": by_epoch.max(),
            "best_epoch": int(by_epoch.argmax()) + 1,
            "parameters": runs[0].parameters,
            "seconds": float(np.mean([run.seconds for run in runs])),
            "seeds": len(runs),
        }


def run_assignment(
    name: str | Assignment,
    *,
    data: Dataset | Callable[[], Dataset] | None = None,
    seeds: int | Iterable[int] = 1,
    epochs: int | None = None,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    fresh: bool = False,
    engine: str = "auto",
    kept: str | Path | None = None,
) -> Results:
    """Trains every variant of an assignment with every seed and returns the `Results`.

    A GPU trains up to eight of them at once. A CPU trains them in processes of one thread each
    where that is quicker; they get the networks that are built here, with all that the session
    defined or changed. What cannot be sent to a process is trained in this one, with a warning.
    Where a loss diverges, the other runs are trained before that error is raised, if a directory
    keeps them.

    Args:
        name: one of `ASSIGNMENTS`, or an `Assignment` of one's own.
        data: the images, or a function that returns them; without it, the assignment's.
        seeds: how many (0, 1, …), or which.
        epochs: other than the recipe's.
        directory: where to keep the runs, in `<variant>/seed-0` and so on. Runs found there are
            loaded if they are finished, and go on if they were interrupted.
        device, progress, engine: as for `fit`.
        fresh: trains anew what `directory` holds already.
        kept: a folder like `directory` that is only read: its finished runs are taken where they
            are of the same network, recipe and data, and the others are trained as ever.
    """
    assignment, numbers, device = find_assignment(name), seed_numbers(seeds), pick_device(device)
    one_of(engine, ENGINES, "engine")
    data = load_images(data, assignment)
    with ExitStack() as stack:
        place = user_path(directory or stack.enter_context(scratch_folder()))
        jobs = make_jobs(assignment, data, numbers, epochs, place, None if fresh else kept)
        jobs = [job.identified(data, device) for job in jobs]
        if progress:
            say_limits(assignment, jobs)
        if fresh:
            remove_runs(*(job.directory for job in jobs))
        runs = find_all(jobs, data, device)
        left = [job for job in jobs if job.directory not in runs]
        if progress and runs:
            print(f"{len(runs)} of {len(jobs)} runs are loaded, {len(left)} trained")
        outcomes = train(left, jobs, data, device=device, progress=progress, engine=engine)
        with closing(results_of(outcomes, len(left), keep_going=bool(directory))) as trained:
            runs |= {job.directory: run for job, run in trained}
    results: dict[str, list[Run]] = {variant.label: [] for variant in assignment.variants}
    for job in jobs:
        run = runs[job.directory]
        run.directory = run.directory if directory else None
        results[job.variant.label].append(run)
    return Results(assignment, data, results)
