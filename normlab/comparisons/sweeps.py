"""Sweeps: norms × batch sizes × learning rates × seeds as independent runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.assignments import Assignment, Variant, find_assignment
from normlab.comparisons.sweep_tables import TABLE, SweepTable
from normlab.data import Dataset
from normlab.datasets.loading import load_assignment_data
from normlab.experiment import check_epochs, load_images, train
from normlab.history import Run
from normlab.runs.identity import digest_of
from normlab.runs.jobs import Job, make_jobs, seed_numbers, without_errors
from normlab.support.checks import as_list, number, one_of, whole_number
from normlab.support.devices import pick_device
from normlab.support.files import user_path
from normlab.support.locks import scratch_folder

if TYPE_CHECKING:
    from pandas import DataFrame

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
    assignment, numbers = find_assignment(name), seed_numbers(seeds)
    wanted, device = device, pick_device(device)  # a worker picks its own
    swept = _combinations(assignment, norms, batch_sizes, lrs, scaling)
    sweep = replace(assignment, variants=tuple(variant for variant, _ in swept))
    bases = {variant.label: base for variant, base in swept}
    check_epochs(sweep, epochs)
    load = partial(load_assignment_data, assignment) if data is None else data
    if dask is not None and not callable(load):
        raise ValueError(
            "a cluster's workers load the images themselves: give data as a function, such as "
            "functools.partial(nl.load_dataset, 'mnist')"
        )
    data = load_images(load)
    with ExitStack() as stack:
        place = user_path(directory or stack.enter_context(scratch_folder()))
        cluster = None
        if dask is not None:  # before files change
            from normlab.runs.cluster import connected

            cluster = stack.enter_context(connected(dask, load, data))
        jobs = make_jobs(sweep, data, numbers, epochs, place / "runs")
        jobs = [_in_own_folder(job.identified(data, device)) for job in jobs]
        table = SweepTable(jobs, bases, data, place / TABLE if directory else None)
        if fresh:
            table.start_anew()
        left = table.take_finished(device, None if fresh else kept)
        if progress and len(left) < len(jobs):
            done = len(jobs) - len(left)
            print(f"{done} of {len(jobs)} runs are loaded, {len(left)} trained")
        left.sort(key=lambda job: job.recipe.batch_size)  # small ones take longest
        workers = None if cluster is None else partial(cluster.train, wanted)
        outcomes = train(left, jobs, data, device=device, progress=False, workers=workers)
        # A loss that diverges is a result of a sweep like any other.
        ended = without_errors(outcomes, len(left), results=(Run, FloatingPointError))
        with closing(ended):
            for count, (job, outcome) in enumerate(ended, len(jobs) - len(left) + 1):
                said = table.add(job, outcome)
                if progress:
                    print(f"{count} of {len(jobs)}: {job.label}: {said}", flush=True)
                if after_each is not None:
                    after_each(table.frame())
        return table.frame()


def _in_own_folder(job: Job) -> Job:
    """The job with a folder that no other run has, whatever they differ in: sweeps may share.

    Another sweep may have given the same run another label.
    """
    name = f"{job.directory.name}-{digest_of(job.identity)}"
    there = sorted(job.directory.parents[1].glob(f"*/{name}"))
    return replace(job, directory=there[0] if there else job.directory.with_name(name))


def _combinations(
    assignment: Assignment,
    norms: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    lrs: Sequence[float] | None,
    scaling: str,
) -> list[tuple[Variant, tuple[str, float]]]:
    """The variants of a sweep; with each the assignment's own label, and its rate before scaling.

    Raises `ValueError` or `TypeError` that names what cannot be swept, or not here.
    """
    one_of(scaling, SCALINGS, "scaling of the rate")
    norms, sizes = _axis("norms", norms), _axis("batch_sizes", batch_sizes)
    rates = _axis("lrs", lrs)
    for size in sizes:
        whole_number(size, "each of batch_sizes")
    for rate in rates:
        number(rate, "each of lrs", positive=True)
    found = []
    for base in _variants_of(assignment, norms):
        recipe = assignment.recipe_for(base, seed=0)
        for size, lr in product(sizes or [recipe.batch_size], rates or [recipe.lr]):
            words = [base.label]
            words += [f"batch {size}"] if sizes else []
            words += [f"rate {lr:g}"] if rates else []
            scaled = lr * (size / recipe.batch_size) ** SCALINGS[scaling]
            changes = {**base.changes, "batch_size": size, "lr": scaled}
            variant = replace(base, label=", ".join(words), changes=changes)
            found.append((variant, (base.label, lr)))
    return found


def _axis(what: str, values: object) -> list:
    """The values of an axis; none if it is not given."""
    if values is None:
        return []
    values = as_list(values)
    if not values:
        raise ValueError(f"{what} is empty: that is a sweep without runs")
    if len(set(values)) < len(values):
        raise ValueError(f"{what} names a value twice: {', '.join(map(str, values))}")
    return values


def _variants_of(assignment: Assignment, norms: Sequence[str]) -> list[Variant]:
    found = [] if norms else list(assignment.variants)
    for norm in norms:
        made = assignment.variant_of(norm)
        found += [each for each in assignment.variants if each.norm == made.norm] or [made]
    return found
