"""Sweeps: norms × batch sizes × learning rates × seeds as independent runs, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from normlab.assignments import Assignment, Variant, find_assignment
from normlab.checks import instance, number, one_of, whole_number
from normlab.data import Dataset
from normlab.devices import pick_device
from normlab.experiment import load_assignment_data
from normlab.files import write_text
from normlab.fitting import fit_together
from normlab.norms import norm_name
from normlab.parallel import AfterEach, side_by_side
from normlab.plans import Plan, are_worth_processes, left_to_do, plan_runs, seed_numbers
from normlab.report import percent
from normlab.runs import RunFolder, remove_run
from normlab.summaries import count_parameters

if TYPE_CHECKING:
    from pandas import DataFrame

    from normlab.cluster import Cluster

COLUMNS = (
    "run",
    "variant",
    "norm",
    "batch_size",
    "base_lr",
    "lr",
    "seed",
    "epochs",
    "parameters",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
)
MEASURED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # the power of batch size in the rate
TABLE = "sweep.csv"

# Trainings in flight at once on a GPU, each of which holds the memory of its own captured steps.
TOGETHER = 8


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
        batch_sizes, lrs: the values to try; without them, the recipe's.
        scaling: how the rate follows the batch size: "none", "sqrt" or "linear" multiply it by
            the 0th, 1/2th or 1st power of batch size / the recipe's batch size.
        seeds: how many (0, 1, …), or which.
        epochs: other than the recipe's, and the same for all: so all see as many images.
        data: the images, or a function that returns them; without it, the assignment's.
        directory: where to keep the runs and `sweep.csv`, which grows as they finish. Runs found
            there are not trained again; interrupted ones go on.
        device, progress: as for `fit`; there is a line for each run.
        fresh: trains anew what `directory` holds already.
        kept: a `sweep.csv` whose rows are taken for the same network, recipe and images.
        dask: address of a Dask scheduler whose workers train; `data` must then be a function,
            which they call, or left out.
        after_each: is called with the table so far when a run is finished.

    Returns a DataFrame with a row for each run and the columns `COLUMNS`, those of the last epoch;
    the accuracies and losses of a run whose loss diverged are NaN.
    """
    assignment = find_assignment(name)
    wanted, device = device, pick_device(device)  # a worker picks its own
    load = data if callable(data) else None if data is not None else _Loader(assignment)
    if dask is not None and load is None:
        raise ValueError(
            "a cluster's workers load the images themselves: give data as a function, such as "
            "functools.partial(nl.load_dataset, 'mnist')"
        )
    cells = list(_cells(assignment, norms, batch_sizes, lrs, scaling))
    data = load() if load else data
    instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    with ExitStack() as stack:
        place = Path(directory or stack.enter_context(TemporaryDirectory(prefix="normlab-")))
        cluster = stack.enter_context(_cluster(dask)) if dask else None  # before files change
        sweep = replace(assignment, variants=tuple(cell.variant for cell in cells))
        plans = plan_runs(sweep, seed_numbers(seeds), epochs, place / "runs")
        if fresh:
            for plan in plans:
                remove_run(plan.directory)
        file = place / TABLE if directory else None
        table = _Table(plans, cells, data, file, progress, after_each)
        left = table.take_what_is_done(device, [] if fresh else [kept, file])
        left.sort(key=lambda plan: plan.recipe.batch_size)  # small ones take longest
        if cluster is not None and left:
            cluster.train(partial(_attempt, device=wanted), left, load, data, table.add)
        elif left:
            _train_each(left, data, device, table.add)
        return table.frame()


def _cluster(address: str) -> Cluster:
    from normlab.cluster import Cluster

    return Cluster(address)


@dataclass(frozen=True)
class _Loader:
    """Loads an assignment's data set, here or on a worker."""

    assignment: Assignment

    def __call__(self) -> Dataset:
        return load_assignment_data(self.assignment)


@dataclass(frozen=True)
class _Cell:
    """A variant of the sweep, the label of the assignment's own, and its rate before scaling."""

    variant: Variant
    label: str
    base_lr: float


def _cells(
    assignment: Assignment,
    norms: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    lrs: Sequence[float] | None,
    scaling: str,
) -> Iterator[_Cell]:
    check_axes(assignment, norms, batch_sizes, lrs, scaling)
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
            yield _Cell(variant, base.label, lr)


def check_axes(
    assignment: Assignment,
    norms: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    lrs: Sequence[float] | None,
    scaling: str,
) -> None:
    """Raises `ValueError` or `TypeError` that names what cannot be swept."""
    one_of(scaling, SCALINGS, "scaling of the rate")
    _bases(assignment, norms)
    for what, values in (("norms", norms), ("batch_sizes", batch_sizes), ("lrs", lrs)):
        if values is not None and not len(values):
            raise ValueError(f"{what} is empty: that is a sweep without runs")
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"{what} names a value twice: {', '.join(map(str, values))}")
    for each in batch_sizes or ():
        whole_number(each, "each of batch_sizes")
    for each in lrs or ():
        number(each, "each of lrs", positive=True)


def _bases(assignment: Assignment, norms: Sequence[str] | None) -> list[Variant]:
    if norms is None:
        return list(assignment.variants)
    found = []
    for norm in norms:
        norm = norm_name(norm) if assignment.build is None else norm
        there = [variant for variant in assignment.variants if variant.norm == norm]
        found += there or [Variant(norm.upper() if len(norm) < 4 else norm, norm)]
    return found


