"""The table of a sweep: a row for each run, in a file that grows as they finish."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.comparisons.report import csv_text, escaped, in_markdown, percent
from normlab.data import Dataset
from normlab.history import Run
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.identity import digest_of
from normlab.runs.jobs import Job
from normlab.support.files import remove_leftovers, user_path, write_text
from normlab.support.locks import locked

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
    """The rows of the runs that are done, in the order of the jobs, and the file that has them.

    Args:
        bases: of each variant's label that of the assignment's own, and the rate before scaling.
        file: may hold rows of other sweeps, which stay in it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        bases: Mapping[str, tuple[str, float]],
        data: Dataset,
        file: Path | None,
    ) -> None:
        self.jobs, self.data, self.file = jobs, data, file
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
        self._write()
        return left

    def add(self, job: Job, outcome: Run | FloatingPointError) -> str:
        """Takes the row of a run that has just ended, or whose loss diverged, and says so."""
        self._take(job, _last(outcome) if isinstance(outcome, Run) else {})
        self._write()
        if isinstance(outcome, Run):
            return f"{outcome.last['test_accuracy']:.2%} in {outcome.seconds:.0f} s"
        return str(outcome).partition(": try")[0].removeprefix(f"{job.label}: ")

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
