"""The table of a sweep: a row for each run, in a file that grows as they finish."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.assignments import Variant
from normlab.data import Dataset
from normlab.files import owned, remove_leftovers, user_path, write_text
from normlab.plans import Plan, left_to_do, say_what_is_left
from normlab.report import csv_text, escaped, percent
from normlab.runs import RunFolder, remove_runs
from normlab.summaries import count_parameters

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
TABLE = "sweep.csv"


@dataclass(frozen=True)
class Cell:
    """A variant of a sweep, the label of the assignment's own, and its rate before scaling."""

    variant: Variant
    label: str
    base_lr: float


class SweepTable:
    """The rows of the runs that are done, in the order of the plans, and the file that has them."""

    def __init__(
        self,
        plans: Sequence[Plan],
        cells: Sequence[Cell],
        data: Dataset,
        file: Path | None,
        show: bool,
        after_each: Callable[[DataFrame], object] | None,
    ) -> None:
        """`show` prints a line for each run; the rest is as for `run_sweep`.

        `file` may hold rows of other sweeps, which stay in it.
        """
        self.plans, self.data, self.file = plans, data, file
        self.cells = {cell.variant.folder: cell for cell in cells}
        self.digests = {plan.directory: plan.digest(data) for plan in plans}
        self.rows: dict[str, dict] = {}
        self.show, self.after_each = show, after_each

    def start_anew(self) -> None:
        """Removes this sweep's rows from the file, and its runs; those of other sweeps stay.

        Raises `ValueError` if the file is no table of a sweep, `InUse` if one of the runs is being
        trained; then nothing is removed.
        """
        # The rows first: one whose run is gone would pass for done.
        remove_runs((plan.directory for plan in self.plans), first=self._write)

    def take_what_is_done(self, device: torch.device, kept: str | Path | None) -> list[Plan]:
        """Takes the rows of `kept`, of the file and of finished runs; returns the plans left."""
        measured = {} if kept is None else _read_rows(user_path(kept))
        measured |= self._rows_in_file()
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
            say_what_is_left(len(left), len(self.plans))
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
        """The rows so far, in the order of the plans; its `attrs` say what the images are."""
        frame = _frame(self._own_rows())
        frame.attrs["source"] = self.data.source
        return frame

    def _own_rows(self) -> list[dict]:
        digests = (self.digests[plan.directory] for plan in self.plans)
        return [self.rows[digest] for digest in digests if digest in self.rows]

    def _write(self) -> None:
        """This sweep's rows, then those of others: of a run that diverged, the row is all there is.

        The file is read each time, since another sweep may be writing to it as well.
        """
        if self.file is None:
            return
        own = set(self.digests.values())
        with owned(self.file.parent):
            remove_leftovers(self.file.parent, of=self.file.name)
            others = [row for digest, row in self._rows_in_file().items() if digest not in own]
            write_text(self.file, csv_text(_frame([*self._own_rows(), *others])))

    def _rows_in_file(self) -> dict[str, dict]:
        return _read_rows(self.file) if self.file is not None and self.file.is_file() else {}


def _frame(rows: Sequence[dict]) -> DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(COLUMNS))


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
        rows = pandas.read_csv(
            file,
            dtype=dict.fromkeys(("run", "variant", "norm"), str),
            converters=dict.fromkeys(("base_lr", "lr", "seconds", *MEASURED), _exactly),
            keep_default_na=False,  # a norm may be called none
        )
        return {row["run"]: row for row in rows[list(COLUMNS)].to_dict("records")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is no table of a sweep: {error}") from error


def _exactly(text: str) -> float:
    """The number that was written, to the last bit, as pandas by itself does not promise."""
    return float(text or "nan")


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
