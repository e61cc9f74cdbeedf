"""Files that are either whole or not there: written aside, then moved into place."""

import errno
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

DEEPEST = 50  # of what is nested in JSON: more would be too much for whoever goes through it
LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system

_holders: dict[Path, int] = {}  # the folders that this process has, and the threads that asked


def user_path(path: str | Path) -> Path:
    """The path that a user wrote, with `~` as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for {path}: give the whole path") from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on failure it is gone.

    Afterwards it survives a loss of power. A link stays a link; `path` keeps the permissions that
    it has, and a new file gets those of the user's other files.
    Raises `OSError` with a sentence that names `path` when it cannot be written (no permission,
    a full disk).
    """
    place = Path(os.path.realpath(path))
    aside = place.with_name(f".{place.name}.{secrets.token_hex(8)}.part")
    try:
        _make_folder(place.parent)
        aside.touch()
        permissions = (place if place.exists() else aside).stat().st_mode
        yield aside
        aside.chmod(permissions)  # safetensors makes a file that nobody else may read
        _sync(aside)  # else the name may reach the disk before the content: an empty file
        os.replace(aside, place)
        with suppress(OSError):  # the file is in its place, and some file systems know no more
            _sync(place.parent)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # After a success there is nothing left to remove; after a failure, on a read-only folder
        # for instance, the removal may fail as well, and the first error is the one to report.
        if aside.parent.is_dir():
            aside.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Makes it and those above it, each noted down in the one that holds it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        with suppress(OSError):
            _sync(folder.parent)


def _sync(path: Path) -> None:
    """Returns when the disk has what this file or folder holds."""
    # Windows synchronises only what is open for writing, and no folder: that is an `OSError`.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` in one move."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` in one move, with `?` for what a name has beside text."""
    write_bytes(path, text.encode(errors="replace"))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON to `path` in one move; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Reads JSON, in which NaN has no place; a damaged file is named, with what to do about it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        _check_depth(value, DEEPEST)
        return value
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder and run again") from error


def _check_depth(value: object, left: int) -> None:
    if not left:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, left - 1)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def remove_leftovers(directory: Path, of: str = "*") -> None:
    """Removes what a killed process was writing aside in `directory`, which must be `owned`."""
    for leftover in directory.glob(f".{of}.*.part"):
        leftover.unlink(missing_ok=True)


class InUse(RuntimeError):
    """Somebody else has a folder."""


@contextmanager
def owned(*folders: Path, wait: bool = True) -> Iterator[None]:
    """Nobody else who asks for one of the folders has it while the block lasts.

    Another process is waited for, which is said, unless `wait` is False; when it is killed the
    system takes the folder back from it. A thread may ask again for what it has. A folder that was
    made for this, and is still empty, is gone afterwards.

    Raises `InUse` if another thread of this process has a folder, or without `wait` another one.
    """
    with ExitStack() as stack:
        for place in sorted({Path(os.path.realpath(folder)) for folder in folders}):
            stack.enter_context(_owned(place, wait))  # in one order, so that no two wait crosswise
        yield


@contextmanager
def _owned(place: Path, wait: bool) -> Iterator[None]:
    me = threading.get_ident()
    if _holders.get(place) == me:
        yield
        return
    lock, new = FileLock(place / LOCK), not place.is_dir()
    if _holders.setdefault(place, me) != me:
        raise InUse(f"{place} is in use by another training here: choose another directory")
    try:
        _take(lock, place, wait)
        yield
    finally:
        with suppress(OSError):  # Windows does so itself, afterwards
            if lock.is_locked:
                (place / LOCK).unlink()  # who waits for this very file will see that it is gone
        lock.release()
        if new:
            with suppress(OSError):  # it is not empty
                place.rmdir()
        del _holders[place]


def _take(lock: FileLock, place: Path, wait: bool) -> None:
    """Takes the lock; where the file system has none it goes on without, with a warning."""
    patience = 0
    while not lock.is_locked:
        try:
            _make_folder(place)
            lock.acquire(timeout=patience)
        except FileNotFoundError:
            continue  # whoever had the folder has removed it
        except Timeout:
            if not wait:
                other = "wait for its end, or choose another directory"
                raise InUse(f"{place} is in use by another process: {other}") from None
            _say(f"{place} is in use by another process; waiting")
            patience = -1
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise type(error)(f"cannot write {place}: {error.strerror or error}") from error
            _say(f"{place} cannot be locked: let no other process write there at the same time")
            return


def _say(message: str) -> None:
    """To the terminal, since in a process beside others warnings are silent."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder while the block lasts; removes those of processes that were killed.

    Its lock tells whether somebody still uses it, which the number of a process would not: it may
    be that of another container, or given anew.
    """
    place = Path(tempfile.gettempdir())
    for lock in place.glob("normlab-*.lock"):
        with suppress(OSError, Timeout):  # another user's, or in use
            _remove_scratch(lock, timeout=0)
    lock = place / f"normlab-{os.getpid()}-{secrets.token_hex(8)}.lock"
    try:
        with FileLock(lock):
            lock.with_suffix("").mkdir(mode=0o700)
            yield lock.with_suffix("")
    finally:
        _remove_scratch(lock)


def _remove_scratch(lock: Path, *, timeout: float = -1) -> None:
    if not lock.is_symlink():
        with FileLock(lock, timeout=timeout):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            _remove_semaphores(lock.name.split("-")[1])
        lock.unlink(missing_ok=True)


def _remove_semaphores(process: str) -> None:
    """Those of joblib's workers stay in memory when the process is killed with all its children.

    The number of the process may have been given anew: then they stay.
    """
    if not Path("/proc", process).exists():
        for file in Path("/dev/shm").glob(f"sem.loky-{process}-*"):
            file.unlink(missing_ok=True)
