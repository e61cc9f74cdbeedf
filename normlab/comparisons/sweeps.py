"""Sweeps: norms × batch sizes × learning rates × seeds as independent runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.assignments import Assignment, Variant, find_assignment
from normlab.comparisons.sweep_tables import TABLE, Cell, SweepTable
from normlab.data import Dataset
from normlab.experiment import load_assignment_data
from normlab.fitting import Job, fit_together, is_done
from normlab.runs.folder import RunFolder
from normlab.runs.plans import (
    Plan,
    are_worth_processes,
    check_plans,
    in_flight,
    plan_runs,
    seed_numbers,
)
from normlab.runs.processes import AfterEach, side_by_side
from normlab.support.checks import as_list, check_instance, number, one_of, whole_number
from normlab.support.devices import pick_device
from normlab.support.files import user_path
from normlab.support.locks import scratch_folder

if TYPE_CHECKING:
    from pandas import DataFrame

    from normlab.runs.cluster import Cluster

SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # the power of batch size in the rate


def run_sweep(
    name: str | Assignment,
    *,
    norms: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    lrs: Sequence[float] | None = None,
    scaling: str = "none",
    seeds: int | Iterable[int] = 1,
    epochs: int | None = None,
    data: Dataset | Callable[[], Dataset] | None = None,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    fresh: bool = False,
    kept: str | Path | None = None,
    dask: str | None = None,
    after_each: Callable[[DataFrame], object] | None = None,
) -> DataFrame:
    """Trains an assignment's network with every norm, batch size, rate and seed; returns a table.

    Args:
        name: one of `ASSIGNMENTS`, or an `Assignment` of one's own.
        norms: which; the assignment's variants of these norms are taken, and a variant is made for
            one that it lacks. Without it, all its variants.
        batch_sizes, lrs: the values to try, or one; without them, the recipe's.
        scaling: how the rate follows the batch size: "none", "sqrt" or "linear" multiply it by
            the 0th, 1/2th or 1st power of batch size / the recipe's batch size.
        seeds: how many (0, 1, …), or which.
        epochs: other than the recipe's, and the same for all: so all see as many images.
        data: the images, or a function that returns them; without it, the assignment's.
        directory: where to keep `sweep.csv`, which grows as runs finish, and these, in folders
            that end in the table's "run". Runs found there are not trained again; interrupted ones
            go on. Other sweeps may be kept there too. A row whose run is lost counts only if
            that diverged.
        device, progress: as for `fit`; there is a line for each run.
        fresh: trains anew those of this sweep's runs that `directory` holds already.
        kept: a `sweep.csv` whose rows are taken as they are for the same network, recipe and
            images, as far as layers, source and weights tell: it holds no logits.
        dask: address of a Dask scheduler whose workers train; `data` must then be a function,
            which they call, or left out.
        after_each: is called with the table so far when a run is finished.

    Returns a DataFrame with a row for each run and `sweep_tables.COLUMNS`, those of the last epoch;
    the accuracies and losses of a run whose loss diverged are NaN.
    """
    assignment = find_assignment(name)
    wanted, device = device, pick_device(device)  # a worker picks its own
    cells = list(_cells(assignment, norms, batch_sizes, lrs, scaling))
    load, data = _images(data, assignment, for_workers=dask is not None)
    with ExitStack() as stack:
        place = user_path(directory or stack.enter_context(scratch_folder()))
        cluster = stack.enter_context(_cluster(dask)) if dask else None  # before files change
        sweep = replace(assignment, variants=tuple(cell.variant for cell in cells))
        plans = plan_runs(sweep, seed_numbers(seeds), epochs, place / "runs")
        check_plans(plans, data, device)
        plans = [_in_own_folder(plan, data, device) for plan in plans]
        file = place / TABLE if directory else None
        table = SweepTable(plans, cells, data, file, progress, after_each)
        if cluster is not None:
            cluster.check_size(load)
        if fresh:
            _start_anew(table, cluster, load)
        left = table.take_what_is_done(device, None if fresh else kept)
        left.sort(key=lambda plan: plan.recipe.batch_size)  # small ones take longest
        if cluster is not None and left:
            cluster.train(partial(_attempt, device=wanted), left, load, data, table.add)
        elif left:
            _train_each(plans, left, data, device, table.add)
        if cluster is not None:
            with suppress(OSError):  # the sweep is complete, even if its scheduler has gone
                cluster.forget(table.digests.values())  # and what came home before this call
        return table.frame()


def _in_own_folder(plan: Plan, data: Dataset, device: torch.device) -> Plan:
    """The plan with a folder that no other run has, whatever they differ in: sweeps may share.

    One that is named by the seed alone, as they once were, is taken if it holds this very run.
    """
    with suppress(ValueError):  # it holds another one
        is_here = is_done(plan.job(data), data, device)
        if is_here or RunFolder(plan.directory).history_so_far():
            return plan
    name = f"{plan.directory.name}-{plan.digest(data)}"
    own = plan.directory.with_name(name)
    if not own.is_dir():  # another sweep may have given the same run another label
        elsewhere = plan.directory.parents[1].glob(f"*/{name}")
        own = next((place for place in elsewhere if RunFolder(place).is_finished()), own)
    return replace(plan, directory=own)


def _images(
    data: Dataset | Callable[[], Dataset] | None, assignment: Assignment, *, for_workers: bool
) -> tuple[Callable[[], Dataset] | None, Dataset]:
    """The images, and the function that gives them, which a cluster's workers must have."""
    data = partial(load_assignment_data, assignment) if data is None else data
    load = data if callable(data) else None
    if for_workers and load is None:
        raise ValueError(
            "a cluster's workers load the images themselves: give data as a function, such as "
            "functools.partial(nl.load_dataset, 'mnist')"
        )
    data = load() if load else data
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    return load, data


