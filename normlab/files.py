"""Files that are either whole or not there: written aside, then moved into place."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

DEEPEST = 50  # of what is nested in JSON: more would be too much for whoever goes through it


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
    aside = place.with_name(f".{place.name}.{os.getpid()}.part")
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


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process was writing aside in `directory`."""
    for leftover in directory.glob(".*.part"):
        leftover.unlink(missing_ok=True)


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
    lock = place / f"normlab-{secrets.token_hex(8)}.lock"
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
        lock.unlink(missing_ok=True)
