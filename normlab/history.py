"""A finished training in memory: how the network was trained, and what every epoch gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor, nn

    from normlab.recipes import Recipe

QUANTITIES = (
    *("train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("penalty", "lr", "seconds"),
)
COLUMNS = ("epoch", *QUANTITIES)


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

        If it was resumed under other conditions, "before" lists the earlier ones.
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