def _cluster(address: str) -> Cluster:
    from normlab.runs.cluster import Cluster

    return Cluster(address)


def _start_anew(
    table: SweepTable, cluster: Cluster | None, load: Callable[[], Dataset] | None
) -> None:
    """Removes the sweep's runs here and at the workers, once it is known that these can train."""
    if cluster is not None:
        cluster.check_images(load, table.data)
        cluster.forget(table.digests.values())
    table.start_anew()


def _cells(
    assignment: Assignment,
    norms: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    lrs: Sequence[float] | None,
    scaling: str,
) -> Iterator[Cell]:
    norms, batch_sizes, lrs = check_axes(assignment, norms, batch_sizes, lrs, scaling)
    power = SCALINGS[scaling]
    for base in _bases(assignment, norms):
        recipe = assignment.recipe_for(base, seed=0)
        for size, lr in product(batch_sizes or [recipe.batch_size], lrs or [recipe.lr]):
            words = [base.label]
            words += [f"batch {size}"] if batch_sizes else []
            words += [f"rate {lr:g}"] if lrs else []
            scaled = lr * (size / recipe.batch_size) ** power
            changes = {**base.changes, "batch_size": size, "lr": scaled}
            variant = replace(base, label=", ".join(words), changes=changes)
            yield Cell(variant, base.label, lr)


def check_axes(
    assignment: Assignment,
    norms: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    lrs: Sequence[float] | None,
    scaling: str,
) -> tuple[list | None, ...]:
    """Norms, batch sizes and rates as lists, those that are given.

    Raises `ValueError` or `TypeError` that names what cannot be swept, or not here.
    """
    one_of(scaling, SCALINGS, "scaling of the rate")
    given = {"norms": norms, "batch_sizes": batch_sizes, "lrs": lrs}
    axes = {what: None if each is None else as_list(each) for what, each in given.items()}
    _bases(assignment, axes["norms"])
    for each in axes["batch_sizes"] or ():
        whole_number(each, "each of batch_sizes")
    for each in axes["lrs"] or ():
        number(each, "each of lrs", positive=True)
    for what, values in axes.items():
        if values == []:
            raise ValueError(f"{what} is empty: that is a sweep without runs")
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"{what} names a value twice: {', '.join(map(str, values))}")
    return tuple(axes.values())


def _bases(assignment: Assignment, norms: Sequence[str] | None) -> list[Variant]:
    if norms is None:
        return list(assignment.variants)
    found = []
    for norm in norms:
        made = assignment.variant_of(norm)
        found += [each for each in assignment.variants if each.norm == made.norm] or [made]
    return found


def _train_each(
    plans: list[Plan],
    left: Sequence[Plan],
    data: Dataset,
    device: torch.device,
    after_each: AfterEach,
) -> None:
    """Those that are left, side by side in processes or a few at once here.

    All plans decide which, so that a sweep that goes on has as many threads as before.
    """
    if device.type == "cpu" and are_worth_processes(plans, data):
        attempt = partial(_attempt, device="cpu")
        side_by_side(attempt, left, data, progress=False, after_each=after_each)
        return
    for group in in_flight(left, device):
        _train_here(group, data, device, after_each)


def _attempt(job: Job, data: Dataset, device: str | torch.device | None) -> str | None:
    """Trains; a loss that diverges is a result of a sweep like any other, and is returned."""
    try:
        fit_together([job], data, device=device, progress=False)
    except FloatingPointError as error:
        return str(error).partition(": try")[0].removeprefix(f"{job.label}: ")
    return None


def _train_here(
    plans: Sequence[Plan], data: Dataset, device: torch.device, after_each: AfterEach
) -> None:
    """Trains several at once; where one diverges, the others go on by themselves."""
    problems: list[str | None] = [None] * len(plans)
    try:
        fit_together([plan.job(data) for plan in plans], data, device=device, progress=False)
    except FloatingPointError:
        problems = [_attempt(plan.job(data), data, device) for plan in plans]
    for plan, problem in zip(plans, problems, strict=True):
        after_each(plan, problem)
