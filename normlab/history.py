"""A finished training in memory: how the network was trained, and what every epoch gave.

A loop of one's own keeps its results in a `History`, which the plots take like a `Run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.support.epoch_rows import holds_epochs, row_of, rows_of
from normlab.support.type_hints import DataFrame, Tensor, nn

if TYPE_CHECKING:
    from normlab.recipes import Recipe
    from normlab.training import EpochResult

QUANTITIES = (
    *("train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("penalty", "lr", "seconds"),
)
COLUMNS = ("epoch", *QUANTITIES)


class History(list):
    """The rows of a loop of one's own, one for each epoch, like those of `Run.history`.

        history = nl.History()
        for epoch in range(20):
            history.add(nl.train_epoch(network, train, optimizer), nl.test_epoch(network, test))
        nl.plot_loss_and_accuracy({"mine": history})

    `History.of` makes one of what other loops keep. What is not known is NaN.
    """

    def __init__(self) -> None:
        super().__init__()

    def add(
        self, train: EpochResult, test: EpochResult | None = None, *, lr: float = math.nan
    ) -> dict:
        """Appends the row of an epoch, from the results of training and testing, and returns it."""
        return self._append(row_of(train, test, lr=lr))

    def _append(self, values: Mapping[str, float]) -> dict:
        self.append({"epoch": len(self) + 1} | dict.fromkeys(QUANTITIES, math.nan) | values)
        return self[-1]

    @classmethod
    def of(cls, kept: Mapping | Iterable) -> History:
        """The history in lists by name, or in rows.

        Args:
            kept: `{"train_loss": [2.3, …], "val_acc": [0.1, …]}` and the like; `{"train": […],
                "test": […]}` or a list of pairs (train, test) of `EpochResult`s; or a list with a
                dict for each epoch. Accuracies of which some are above 1 are percents.

        Raises `ValueError` for names that are none of `QUANTITIES` and lists of several lengths.
        """
        history = cls()
        for row in rows_of(kept, QUANTITIES):
            history._append(row)
        return history


@dataclass(repr=False)
class Run:
    """A finished training.

    Args:
        network: with its final weights.
        recipe: how it was trained.
        history: a dict for each epoch with the keys of `COLUMNS`: losses in nats, accuracies as
            fractions, the last learning rate of the epoch, wall seconds.
        predicted: class given to each test image, int64 (N,).
        probability: softmax probability of that class, float32 (N,).
        config: what is kept beside these: `identity`, `provenance`, and digests of the results.
        directory: where it is kept, if anywhere.
    """

    network: nn.Module
    recipe: Recipe
    history: list[dict]
    predicted: Tensor
    probability: Tensor
    config: dict
    directory: Path | None = None

    @classmethod
    def from_history(
        cls,
        history: Mapping | Iterable,
        network: nn.Module | None = None,
        *,
        recipe: Recipe | None = None,
        source: str = "",
    ) -> Run:
        """The run of a loop of one's own, for plots and tables.

        Args:
            history: a `History`, or what `History.of` takes.
            network: the one that was trained.
            recipe: how it was trained, if a `Recipe` can say it.
            source: what the images are, for titles.
        """
        from torch import empty  # `plot_curves` is to be imported without torch

        weights = [] if network is None else [w for w in network.parameters() if w.requires_grad]
        about = {"parameters": sum(weight.numel() for weight in weights), "data": {}}
        config = {"is": about, "from": {"data_source": source}}
        return cls(network, recipe, History.of(history), empty(0).long(), empty(0), config)

    def __repr__(self) -> str:
        accuracy = f"{self.last['test_accuracy']:.4f}"
        return f"Run({type(self.network).__name__}, {self.recipe}, test_accuracy={accuracy})"

    @property
    def identity(self) -> dict:
        """What was trained, on which data and how: runs with the same identity are the same."""
        return self.config["is"]

    @property
    def provenance(self) -> dict:
        """Where, when and with which versions it was trained.

        If it was resumed, "before" has that of each earlier part; "until_epoch" is its last one.
        """
        return self.config["from"]

    @property
    def last(self) -> dict:
        """The last epoch: the one to quote."""
        return self.history[-1]

    @property
    def best(self) -> dict:
        """The epoch of the highest test accuracy: optimistic, since the test set picked it."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    @property
    def parameters(self) -> int:
        """How many numbers the network learned."""
        return self.identity["parameters"]

    @property
    def seconds(self) -> float:
        """Wall time of all epochs, tests included."""
        return sum(row["seconds"] for row in self.history)

    def frame(self) -> DataFrame:
        """The history as a pandas DataFrame, a row for each epoch."""
        import pandas

        return pandas.DataFrame(self.history, columns=list(COLUMNS))


def runs_of(kept: Run | Mapping | Iterable) -> list[Run]:
    """The runs, whichever way they are given: one or several, as `Run`s or histories."""
    if isinstance(kept, Run):
        return [kept]
    if isinstance(kept, Mapping):
        return [Run.from_history(kept)]
    if isinstance(kept, str) or not isinstance(kept, Iterable):
        raise TypeError(f"a run or a history is needed for each label, not {kept!r}")
    kept = list(kept)
    if kept and not isinstance(kept[0], Run) and not holds_epochs(kept[0]):
        return [Run.from_history(kept)]
    return [run for each in kept for run in runs_of(each)]
