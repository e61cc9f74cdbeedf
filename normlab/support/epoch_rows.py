"""The rows of a history, from what loops of one's own keep of every epoch."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from normlab.support.checks import one_of

_SHORT = {  # words of the names that students give their lists
    **dict.fromkeys(("training", "tr"), "train"),
    **dict.fromkeys(("testing", "val", "valid", "validation"), "test"),
    **dict.fromkeys(("acc", "accs", "accuracies"), "accuracy"),
    **{"losses": "loss", "rate": "lr", "time": "seconds"},
}


def row_of(train: object, test: object = None, *, lr: float = math.nan) -> dict[str, float]:
    """An epoch's numbers, of the `EpochResult`s of training and testing."""
    row = {"train_loss": train.loss, "train_accuracy": train.accuracy}
    if test is not None:
        row |= {"test_loss": test.loss, "test_accuracy": test.accuracy}
    seconds = train.seconds + (0.0 if test is None else test.seconds)
    return row | {"penalty": train.penalty, "lr": lr, "seconds": seconds}


def rows_of(kept: Mapping | Iterable, quantities: Sequence[str]) -> list[dict[str, float]]:
    """Each epoch's numbers by the names of `quantities`; percents become fractions."""
    epochs = _rows(kept) if isinstance(kept, Mapping) else kept
    rows = [_row(epoch, quantities) for epoch in epochs]
    accuracies = ("train_accuracy", "test_accuracy")
    percents = [name for name in accuracies if any(row.get(name, 0) > 1 for row in rows)]
    return [{k: v / 100 if k in percents else v for k, v in row.items()} for row in rows]


def _row(epoch: object, quantities: Sequence[str]) -> dict[str, float]:
    if isinstance(epoch, Mapping):
        pair = "train" in epoch
        return row_of(epoch["train"], epoch.get("test")) if pair else _named(epoch, quantities)
    return row_of(*epoch) if isinstance(epoch, tuple) else row_of(epoch)


def _rows(lists: Mapping[str, Sequence]) -> Iterator[dict]:
    """A dict for each epoch, of a list for each name."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"the lists of a history must have a value for each epoch: {told}")
    for row in zip(*lists.values(), strict=True):
        yield dict(zip(lists, row, strict=True))


def _named(row: Mapping[str, float], quantities: Sequence[str]) -> dict[str, float]:
    """An epoch's numbers, renamed: "val_acc" is "test_accuracy", and "loss" that of training."""
    found = {}
    for key, value in row.items():
        words = [_SHORT.get(word, word) for word in re.findall("[a-z]+", str(key).lower())]
        name = "_".join(words if words not in (["loss"], ["accuracy"]) else ["train", *words])
        if name != "epoch":
            found[one_of(name, quantities, "quantity of a history")] = float(value)
    return found


def holds_epochs(kept: object) -> bool:
    """Whether it holds several epochs, not the results of one."""
    values = list(kept.values()) if isinstance(kept, Mapping) else kept
    first = next(iter(values), None)
    return isinstance(first, Mapping | Sequence)
