"""How far a training has come: a bar on a terminal, a line in a notebook, lines in a log."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

Show = bool | Callable[[float], None]
"""Whether to show it, or what to call instead with the epochs that are done, with a fraction."""


class Progress:
    """The progress of one training, shown as suits the place where the output goes.

    On a terminal it is tqdm's bar over all batches of all epochs, in a notebook a bar as text, and
    elsewhere one line an epoch; with `show=False` it is nothing. A function is called instead after
    every batch.
    """

    def __init__(self, label: str, epochs: int, steps: int, *, show: Show = True) -> None:
        self.label, self.epochs, self.steps, self.show = label, epochs, steps, show is True
        self.done, self.finished = 0, 0  # batches, epochs
        self._tell = show if callable(show) else None
        self._bar: tqdm | None = None  # tqdm's hidden bar would start a thread all the same
        bar = {"total": epochs * steps, "desc": label, "dynamic_ncols": True}
        if self.show and notebook_shell() is not None:
            look = {"bar_format": "{desc} {bar:20}{postfix}", "ascii": "░█", "position": 0}
            self._bar = tqdm(file=_NotebookLine(), mininterval=0.5, **look, **bar)
        elif self.show and sys.stderr is not None and sys.stderr.isatty():
            look = "{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(bar_format=look, **bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start_at(self, epochs: int) -> None:
        """Some epochs were done before."""
        self.finished = epochs
        self.step(epochs * self.steps)

    def step(self, batches: int = 1) -> None:
        """So many batches more are done."""
        self.done += batches
        if self._bar is not None:
            self._bar.update(batches)
        if self._tell is not None:
            self._tell(self.done / self.steps)

    def counted(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Hands on the batches and counts them."""
        for batch in batches:
            yield batch
            self.step()

    def finish_epoch(self, row: dict) -> None:
        """An epoch is done; `row` is its line of the history."""
        self.finished = row["epoch"]
        epoch = f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}"
        training, test = (
            f"loss {row[f'{part}_loss']:.4f}, accuracy {row[f'{part}_accuracy']:.2%}"
            for part in ("train", "test")
        )
        if self._bar is not None:  # with a long label it must fit on 80 columns
            self.say(f"{epoch}, test {row['test_accuracy']:.2%}")
        elif self.show:
            numbers = f"training {training}, test {test}, {row['seconds']:.1f} s"
            print(f"{self.label}: {epoch}, {numbers}", flush=True)

    def say(self, text: str) -> None:
        """Puts words behind the bar, where there is one."""
        if self._bar is not None and text != self._bar.postfix:
            self._bar.set_postfix_str(text)


def notebook_shell() -> object | None:
    """What runs this in a Jupyter kernel; without importing IPython where nobody else did."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


class _NotebookLine:
    """A file for tqdm that shows what is written in place of what was there.

    A stored notebook keeps its last state only. A widget's state would keep GitHub from showing
    the notebook, and of a stream of carriage returns every one would be kept.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if text.strip():
            self._handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        """What is written is shown at once."""
