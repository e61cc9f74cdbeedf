"""A whole assignment: all variants and seeds, those that are done already taken from disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from normlab.assignments import Assignment, find_assignment
from normlab.data import Dataset
from normlab.datasets.loading import load_dataset
from normlab.engines.choice import ENGINES
from normlab.fitting import Job, fit_together, warn_if_at_chance
from normlab.history import Run
from normlab.model import NETWORKS
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.plans import (
    Plan,
    are_worth_processes,
    check_plans,
    in_flight,
    left_to_do,
    plan_runs,
    say_what_is_left,
    seed_numbers,
    with_kept,
)
from normlab.runs.processes import side_by_side, warn_others_go_on
from normlab.support.checks import check_instance, one_of
from normlab.support.devices import pick_device
from normlab.support.files import user_path
from normlab.support.locks import scratch_folder

if TYPE_CHECKING:
    from pandas import DataFrame


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

    def spread(self, label: str) -> float:
        """Standard deviation over seeds of the last epoch's test accuracy; NaN for one seed."""
        last = [run.last["test_accuracy"] for run in self.runs[label]]
        return float(np.std(last, ddof=1)) if len(last) > 1 else math.nan

    def _row(self, label: str, runs: list[Run]) -> dict:
        accuracy = np.array([[row["test_accuracy"] for row in run.history] for run in runs])
        by_epoch = accuracy.mean(0)
        return {
            # On a narrow terminal pandas leaves out the columns in the middle.
            "variant": label,
            "test_accuracy": by_epoch[-1],
            "sd": self.spread(label),
            "best_accuracy": by_epoch.max(),
            "best_epoch": int(by_epoch.argmax()) + 1,
            "parameters": runs[0].parameters,
            "seconds": float(np.mean([run.seconds for run in runs])),
            "seeds": len(runs),
        }


def load_assignment_data(
    assignment: Assignment,
    name: str | Path | None = None,
    root: str | Path | None = None,
    *,
    side: int | None = None,
) -> Dataset:
    """The assignment's data set, or the one called `name`, from `root` if it lies there.

    The bundled digits take the shape that the assignment's network is made for; `side` resizes
    the images of any data set, to as many channels as that network has.
    """
    name = name or assignment.dataset
    shape = NETWORKS[assignment.network].input_shape if assignment.network else (1, 28, 28)
    if side is not None:
        shape = (shape[0], side, side)
    elif name != "digits":
        shape = None
    return load_dataset(name, root, input_shape=shape)


def run_assignment(
    name: str | Assignment,
    *,
    data: Dataset | None = None,
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

    On a GPU up to eight of them are in flight together, those with dropout one by one; on a CPU
    they run side by side in processes of one thread each, where there is enough to do. These train
    the networks that `build` gives here, with what the session defined or changed; a network that
    cannot be sent to them is trained in this process, with a warning. Where a loss diverges, the
    other runs are trained before that error is raised, if a directory keeps them.

    Args:
        name: one of `ASSIGNMENTS`, or an `Assignment` of one's own.
        data: what to train and test on; without it, the assignment's data set is loaded.
        seeds: how many (0, 1, …), or which.
        epochs: other than the recipe's.
        directory: where to keep the runs, in `<variant>/seed-0` and so on. Runs found there are
            loaded if they are finished, and go on if they were interrupted.
        device, progress, engine: as for `fit`.
        fresh: trains anew what `directory` holds already.
        kept: a folder like `directory` that is only read: its finished runs are taken where they
            are of the same network, recipe and data, and the others are trained as ever.
    """
    assignment = find_assignment(name)
    numbers = seed_numbers(seeds)
    device = pick_device(device)
    one_of(engine, ENGINES, "engine")
    data = data if data is not None else load_assignment_data(assignment)
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    with ExitStack() as stack:
        place = user_path(directory or stack.enter_context(scratch_folder()))
        plans = plan_runs(assignment, numbers, epochs, place)
        check_plans(plans, data, device)
        if fresh:
            remove_runs(plan.directory for plan in plans)
        elif kept is not None:
            plans = with_kept(plans, place, user_path(kept), data, device)
        left = left_to_do(plans, data, device)
        if progress and len(left) < len(plans):
            say_what_is_left(len(left), len(plans))
        if device.type == "cpu" and engine == "auto":
            # Afterwards `_trained` finds them done.
            _train_side_by_side(plans, left, data, progress, keep_going=directory is not None)
        runs: dict[str, list[Run]] = {variant.label: [] for variant in assignment.variants}
        options = {"device": device, "progress": progress, "engine": engine}
        for plan, run in _trained(plans, data, keep_going=directory is not None, **options):
            run.directory = run.directory if directory else None
            runs[plan.variant.label].append(run)
    return Results(assignment, data, runs)


def _trained(
    plans: list[Plan], data: Dataset, *, device: torch.device, keep_going: bool, **options: object
) -> list[tuple[Plan, Run]]:
    """All plans with their runs, trained or found done here, a few at once."""
    trained, diverged = [], []
    for group in in_flight(plans, device):
        jobs = [plan.job(data) for plan in group]
        try:
            runs = fit_together(jobs, data, device=device, **options)
            trained += zip(group, runs, strict=True)
        except FloatingPointError as error:  # other errors may well be those of all
            if not keep_going:
                raise
            diverged.append(error)
            warn_others_go_on(error, group[-1] is not plans[-1])
    if diverged:
        raise diverged[0]
    return trained


def _train_side_by_side(
    plans: list[Plan], left: list[Plan], data: Dataset, progress: bool, *, keep_going: bool
) -> None:
    """Trains what is left in processes beside this one, if all plans together are worth it."""
    if left and are_worth_processes(plans, data):
        judge, options = partial(_judge, data), {"progress": progress, "keep_going": keep_going}
        side_by_side(_train, left, data, after_each=judge, train_here=_later, **options)


def _judge(data: Dataset, plan: Plan, _: object) -> None:
    """Says here what a process that trains beside others keeps to itself."""
    warn_if_at_chance(plan.label, RunFolder(plan.directory).history_so_far(), plan.recipe, data)


def _later(_: Job, __: Dataset) -> None:
    """What other processes cannot train is trained afterwards, like everything on a GPU."""


def _train(job: Job, data: Dataset) -> None:
    fit_together([job], data, device="cpu", progress=False)
