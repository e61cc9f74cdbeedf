"""Where images come from: bundled digits, files already here, a download, a folder of images."""

import hashlib
import http.client
import math
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from normlab.data import Dataset
from normlab.datasets import folders
from normlab.datasets.cache import cache_folder, cached
from normlab.datasets.folders import load_folder, resized
from normlab.support.checks import image_shape, nearest

DOWNLOAD_TIMEOUT = 30  # seconds without a byte, after which a download counts as failed

CODE = __loader__.get_data(__file__)  # as folders.CODE

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")


@dataclass(frozen=True)
class Source:
    """A data set that torchvision can download."""

    title: str  # and, without the hyphen, torchvision's name
    files: tuple[str, ...]  # what it leaves below the data root
    address: str  # the official page
    classes: tuple[str, ...] = ()  # where no file names them
    digests: tuple[str, ...] = ()  # SHA-256 of the files, where torchvision checks none


SOURCES = {
    "mnist": Source(
        "MNIST",
        tuple(f"MNIST/raw/{name}" for name in _IDX_FILES),
        "http://yann.lecun.com/exdb/mnist/",
        tuple("0123456789"),
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        tuple(f"FashionMNIST/raw/{name}" for name in _IDX_FILES),
        "https://github.com/zalandoresearch/fashion-mnist",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": Source(
        "CIFAR-10",
        tuple(f"cifar-10-batches-py/{name}" for name in _CIFAR_FILES),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
}
DATASETS = ("digits", *SOURCES)


def load_dataset(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    download: bool = True,
    *,
    input_shape: tuple[int, int, int] | None = None,
) -> Dataset:
    """Loads a data set: from files that are here if possible, else by downloading it.

    Args:
        name: "digits" (bundled, no download), "mnist", "fashion-mnist", "cifar10", or a folder
            with `train/<class>/*` and `test/<class>/*` of images in any format of Pillow's.
        root: a folder that holds data or shall receive it; without it, or when it holds none, the
            folder in NORMLAB_DATA is looked at, then normlab's own cache folder.
        download: whether to fetch what is nowhere to be found.
        input_shape: (C, H, W) to convert the images to; a folder of images that differ in size
            needs it.

    The images of a folder, once decoded, are kept as one file in the cache folder, so that the
    next load is quick. MNIST of other files than the original ones is called "MNIST, changed".
    Raises `ValueError` for an unknown name or damaged files, `FileNotFoundError` for missing
    ones, `OSError` for a download that failed; nothing half-written stays behind.
    """
    check_dataset_name(name)
    input_shape = None if input_shape is None else _checked_shape(input_shape)
    if name == "digits":
        return _load_digits(input_shape or (1, 28, 28))
    if name in SOURCES:
        data = _load_known(str(name), None if root is None else Path(root), download)
        return data if input_shape is None else _converted(data, input_shape)
    return load_folder(Path(name).expanduser(), input_shape)


def check_dataset_name(name: str | os.PathLike) -> None:
    """Raises an error unless `name` is a data set's or a folder's."""
    if name in DATASETS or Path(name).expanduser().is_dir():
        return
    if Path(name).expanduser().exists():
        raise ValueError(f"{str(name)!r} is a file: unpack it, and name the folder of its images")
    if isinstance(name, str) and not set(name) & {"/", "\\", "."}:
        raise ValueError(
            f"unknown data set {name!r}: it must be one of {', '.join(DATASETS)} or a folder of "
            f"images{nearest(name, DATASETS)}"
        )
    raise FileNotFoundError(f"there is no folder {str(name)!r} to load images from")


def data_roots(root: Path | None = None) -> list[Path]:
    """The folders that are searched for data, in order."""
    asked = [root.expanduser()] if root is not None else []
    if os.environ.get("NORMLAB_DATA"):
        asked.append(Path(os.environ["NORMLAB_DATA"]).expanduser())
    return [*asked, cache_folder() / "data"]


def _checked_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    shape = image_shape(shape)
    if shape[0] not in (1, 3):
        raise ValueError(f"input_shape must be (C, H, W) with 1 or 3 channels, not {shape!r}")
    return shape


# --- bundled digits --------------------------------------------------------------------------


def _load_digits(shape: tuple[int, int, int]) -> Dataset:
    """The digits, which are kept as well: importing scikit-learn takes some 3 s."""
    settings = (shape, version("scikit-learn"), CODE, folders.CODE)
    return cached("digits", [], lambda: _read_digits(shape), settings)


def _read_digits(shape: tuple[int, int, int]) -> Dataset:
    """scikit-learn's 1,797 digits of 8×8, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1)  # (1797, 1, 8, 8), values 0 to 16
    images = resized(images * (255 / 16), shape)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=360, random_state=0, stratify=labels.numpy()
    )
    return Dataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple(map(str, digits.target_names)),
        source="scikit-learn digits",
    )


def _converted(data: Dataset, shape: tuple[int, int, int]) -> Dataset:
    """The same data set with images of another shape (C, H, W)."""
    if data.input_shape == shape:
        return data
    return replace(
        data,
        train_images=resized(data.train_images, shape),
        test_images=resized(data.test_images, shape),
        source=f"{data.source} as {'×'.join(map(str, shape))}",
    )


# --- known data sets, on disk or downloaded ---------------------------------------------------


def _load_known(name: str, root: Path | None, download: bool) -> Dataset:
    """A data set of torchvision's, or the JPEG copy of CIFAR-10, wherever it lies."""
    source = SOURCES[name]
    for place in data_roots(root):
        if all(os.path.isfile(place / file) for file in source.files):
            return _read_cifar10(place) if name == "cifar10" else _read_idx(name, place)
        pictures = place / "cifar10"
        if name == "cifar10" and os.path.isdir(pictures / "train"):
            return load_folder(pictures, None, name=name, title="CIFAR-10 (JPEG copy)")
    if not download:
        raise FileNotFoundError(_not_found(name, root, f"{source.title} is not on this machine"))
    return _load_known(name, _download(name, root), download=False)


def _read_idx(name: str, place: Path) -> Dataset:
    """Reads the four files of MNIST or Fashion-MNIST; a damaged one is named."""
    source, parts, digests = SOURCES[name], [], ()
    for file in source.files:
        content = np.fromfile(place / file, np.uint8)
        digests += (hashlib.sha256(content).hexdigest(),)
        sides, start = ((28, 28), 16) if "images" in file else ((), 8)
        count, rest = divmod(len(content) - start, math.prod(sides))
        header = struct.pack(f">{start // 4}I", 2049 + len(sides), max(count, 0), *sides)
        if count < 1 or rest or bytes(content[:start]) != header:
            raise _damaged(place / file, "its header and its size do not fit together")
        parts.append(content[start:].reshape(count, *sides))
        if not sides and (count != len(parts[-2]) or parts[-1].max() >= len(source.classes)):
            raise _damaged(place / file, "its labels do not fit to the images")
    title = source.title if source.digests in ((), digests) else f"{source.title}, changed"
    train, test = parts[0][:, None], parts[2][:, None]  # (N, 1, 28, 28)
    return Dataset(name, train, parts[1], test, parts[3], source.classes, title)


def _read_cifar10(place: Path) -> Dataset:
    """Reads the batches of CIFAR-10 below `place`, whose check sums torchvision knows."""
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(place, train=train) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever the damage happens to provoke
        why = str(error) or type(error).__name__
        raise _damaged(place / "cifar-10-batches-py", why) from error
    arrays = [some for part in parts for some in (part.data.transpose(0, 3, 1, 2), part.targets)]
    return Dataset("cifar10", *arrays, parts[0].classes, SOURCES["cifar10"].title)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged ({why}): delete it and load the data set again")


def _download(name: str, root: Path | None) -> Path:
    """Downloads to the first folder that can be written; returns that folder."""
    import torchvision

    source = SOURCES[name]
    reader = getattr(torchvision.datasets, source.title.replace("-", ""))
    place = _writable(data_roots(root))
    with tempfile.TemporaryDirectory(prefix=".normlab-", dir=place) as aside, _socket_timeout():
        try:
            reader(aside, train=True, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            why = f"{source.title} could not be downloaded ({reason})"
            raise OSError(_not_found(name, root, why)) from error
        for file in source.files:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(aside) / file, place / file)
    return place


def _writable(places: list[Path]) -> Path:
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OSError(f"none of {', '.join(map(str, places))} can be written to")


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """torchvision downloads without a time-out: a silent server would hang a notebook for good."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _not_found(name: str, root: Path | None, why: str) -> str:
    source = SOURCES[name]
    folder = Path(source.files[0]).parent
    files = ", ".join(Path(file).name for file in source.files)
    roots = " or ".join(map(str, data_roots(root)))
    return (
        f"{why}: get it from {source.address} and put the unpacked files {files} into the "
        f"folder {folder} below {roots}"
    )