def summary_table(table: DataFrame) -> str:
    """A Markdown table: mean ± standard deviation over seeds for each combination."""
    lines = [
        "| variant | batch size | rate | seeds | test accuracy, last epoch (%) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for names, rows in table.groupby(["variant", "batch_size", "lr"], sort=False):
        accuracy = rows["test_accuracy"]
        row = {"test_accuracy": accuracy.mean(skipna=False), "sd": accuracy.std(skipna=False)}
        result = "diverged" if math.isnan(row["test_accuracy"]) else percent(row)
        cells = (names[0], f"{names[1]}", f"{names[2]:g}", f"{len(rows)}", result)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class _Table:
    """The rows of the runs that are done, in the order of the plans, and the file that has them."""

    def __init__(
        self,
        plans: Sequence[Plan],
        cells: Sequence[_Cell],
        data: Dataset,
        file: Path | None,
        show: bool,
        after_each: Callable[[DataFrame], object] | None,
    ) -> None:
        self.plans, self.data, self.file = plans, data, file
        self.cells = {cell.variant.folder: cell for cell in cells}
        self.digests = {plan.directory: plan.digest(data) for plan in plans}
        self.rows: dict[str, dict] = {}
        self.show, self.after_each = show, after_each

    def take_what_is_done(
        self, device: torch.device, tables: Sequence[str | Path | None]
    ) -> list[Plan]:
        """Takes the rows of earlier tables and of finished runs; returns the plans left to do."""
        measured: dict[str, dict] = {}
        for file in tables:
            if file is not None and (file != self.file or self.file.is_file()):
                measured |= _read_rows(Path(file))
        others = []
        for plan in self.plans:
            row = measured.get(self.digests[plan.directory])
            if row is None:
                others.append(plan)
            else:
                self._fill(plan, {name: row[name] for name in (*MEASURED, "seconds")})
        left = left_to_do(others, self.data, device)
        for plan in others:
            if plan not in left:
                self._fill(plan, _last(plan))
        if self.rows and self.show:
            print(f"{len(self.rows)} of {len(self.plans)} runs are loaded, {len(left)} trained")
        self._write()
        return left

    def add(self, plan: Plan, problem: object) -> None:
        """Takes the row of a run that has just ended, and says so."""
        self._fill(plan, _last(plan) if problem is None else dict.fromkeys(MEASURED, math.nan))
        if self.show:
            row = self.rows[self.digests[plan.directory]]
            result = problem or f"{row['test_accuracy']:.2%} in {row['seconds']:.0f} s"
            print(f"{len(self.rows)} of {len(self.plans)}: {plan.label}: {result}", flush=True)
        self._write()
        if self.after_each is not None:
            self.after_each(self.frame())

    def _fill(self, plan: Plan, measured: dict) -> None:
        recipe, cell = plan.recipe, self.cells[plan.variant.folder]
        digest = self.digests[plan.directory]
        values = {
            "run": digest,
            "variant": cell.label,
            "norm": plan.variant.norm,
            "base_lr": cell.base_lr,
            "parameters": count_parameters(plan.job(self.data).network),
            **{name: getattr(recipe, name) for name in ("batch_size", "lr", "seed", "epochs")},
            "seconds": math.nan,
            **measured,
        }
        self.rows[digest] = {name: values[name] for name in COLUMNS}

    def frame(self) -> DataFrame:
        """The rows so far, in the order of the plans."""
        import pandas

        digests = (self.digests[plan.directory] for plan in self.plans)
        rows = [self.rows[digest] for digest in digests if digest in self.rows]
        return pandas.DataFrame(rows, columns=list(COLUMNS))

    def _write(self) -> None:
        if self.file is not None:
            write_text(self.file, self.frame().to_csv(index=False))


def _last(plan: Plan) -> dict:
    """What a finished run has measured in its last epoch, and its seconds in all."""
    history = RunFolder(plan.directory).history_so_far()
    if not history:
        raise ValueError(f"{plan.directory} has lost its history.csv: delete it and run again")
    last = {name: history[-1][name] for name in MEASURED}
    return last | {"seconds": sum(row["seconds"] for row in history)}


def _read_rows(file: Path) -> dict[str, dict]:
    """The rows of a table by their runs' digests; those of runs that diverged are NaN."""
    import pandas

    try:
        rows = pandas.read_csv(file, dtype={"run": str}, keep_default_na=False, na_values=[""])
        return {row["run"]: row for row in rows[list(COLUMNS)].to_dict("records")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is no table of a sweep: {error}") from error


def _train_each(
    plans: Sequence[Plan], data: Dataset, device: torch.device, after_each: AfterEach
) -> None:
    """Side by side in processes or a few at once here, whichever is quicker."""
    if device.type == "cpu" and are_worth_processes(plans, data):
        attempt = partial(_attempt, device="cpu")
        side_by_side(attempt, plans, data, progress=False, after_each=after_each)
        return
    size = TOGETHER if device.type == "cuda" else 1
    for start in range(0, len(plans), size):
        _train_here(plans[start : start + size], data, device, after_each)


def _attempt(plan: Plan, data: Dataset, device: str | torch.device | None) -> str | None:
    """Trains; a loss that diverges is a result of a sweep like any other, and is returned."""
    try:
        fit_together([plan.job(data)], data, device=device, progress=False)
    except FloatingPointError as error:
        return str(error).partition(": try")[0].removeprefix(f"{plan.label}: ")
    return None


def _train_here(
    plans: Sequence[Plan], data: Dataset, device: torch.device, after_each: AfterEach
) -> None:
    """Trains several at once; where one diverges, the others go on by themselves."""
    problems: list[str | None] = [None] * len(plans)
    try:
        fit_together([plan.job(data) for plan in plans], data, device=device, progress=False)
    except FloatingPointError:
        problems = [_attempt(plan, data, device) for plan in plans]
    for plan, problem in zip(plans, problems, strict=True):
        after_each(plan, problem)
