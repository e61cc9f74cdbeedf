"""How far a training has come: a bar on a terminal, a line in a notebook, lines in a log."""

import sys
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Progress:
    """The progress of one training, shown as suits the place where the output goes.

    On a terminal it is tqdm's bar over all batches of all epochs, in a notebook a bar as text, and
    elsewhere one line an epoch; with `show=False` it is nothing.
    """

    def __init__(self, label: str, epochs: int, steps: int, *, show: bool = True) -> None:
        self.label, self.epochs, self.steps, self.show = label, epochs, steps, show
        self.done = 0  # batches
        self._bar: tqdm | None = None  # tqdm's hidden bar would start a thread all the same
        bar = {"total": epochs * steps, "desc": label, "dynamic_ncols": True}
        if show and notebook_shell() is not None:
            look = {"bar_format": "{desc} {bar:20}{postfix}", "ascii": "░█", "position": 0}
            self._bar = tqdm(file=_NotebookLine(), mininterval=0.5, **look, **bar)
        elif show and sys.stderr is not None and sys.stderr.isatty():
            look = "{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(bar_format=look, **bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start_at(self, epochs: int) -> None:
        """Some epochs were done before."""
        self.step(epochs * self.steps)

    def step(self, batches: int = 1) -> None:
        """So many batches more are done."""
        self.done += batches
        if self._bar is not None:
            self._bar.update(batches)

    def counted(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Hands on the batches and counts them."""
        for batch in batches:
            yield batch
            self.step()

    def finish_epoch(self, row: dict) -> None:
        """An epoch is done; `row` is its line of the history."""
        epoch = f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}"
        training, test = (
            f"loss {row[f'{part}_loss']:.4f}, accuracy {row[f'{part}_accuracy']:.2%}"
            for part in ("train", "test")
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{epoch}, test {test}")
        elif self.show:
            numbers = f"training {training}, test {test}, {row['seconds']:.1f} s"
            print(f"{self.label}: {epoch}, {numbers}", flush=True)


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
