"""The table of a sweep: a row for each run, in a file that grows as they finish."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.comparisons.report import csv_text, escaped, in_markdown, percent
from normlab.data import Dataset
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.jobs import Job, find_runs
from normlab.support.files import remove_leftovers, user_path, write_text
from normlab.support.locks import locked
from normlab.support.summaries import count_parameters

if TYPE_CHECKING:
    from pandas import DataFrame

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


class SweepTable:
    """The rows of the runs that are done, in the order of the jobs, and the file that has them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        bases: Sequence[tuple[str, float]],
        data: Dataset,
        file: Path | None,
        show: bool,
        after_each: Callable[[DataFrame], object] | None,
    ) -> None:
        """`show` prints a line for each run; the rest is as for `run_sweep`.

        Args:
            jobs: for each seed, one for each of `bases`.
            bases: of each the label of the assignment's variant, and the rate before scaling.
            file: may hold rows of other sweeps, which stay in it.
        """
        self.data, self.file, self.show, self.after_each = data, file, show, after_each
        self.jobs, self.done = jobs, set()
        each = zip(jobs, cycle(bases), strict=False)
        self.rows = {job.directory: _row(job, data, *base) for job, base in each}

    @property
    def runs(self) -> set[str]:
        """The digests of all its runs."""
        return {row["run"] for row in self.rows.values()}

    def start_anew(self) -> None:
        """Removes this sweep's rows from the file, and its runs; those of other sweeps stay.

        Raises `ValueError` if the file is no table of a sweep, `InUse` if one of the runs is being
        trained; then nothing is removed.
        """
        # The rows first: one whose run is gone would pass for done.
        remove_runs(*self.rows, first=self._write)

    def take_finished(self, device: torch.device, kept: str | Path | None) -> list[Job]:
        """Takes the rows of finished runs, of those that diverged, and of `kept`.

        Returns the jobs left. The file's own rows are believed only of runs that diverged, since
        of these nothing else is kept; the others are what the files of their runs say, once those
        have been found whole.
        """
        there, here = _read(kept and user_path(kept)), self._read()
        left = []
        for job in self.jobs:
            run = self.rows[job.directory]["run"]
            if find_runs([job], self.data, device):
                self._set_results(job, _last(job))
            elif run in here and self._has_diverged(job, here[run]):
                self._set_results(job, {})
            elif run in there:
                self._set_results(job, there[run])
            else:
                left.append(job)
        if self.done and self.show:
            done = f"{len(self.done)} of {len(self.jobs)} runs are loaded"
            print(f"{done}, {len(left)} trained")
        self._write()
        return left

    def add(self, job: Job, outcome: object) -> None:
        """Takes the row of a run that has just ended, or whose loss diverged, and says so."""
        if isinstance(outcome, FloatingPointError):
            self._set_results(job, {})
            result = str(outcome).partition(": try")[0].removeprefix(f"{job.label}: ")
        else:
            row = self._set_results(job, _last(job))
            result = f"{row['test_accuracy']:.2%} in {row['seconds']:.0f} s"
        if self.show:
            print(f"{len(self.done)} of {len(self.jobs)}: {job.label}: {result}", flush=True)
        self._write()
        if self.after_each is not None:
            self.after_each(self.frame())

    def frame(self) -> DataFrame:
        """The rows so far, in the order of the jobs; its `attrs` say what the images are."""
        frame = _typed(self._own())
        frame.attrs["source"] = self.data.source
        return frame

    def _own(self) -> list[dict]:
        return [row for directory, row in self.rows.items() if directory in self.done]

    def _set_results(self, job: Job, measured: Mapping[str, float]) -> dict:
        """The row of a run with its results, of which one that diverged has none."""
        row = self.rows[job.directory]
        row |= {name: measured.get(name, math.nan) for name in RESULTS}
        self.done.add(job.directory)
        return row

    def _has_diverged(self, job: Job, row: dict) -> bool:
        """Whether a row of the file says so, and is that of this run."""
        own = self.rows[job.directory]
        identity = job.prepared(self.data, torch.device("cpu")).identity
        return (
            math.isnan(row["test_accuracy"])
            and all(row[name] == own[name] for name in OF_THE_RUN)
            and RunFolder(job.directory).holds_no_other(identity)
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
            write_text(self.file, csv_text(_typed([*self._own(), *others])))


def _row(job: Job, data: Dataset, label: str, base_lr: float) -> dict:
    """What is known of a run before it is trained."""
    recipe = {name: getattr(job.recipe, name) for name in ("batch_size", "lr", "seed", "epochs")}
    about = {"run": job.digest(data), "variant": label, "norm": job.variant.norm}
    return about | recipe | {"base_lr": base_lr, "parameters": count_parameters(job.build())}


def _last(job: Job) -> dict:
    """What a finished run has measured in its last epoch, and its seconds in all."""
    history = RunFolder(job.directory).finished_history()
    return history[-1] | {"seconds": sum(row["seconds"] for row in history)}


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
    except (pandas.errors.ParserWarning, ValueError) as error:
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
