"""Sweeps: norms × batch sizes × learning rates × seeds as independent runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from normlab.assignments import Assignment, Variant, find_assignment
from normlab.comparisons.report import csv_text, escaped, in_markdown, percent
from normlab.data import Dataset
from normlab.datasets.loading import load_assignment_data, load_images
from normlab.history import Run
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.identity import digest_of
from normlab.runs.jobs import Job, make_jobs, results_of, seed_numbers
from normlab.runs.processes import train
from normlab.support.checks import as_list, number, one_of, whole_number
from normlab.support.devices import pick_device
from normlab.support.files import remove_leftovers, user_path, write_text
from normlab.support.locks import locked, scratch_folder
from normlab.support.type_hints import DataFrame

MEASURED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
RESULTS = [*MEASURED, "seconds"]
# The columns, and of what kind each is.
KINDS = {
    **dict.fromkeys(("run", "variant", "norm"), str),
    **{"batch_size": int, "base_lr": float, "lr": float},
    **dict.fromkeys(("seed", "epochs", "parameters"), int),
    **dict.fromkeys(RESULTS, float),
}
COLUMNS = tuple(KINDS)
# What a row of a run that diverged, of which nothing else is kept, must have in common with it.
OF_THE_RUN = ["norm", "batch_size", "lr", "seed", "epochs", "parameters"]
TABLE = "sweep.csv"
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

    Returns a DataFrame with a row for each run and `sweeps.COLUMNS`, those of the last epoch;
    the accuracies and losses of a run whose loss diverged are NaN.
    """
    assignment, numbers = find_assignment(name), seed_numbers(seeds)
    wanted, device = device, pick_device(device)  # a worker picks its own
    swept = _combinations(assignment, norms, batch_sizes, lrs, scaling)
    sweep = replace(assignment, variants=tuple(variant for variant, _ in swept))
    bases = {variant.label: base for variant, base in swept}
    load = partial(load_assignment_data, assignment) if data is None else data
    if dask is not None and not callable(load):
        raise ValueError(
            "a cluster's workers load the images themselves: give data as a function, such as "
            "functools.partial(nl.load_dataset, 'mnist')"
        )
    data = load_images(load, assignment)
    with ExitStack() as stack:
        place = user_path(directory or stack.enter_context(scratch_folder()))
        cluster = workers = None
        if dask is not None:  # before files change
            from normlab.runs.cluster import connected

            cluster = stack.enter_context(connected(dask, load, data))
            workers = partial(cluster.train, wanted)
        jobs = make_jobs(sweep, data, numbers, epochs, place / "runs")
        jobs = [_in_own_folder(job.identified(data, device)) for job in jobs]
        table = SweepTable(jobs, bases, data, place / TABLE if directory else None, progress)
        if fresh:
            if cluster is not None:
                cluster.check_images()  # before runs are gone
            table.start_anew()
        left = table.take_finished(device, None if fresh else kept)
        left.sort(key=lambda job: job.recipe.batch_size)  # small ones take longest
        outcomes = train(left, jobs, data, device=device, progress=False, workers=workers)
        # A loss that diverges is a result of a sweep like any other.
        ended = results_of(outcomes, len(left), results=(Run, FloatingPointError))
        with closing(ended):
            for job, outcome in ended:
                table.add(job, outcome)
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


# --- the table --------------------------------------------------------------------------------


