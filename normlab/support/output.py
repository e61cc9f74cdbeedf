"""Output that cannot end the work, whoever reads it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


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
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if hasattr(stream, "reconfigure"):  # a notebook's stream takes everything
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="replace")
            stack.enter_context(redirect(_Lasting(stream or nowhere)))
        yield


class _Lasting:
    """A stream that takes no more after an error, and does not fail again.

    The error of a reader that has left, or of a terminal that was closed, is not even told.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = (errno.EPIPE, errno.EIO) if stream.isatty() else (errno.EPIPE,)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # Also for what the stream still holds, and writes when it is closed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if error.errno not in self._gone:
                raise
        return len(text)
