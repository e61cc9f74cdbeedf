"""Requests to end, which a command hears as it hears Ctrl-C."""

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(KeyboardInterrupt):
    """A signal other than that of Ctrl-C ends the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM, and SIGHUP of a closed terminal, raise `Ended`.

    Not if they are to be ignored, as after `nohup`. Once one has ended the work they are ignored,
    since a shell may repeat them; but one that got lost in a destructor may come again.
    """
    last: weakref.ref[Ended] | None = None

    def end(number: int, _: FrameType | None) -> None:
        nonlocal last
        if last is None or last() is None:
            error = Ended(number)
            last = weakref.ref(error)
            try:
                raise error
            finally:
                del error  # else this frame would keep it, as it keeps the frame

    numbers = []
    if threading.current_thread() is threading.main_thread():  # no other one may ask for them
        known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        numbers = [each for each in known if each and signal.getsignal(each) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if last else signal.SIG_DFL)