class SweepTable:
    """The rows of the runs that are done, in the order of the jobs, and the file that has them.

    Args:
        bases: of each variant's label that of the assignment's own, and the rate before scaling.
        file: may hold rows of other sweeps, which stay in it.
        show: whether to print a line for each run.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        bases: Mapping[str, tuple[str, float]],
        data: Dataset,
        file: Path | None,
        show: bool,
    ) -> None:
        self.jobs, self.data, self.file, self.show = jobs, data, file, show
        self._rows = {job.directory: _row(job, *bases[job.variant.label]) for job in jobs}
        self.runs = {row["run"] for row in self._rows.values()}  # the digests of all of them

    def start_anew(self) -> None:
        """Removes this sweep's rows from the file, and its runs; those of other sweeps stay.

        Raises `ValueError` if the file is no table of a sweep, `InUse` if one of the runs is being
        trained; then nothing is removed.
        """
        with locked(*self._rows, wait=False):
            self._write()  # first: a row whose run is gone would pass for done
            remove_runs(*self._rows)

    def take_finished(self, device: torch.device, kept: str | Path | None) -> list[Job]:
        """Takes the rows of finished runs, of those that diverged, and of `kept`.

        Returns the jobs left. The file's own rows are believed only of runs that diverged, since
        of these nothing else is kept; the others are what the files of their runs say, once those
        have been found whole.
        """
        there, here = _read(kept and user_path(kept)), self._read()
        left = []
        for job in self.jobs:
            run = self._rows[job.directory]["run"]
            if found := job.find(self.data, device):
                self._take(job, _last(found))
            elif run in here and self._has_diverged(job, here[run]):
                self._take(job, {})
            elif run in there:
                self._take(job, there[run])
            else:
                left.append(job)
        if self.show and len(left) < len(self.jobs):
            print(f"{len(self._done())} of {len(self.jobs)} runs are loaded, {len(left)} trained")
        self._write()
        return left

    def add(self, job: Job, outcome: Run | FloatingPointError) -> None:
        """Takes the row of a run that has just ended, or whose loss diverged, and says so."""
        if isinstance(outcome, Run):
            self._take(job, _last(outcome))
            said = f"{outcome.last['test_accuracy']:.2%} in {outcome.seconds:.0f} s"
        else:
            self._take(job, {})
            said = str(outcome).partition(": try")[0].removeprefix(f"{job.label}: ")
        if self.show:
            print(f"{len(self._done())} of {len(self.jobs)}: {job.label}: {said}", flush=True)
        self._write()

    def frame(self) -> DataFrame:
        """The rows so far, in the order of the jobs; its `attrs` say what the images are."""
        frame = _typed(self._done())
        frame.attrs["source"] = self.data.source
        return frame

    def _done(self) -> list[dict]:
        return [row for row in self._rows.values() if RESULTS[0] in row]

    def _take(self, job: Job, measured: Mapping[str, float]) -> None:
        """Results for a row, of which that of a run that diverged has none."""
        self._rows[job.directory] |= {name: measured.get(name, math.nan) for name in RESULTS}

    def _has_diverged(self, job: Job, row: dict) -> bool:
        """Whether a row of the file says so, and is that of this run."""
        own = self._rows[job.directory]
        return (
            math.isnan(row["test_accuracy"])
            and all(row[name] == own[name] for name in OF_THE_RUN)
            and RunFolder(job.directory).holds_no_other(job.identity)
        )

    def _read(self) -> dict[str, dict]:
        return _read(self.file if self.file is not None and self.file.is_file() else None)

    def _write(self) -> None:
        """This sweep's rows, then those of others: of a run that diverged, the row is all there is.

        The file is read each time, since another sweep may be writing to it as well.
        """
        if self.file is None:
            return
        with locked(self.file.parent):
            remove_leftovers(self.file.parent, of=self.file.name)
            others = [row for run, row in self._read().items() if run not in self.runs]
            write_text(self.file, csv_text(_typed([*self._done(), *others])))


def _row(job: Job, label: str, base_lr: float) -> dict:
    """What is known of a run before it is trained."""
    recipe = {name: getattr(job.recipe, name) for name in ("batch_size", "lr", "seed", "epochs")}
    about = {"run": digest_of(job.identity), "variant": label, "norm": job.variant.norm}
    return about | recipe | {"base_lr": base_lr, "parameters": job.identity["parameters"]}


def _last(run: Run) -> dict:
    """What a finished run has measured in its last epoch, and its seconds in all."""
    return run.last | {"seconds": run.seconds}


def _typed(rows: Sequence[dict]) -> DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(KINDS)


def _read(file: Path | None) -> dict[str, dict]:
    """The rows of a table by their runs; of runs that diverged the results are NaN.

    Raises `ValueError` that names what cannot have been written so.
    """
    import pandas

    if file is None:
        return {}
    try:
        with warnings.catch_warnings(action="error", category=pandas.errors.ParserWarning):
            table = pandas.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
        if missing := set(COLUMNS) - set(table):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        empty = {name: {"": "nan"} for name in RESULTS}
        table = table.replace(empty).astype(KINDS)[list(COLUMNS)]
        results, accuracies = table[RESULTS], table[["train_accuracy", "test_accuracy"]]
        whole = (results.ge(0) & results.lt(math.inf)).all(axis=1) & accuracies.le(1).all(axis=1)
        whole |= results.isna().all(axis=1)
        if not whole.all():
            raise ValueError(f"row {whole.argmin() + 1} is damaged")
    except (pandas.errors.ParserWarning, OverflowError, ValueError) as error:
        raise ValueError(
            f"{file} is no table of a sweep: {' '.join(str(error).split())}: mend it or delete it; "
            "rows of runs that are kept come back"
        ) from error
    return {row["run"]: row for row in table.to_dict("records")}


def summary_table(table: DataFrame) -> str:
    """A Markdown table: mean ± standard deviation over seeds for each combination."""
    rows = []
    for names, some in table.groupby(["variant", "batch_size", "lr"], sort=False):
        accuracy = some["test_accuracy"]
        row = {"test_accuracy": accuracy.mean(skipna=False), "sd": accuracy.std(skipna=False)}
        result = "diverged" if accuracy.isna().any() else percent(row)
        rows.append((escaped(names[0]), f"{names[1]}", f"{names[2]:g}", f"{len(some)}", result))
    head = ("variant", "batch size", "rate", "seeds", "test accuracy, last epoch (%)")
    return in_markdown(head, rows)
