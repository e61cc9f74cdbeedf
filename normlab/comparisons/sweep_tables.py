"""The table of a sweep: a row for each run, in a file that grows as they finish."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.assignments import Variant
from normlab.comparisons.report import csv_text, escaped, percent
from normlab.data import Dataset
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.jobs import Job, left_to_do, say_what_is_left
from normlab.support.files import remove_leftovers, user_path, write_text
from normlab.support.locks import locked
from normlab.support.summaries import count_parameters

if TYPE_CHECKING:
    from pandas import DataFrame

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
OF_RECIPE = ("batch_size", "lr", "seed", "epochs")
TABLE = "sweep.csv"


@dataclass(frozen=True)
class Cell:
    """A variant of a sweep, the label of the assignment's own, and its rate before scaling."""

    variant: Variant
    label: str
    base_lr: float


class SweepTable:
    """The rows of the runs that are done, in the order of the jobs, and the file that has them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        cells: Sequence[Cell],
        data: Dataset,
        file: Path | None,
        show: bool,
        after_each: Callable[[DataFrame], object] | None,
    ) -> None:
        """`show` prints a line for each run; the rest is as for `run_sweep`.

        `file` may hold rows of other sweeps, which stay in it.
        """
        self.jobs, self.data, self.file = jobs, data, file
        self.cells = {cell.variant.folder: cell for cell in cells}
        self.digests = {job.directory: job.digest(data) for job in jobs}
        self.rows: dict[str, dict] = {}
        self.show, self.after_each = show, after_each

    def start_anew(self) -> None:
        """Removes this sweep's rows from the file, and its runs; those of other sweeps stay.

        Raises `ValueError` if the file is no table of a sweep, `InUse` if one of the runs is being
        trained; then nothing is removed.
        """
        # The rows first: one whose run is gone would pass for done.
        remove_runs((job.directory for job in self.jobs), first=self._write)

    def take_what_is_done(self, device: torch.device, kept: str | Path | None) -> list[Job]:
        """Takes the rows of finished runs, of those that diverged, and of `kept`.

        Returns the jobs left. The file's own rows are believed only of runs that diverged, since
        of these nothing else is kept; the others are what the files of their runs say, once those
        have been found whole.
        """
        there, here = {} if kept is None else _read_rows(user_path(kept)), self._rows_in_file()
        left = []
        for job in self.jobs:
            digest = self.digests[job.directory]
            row = there.get(digest)
            if not left_to_do([job], self.data, device):
                self._fill(job, _last(job))
            elif digest in here and self._has_diverged(job, here[digest]):
                self._fill(job, dict.fromkeys(MEASURED, math.nan))
            elif row is not None:
                self._fill(job, {name: row[name] for name in (*MEASURED, "seconds")})
            else:
                left.append(job)
        if self.rows and self.show:
            say_what_is_left(len(left), len(self.jobs))
        self._write()
        return left

    def add(self, job: Job, outcome: object) -> None:
        """Takes the row of a run that has just ended, or whose loss diverged, and says so."""
        diverged = isinstance(outcome, FloatingPointError)
        self._fill(job, dict.fromkeys(MEASURED, math.nan) if diverged else _last(job))
        if self.show:
            row = self.rows[self.digests[job.directory]]
            result = f"{row['test_accuracy']:.2%} in {row['seconds']:.0f} s"
            if diverged:
                result = str(outcome).partition(": try")[0].removeprefix(f"{job.label}: ")
            print(f"{len(self.rows)} of {len(self.jobs)}: {job.label}: {result}", flush=True)
        self._write()
        if self.after_each is not None:
            self.after_each(self.frame())

    def _has_diverged(self, job: Job, row: dict) -> bool:
        """Whether a row of the file says so, and is that of this job."""
        what = job.prepared(self.data, torch.device("cpu")).identity
        return (
            math.isnan(row["test_accuracy"])
            and all(row[name] == getattr(job.recipe, name) for name in OF_RECIPE)
            and (row["norm"], row["parameters"]) == (job.variant.norm, what["parameters"])
            and RunFolder(job.directory).holds_no_other(what)
        )

    def _fill(self, job: Job, measured: dict) -> None:
        recipe, cell = job.recipe, self.cells[job.variant.folder]
        digest = self.digests[job.directory]
        values = {
            "run": digest,
            "variant": cell.label,
            "norm": job.variant.norm,
            "base_lr": cell.base_lr,
            "parameters": count_parameters(job.build()),
            **{name: getattr(recipe, name) for name in OF_RECIPE},
            "seconds": math.nan,
            **measured,
        }
        self.rows[digest] = {name: values[name] for name in COLUMNS}

    def frame(self) -> DataFrame:
        """The rows so far, in the order of the jobs; its `attrs` say what the images are."""
        frame = _frame(self._own_rows())
        frame.attrs["source"] = self.data.source
        return frame

    def _own_rows(self) -> list[dict]:
        digests = (self.digests[job.directory] for job in self.jobs)
        return [self.rows[digest] for digest in digests if digest in self.rows]

    def _write(self) -> None:
        """This sweep's rows, then those of others: of a run that diverged, the row is all there is.

        The file is read each time, since another sweep may be writing to it as well.
        """
        if self.file is None:
            return
        own = set(self.digests.values())
        with locked(self.file.parent):
            remove_leftovers(self.file.parent, of=self.file.name)
            others = [row for digest, row in self._rows_in_file().items() if digest not in own]
            write_text(self.file, csv_text(_frame([*self._own_rows(), *others])))

    def _rows_in_file(self) -> dict[str, dict]:
        return _read_rows(self.file) if self.file is not None and self.file.is_file() else {}


def _frame(rows: Sequence[dict]) -> DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(COLUMNS))


def _last(job: Job) -> dict:
    """What a finished run has measured in its last epoch, and its seconds in all."""
    history = RunFolder(job.directory).finished_history()
    last = {name: history[-1][name] for name in MEASURED}
    return last | {"seconds": sum(row["seconds"] for row in history)}


def _read_rows(file: Path) -> dict[str, dict]:
    """The rows of a table by their runs' digests; those of runs that diverged are NaN.

    Raises `ValueError` that names a line which cannot have been written so.
    """
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines, strict=True)
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            rows = [_row(reader.line_num, row) for row in reader]
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{file} is no table of a sweep: {error}: mend it or delete it; rows of runs that are "
            "kept come back"
        ) from error
    return {row["run"]: row for row in rows}


def _row(line: int, texts: dict) -> dict:
    """The values of a line, if it is that of a run that ended or diverged."""
    if None in texts or None in texts.values():
        raise ValueError(f"line {line} has not the fields of the first line")
    row = {name: KINDS.get(name, _number)(texts[name]) for name in COLUMNS}
    measured = [row[name] for name in (*MEASURED, "seconds")]
    ended = all(0 <= value < math.inf for value in measured)
    ended = ended and max(row["train_accuracy"], row["test_accuracy"]) <= 1
    if not ended and not all(map(math.isnan, measured)):
        raise ValueError(f"line {line} is damaged")
    return row


def _number(text: str) -> float:
    return float(text) if text else math.nan


KINDS = dict.fromkeys(("run", "variant", "norm"), str)
KINDS |= dict.fromkeys(("batch_size", "seed", "epochs", "parameters"), int)


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
        cells = (escaped(names[0]), f"{names[1]}", f"{names[2]:g}", f"{len(rows)}", result)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
