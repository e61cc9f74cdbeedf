"""Decoded data sets, kept as one file each in the user's cache folder."""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from normlab.data import Dataset
from normlab.support.checks import warn

# The code as it was when it was imported: what other code has decoded is not for this one.
_HERE = Path(__file__).parent
_KEPT_BY = [_HERE.parent / "data.py", _HERE.parent / "support" / "dataset_base.py"]
CODE = [file.read_bytes() for file in (*sorted(_HERE.glob("*.py")), *_KEPT_BY)]


def cache_folder() -> Path:
    """The folder for downloads and decoded data sets, by the custom of the system."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # an empty or relative one is to be ignored, by the standard
        return Path(named, "normlab")
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in many containers
        return Path(tempfile.gettempdir(), f"normlab-{os.getuid()}")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local", "normlab")
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "normlab"


def cache_size() -> int:
    """The bytes of all downloads and decoded data sets in the cache folder."""
    return sum(file.stat().st_size for file in cache_folder().rglob("*") if file.is_file())


def measured_cache(*, clear: bool) -> str:
    """How much the cache folder holds; with `clear` it is gone, and loads download anew."""
    found = f"{cache_size() / 1e6:,.0f} MB in {cache_folder()}"
    if clear and cache_folder().exists():
        shutil.rmtree(cache_folder())
    return f"{found}: removed" if clear else f"{found}; --clear-cache removes it"


def cached(
    name: str, files: Iterable[Path], decode: Callable[[], Dataset], settings: tuple = ()
) -> Dataset:
    """The data set decoded from `files`, from the cache where the same was decoded before.

    It is the same if the content of the files is, the `settings`, and the code that decodes. A
    cache that cannot be used costs a warning, never the data set.
    """
    key = _key(files, (name, *settings))
    path = cache_folder() / "decoded" / f"{name[:40]}-{key[:16]}.safetensors"
    if os.path.exists(path):
        try:
            # The file's name tells a part of the key only: nobody who has not read the images
            # can make a file that opens with it.
            return Dataset.open(path, key=key)
        except (OSError, ValueError) as error:
            warn(f"{error}; the images are decoded anew")
    data = decode()
    try:
        data.save(path, key=key)
    except OSError as error:
        warn(f"the decoded data set is not kept: {error}")
    return data


def _key(files: Iterable[Path], settings: tuple) -> str:
    """SHA-256 over the files' content, classes and names, and all that decodes them."""
    import PIL

    key = hashlib.sha256(repr((settings, CODE, torch.__version__, PIL.__version__)).encode())
    for file in files:
        content = file.read_bytes()
        key.update(repr((*file.parts[-3:], len(content))).encode())
        key.update(content)
    return key.hexdigest()
