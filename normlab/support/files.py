"""Files that are either whole or not there: written beside their place, then moved into it."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """The path that a user wrote, with `~` as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for {path}: give the whole path") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on failure it is gone.

    Afterwards it survives a loss of power. A link stays a link; `path` keeps the permissions that
    it has, and a new file gets those of the user's other files.
    Raises `OSError` with a sentence that names `path` when it cannot be written (no permission,
    a full disk).
    """
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(8)}.part")
    try:
        make_folder(place.parent)
        temporary.touch()
        permissions = (place if place.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(permissions)  # safetensors makes a file that nobody else may read
        _sync(temporary)  # else the name may reach the disk before the content: an empty file
        os.replace(temporary, place)
        with suppress(OSError):  # the file is in its place, and some file systems know no more
            _sync(place.parent)
    except OSError as error:
        advice = ": make room there" if error.errno == errno.ENOSPC else ""
        raise type(error)(f"cannot write {path}: {error.strerror or error}{advice}") from error
    finally:
        # After a success there is nothing left to remove; after a failure, on a read-only folder
        # for instance, the removal may fail as well, and the first error is the one to report.
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, so that they survive a loss of power."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        with suppress(OSError):
            _sync(folder.parent)  # which holds its name


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
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` in one move, with `?` for what is no Unicode."""
    write_bytes(path, text.encode(errors="replace"))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON to `path` in one move; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Reads JSON, in which NaN has no place; a damaged file is named, with what to do about it."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder and run again") from error


def remove_leftovers(directory: Path, of: str = "*") -> None:
    """Removes what a killed process was writing in `directory`, which must be `locked`."""
    for leftover in directory.glob(f".{of}.*.part"):
        leftover.unlink(missing_ok=True)
