"""The ways in which loops of one's own keep what every epoch gave."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from normlab.support.checks import one_of

_SHORT = {  # words of the names that students give their lists
    **dict.fromkeys(("training", "tr"), "train"),
    **dict.fromkeys(("testing", "val", "valid", "validation"), "test"),
    **dict.fromkeys(("acc", "accs", "accuracies"), "accuracy"),
    **{"losses": "loss", "rate": "lr", "time": "seconds"},
}


def epochs_in(kept: Mapping | Iterable, quantities: Sequence[str]) -> Iterator[tuple | dict]:
    """For each epoch its results (train, test), or its numbers by the names of `quantities`."""
    for row in _rows(kept) if isinstance(kept, Mapping) else kept:
        if isinstance(row, Mapping) and "train" in row:
            yield row["train"], row.get("test")
        elif isinstance(row, Mapping):
            yield _named(row, quantities)
        else:
            yield row if isinstance(row, tuple) else (row,)


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
