"""Keeps the memory that a training step frees for the next step.

Every step of a small network allocates and frees the same blocks of some megabytes. The C library
of Linux returns blocks of that size to the system and asks for them again, and the system clears
each page on its first use: that was a tenth to a quarter of a step.
"""

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h: https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one
_KEPT = 2**30  # bytes that may lie unused before any are returned
# glibc raises its own thresholds with the blocks it sees, up to these, until it is told one.
_USUALLY_KEPT = 2 * _LARGEST_MMAP_THRESHOLD


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is the one with these settings."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block freed memory stays with the process; at its end it is returned.

    Afterwards the C library keeps as much as it does by itself for a program with large blocks.

    Does nothing on systems without glibc (macOS, Windows, Alpine Linux).
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, _USUALLY_KEPT)
        library.malloc_trim(0)
