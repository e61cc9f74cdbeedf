"""How far a training has come: a bar on a terminal, a line in a notebook, lines in a log."""

import errno
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Self, TextIO, TypeVar

Item = TypeVar("Item")


def make_progress(label: str, epochs: int, steps: int, *, show: bool = True) -> "Progress":
    """The progress display that suits where the output goes; `show=False` is silent."""
    if not show:
        return Progress(label, epochs, steps)
    if _in_notebook():
        return NotebookProgress(label, epochs, steps)
    if sys.stderr is not None and sys.stderr.isatty():
        return TerminalProgress(label, epochs, steps)
    return LineProgress(label, epochs, steps)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; without importing IPython where nobody else did."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class Progress:
    """Shows nothing: the silent form, and what the others refine."""

    def __init__(self, label: str, epochs: int, steps: int) -> None:
        self.label, self.epochs, self.steps = label, epochs, steps
        self.done = 0  # batches
        self.row: dict = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the display."""

    def start_at(self, epochs: int) -> None:
        """Some epochs were done before."""
        self.done = epochs * self.steps

    def counted(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Hands on the batches and counts them."""
        for batch in batches:
            yield batch
            self.done += 1
            self.step()

    def step(self) -> None:
        """A batch is done."""

    def finish_epoch(self, row: dict) -> None:
        """An epoch is done; `row` is its line of the history."""
        self.row = row

    def numbers(self) -> str:
        """The last finished epoch in words."""
        if not self.row:
            return ""
        return f"test loss {self.row['test_loss']:.4f}, accuracy {self.row['test_accuracy']:.2%}"


class LineProgress(Progress):
    """One line an epoch, for logs."""

    def finish_epoch(self, row: dict) -> None:
        super().finish_epoch(row)
        width = len(str(self.epochs))
        print(
            f"{self.label}: epoch {row['epoch']:{width}}/{self.epochs}, "
            f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}, "
            f"{self.numbers()}, {row['seconds']:.1f} s",
            flush=True,
        )


class TerminalProgress(Progress):
    """tqdm's bar over all batches of all epochs."""

    def __init__(self, label: str, epochs: int, steps: int) -> None:
        super().__init__(label, epochs, steps)
        from tqdm import tqdm

        form = "{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=epochs * steps, desc=label, bar_format=form, dynamic_ncols=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def start_at(self, epochs: int) -> None:
        super().start_at(epochs)
        self._bar.update(self.done)

    def step(self) -> None:
        self._bar.update()

    def finish_epoch(self, row: dict) -> None:
        super().finish_epoch(row)
        self._bar.set_postfix_str(f"epoch {row['epoch']}/{self.epochs}, {self.numbers()}")


class NotebookProgress(Progress):
    """One line of text that is replaced in place: a stored notebook keeps only its last state.

    It is neither a widget, whose state would keep GitHub from showing the notebook, nor a stream
    of carriage returns, of which a stored notebook keeps every one.
    """

    SECONDS_BETWEEN = 0.5

    def __init__(self, label: str, epochs: int, steps: int) -> None:
        super().__init__(label, epochs, steps)
        from IPython.display import display

        self._handle = display(self._text(), display_id=True)
        self._shown = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._show()

    def step(self) -> None:
        if time.monotonic() - self._shown >= self.SECONDS_BETWEEN:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        self._handle.update(self._text())

    def _text(self) -> "PlainText":
        share = self.done / (self.epochs * self.steps)
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        epoch = self.row.get("epoch", 0)
        return PlainText(f"{self.label} {bar} epoch {epoch}/{self.epochs} {self.numbers()}")


class PlainText(str):
    """Text that a notebook shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def lasting_output() -> Iterator[None]:
    """While it lasts, whoever reads the output cannot end the work.

    A code page without × gets a question mark, and what a reader that has left, as in `| head -1`,
    or a closed stream does not take is dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get its number, and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        out, error = (_lasting(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(error))
        yield
        out.flush()
        error.flush()


def _lasting(stream: TextIO) -> TextIO:
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a notebook's stream takes everything
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Lasting(getattr(buffer, "raw", buffer)))
    return io.TextIOWrapper(raw, stream.encoding, errors="replace", line_buffering=True)


class _Lasting(io.RawIOBase):
    """Hands on what is written, up to the first error; that of a reader that has left is none.

    Nor is that of a terminal that was closed.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._lost = raw, False
        self._gone = (errno.EPIPE, errno.EIO) if raw.isatty() else (errno.EPIPE,)
        self.fileno, self.isatty, self.writable = raw.fileno, raw.isatty, raw.writable

    def write(self, content: bytes) -> int | None:
        if not self._lost:
            try:
                return self._raw.write(content)
            except OSError as error:
                self._lost = True
                if error.errno not in self._gone:
                    raise
        return len(content)
