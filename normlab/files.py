"""Files that are either whole or not there: written aside, then moved into place."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """The path that a user wrote, with `~` as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for {path}: give the whole path") from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on failure it is gone.

    Raises `OSError` with a sentence that names `path` when it cannot be written (no permission,
    a full disk).
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror}") from error
    finally:
        # After a success there is nothing left to remove; after a failure, on a read-only folder
        # for instance, the removal may fail as well, and the first error is the one to report.
        if aside.parent.is_dir():
            aside.unlink(missing_ok=True)


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
    """Reads JSON; a damaged file is named, with what to do about it."""
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder and run again") from error


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process was writing aside in `directory`."""
    for leftover in directory.glob(".*.part"):
        leftover.unlink(missing_ok=True)
