"""The way through an epoch on a CPU: the plain loops, with less time lost around the arithmetic."""

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from normlab.engines.dropout import quick_dropout
from normlab.engines.plain import Counted, PlainEngine
from normlab.training import EpochResult

# From glibc's malloc.h: https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one
_KEPT = 2**30  # bytes that may lie unused before any are returned


class CpuEngine(PlainEngine):
    """Tensors laid out channels last, masks of dropout drawn quicker, memory kept between steps."""

    name = "cpu-channels-last"
    layout = torch.channels_last

    def prepare(self) -> str:
        self.lay_out()
        return ""

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        with quick_dropout(self.network), kept_memory():
            return super().collect(counted)

    def close(self) -> None:
        self.network.to(memory_format=torch.contiguous_format)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is the one with these settings."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block memory that one step frees stays for the next; at its end it is returned.

    Otherwise the C library of Linux returns and asks again for the same megabytes in every step,
    and the system clears each page at its first use: a tenth to a quarter of a step.

    glibc tells nobody its thresholds, and once told some it no longer adjusts them to the blocks
    that it sees. So afterwards they are those that it sets by itself once a program has freed a
    block of 32 MiB: that much comes without a mapping of its own, and twice that is kept.
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
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)
