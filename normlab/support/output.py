"""Output whose reader may leave without stopping the program."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block the program goes on if nobody reads its output.

    What is written to a closed stream, or to a reader that has left, as in `| head -1`, is
    dropped. A character that the encoding lacks, such as × in ASCII, becomes a question mark.
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
    """A stream that drops what is written to it after an error.

    The error is raised once, unless it says that the reader has left or the terminal was closed.
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
