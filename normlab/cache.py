"""Decoded data sets, kept as one file each in the user's cache folder."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import normlab
from normlab.checks import warn
from normlab.data import Dataset


def cache_folder() -> Path:
    """The folder for downloads and decoded data sets, by the custom of the system."""
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ".cache"
    return base / "normlab"


def cached(
    name: str, files: list[Path], decode: Callable[[], Dataset], extra: tuple = ()
) -> Dataset:
    """The data set decoded from `files`, from the cache if they are unchanged since.

    Another version of normlab decodes them anew.
    """
    where = str(files[0].resolve().parent)
    key = hashlib.sha256(repr((normlab.__version__, where, extra)).encode())
    for file in files:
        status = file.stat()
        key.update(f"{file.parent.name}/{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    path = cache_folder() / "decoded" / f"{name}-{key.hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            return Dataset.open(path)
        except ValueError:
            warn(f"the data set kept in {path} is damaged; it is decoded anew")
    data = decode()
    try:
        data.save(path)
    except OSError as error:
        warn(f"the decoded data set is not kept: {error}")
    return data
