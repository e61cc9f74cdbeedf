"""Folders that one process at a time may use: their locks end with the process that has them."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from normlab.support.files import make_folder

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


class InUse(RuntimeError):
    """Another process or thread has locked a folder."""


@contextmanager
def locked(*folders: Path, wait: bool = True) -> Iterator[None]:
    """Locks the folders while the block lasts.

    Another process or thread is waited for, which is said; without `wait` that is `InUse`. A thread
    may lock again what it has locked. A folder that was made for this, and is still empty, is gone
    afterwards.
    """
    with ExitStack() as stack:
        for place in sorted({Path(os.path.realpath(folder)) for folder in folders}):
            stack.enter_context(_locked(place, wait))  # in one order, so that no two wait crosswise
        yield


@contextmanager
def _locked(place: Path, wait: bool) -> Iterator[None]:
    lock, new = FileLock(place / LOCK, is_singleton=True), not place.is_dir()
    if lock.is_locked:  # by this thread
        yield
        return
    try:
        _acquire(lock, place, wait)
        yield
    finally:
        with suppress(OSError):  # Windows does so itself, afterwards
            if lock.is_locked:
                (place / LOCK).unlink()  # who waits for this very file will see that it is gone
        lock.release()
        if new:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def _acquire(lock: FileLock, place: Path, wait: bool) -> None:
    """Gets the lock; where the file system has none it goes on without, with a warning."""
    patience = 0
    while not lock.is_locked:
        try:
            make_folder(place)
            lock.acquire(timeout=patience)
        except FileNotFoundError:
            continue  # whoever had the folder has removed it
        except Timeout:
            if not wait:
                other = "wait for its end, or choose another directory"
                raise InUse(f"{place} is in use by another process: {other}") from None
            _print(f"{place} is in use by another process; waiting")
            patience = -1
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise type(error)(f"cannot write {place}: {error.strerror or error}") from error
            _print(f"{place} cannot be locked: let no other process write there at the same time")
            return


def _print(message: str) -> None:
    """To the terminal, since in a process beside others warnings are silent."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder while the block lasts; removes those of processes that were killed.

    A lock in it says whether it is in use. The process id in its name would not: it may be that of
    another container, or given anew.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"normlab-*/{LOCK}"):
        with suppress(OSError, Timeout):  # another user's, or in use
            with FileLock(lock, timeout=0):
                pass
            _remove_leftovers(lock.parent)
    named = {"prefix": f"normlab-{os.getpid()}-", "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**named) as name, FileLock(Path(name, LOCK)):
        yield Path(name)


def _remove_leftovers(place: Path) -> None:
    """The folder, and joblib's semaphores, which stay when a process is killed with all children.

    If the id of the process has been given anew, they stay.
    """
    shutil.rmtree(place)
    process = place.name.split("-")[1]
    if not Path("/proc", process).exists():
        for file in Path("/dev/shm").glob(f"sem.loky-{process}-*"):
            file.unlink(missing_ok=True)
