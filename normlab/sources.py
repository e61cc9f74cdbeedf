"""Where images come from: bundled digits, files already here, a download, a folder of images."""

import http.client
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from normlab.cache import cache_folder, cached
from normlab.checks import image_shape, nearest
from normlab.data import Dataset
from normlab.folders import load_folder, resized

DOWNLOAD_TIMEOUT = 30  # seconds without a byte, after which a download counts as failed

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

    title: str
    torchvision_name: str  # the class in torchvision.datasets
    files: tuple[str, ...]  # what it leaves below the data root
    address: str  # the official page


SOURCES = {
    "mnist": Source(
        "MNIST",
        "MNIST",
        tuple(f"MNIST/raw/{name}" for name in _IDX_FILES),
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        "FashionMNIST",
        tuple(f"FashionMNIST/raw/{name}" for name in _IDX_FILES),
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
    "cifar10": Source(
        "CIFAR-10",
        "CIFAR10",
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
            with `train/<class>/*` and `test/<class>/*` of png or jpg images.
        root: a folder that holds data or shall receive it; without it, or when it holds none, the
            folder in NORMLAB_DATA is looked at, then normlab's own cache folder.
        download: whether to fetch what is nowhere to be found.
        input_shape: (C, H, W) to convert the images to; a folder of images that differ in size
            needs it.

    A decoded data set is kept as one file in the cache folder, so that the next load is quick.
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
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    return cached("digits", [Path(package.origin)], lambda: _read_digits(shape), extra=(shape,))


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
    if data.input_shape == tuple(shape):
        return data
    parts = {}
    for part in ("train_images", "test_images"):
        pieces = [resized(some, shape) for some in getattr(data, part).split(4096)]
        parts[part] = torch.cat(pieces)
    return Dataset(
        data.name,
        parts["train_images"],
        data.train_labels,
        parts["test_images"],
        data.test_labels,
        data.classes,
        f"{data.source} as {'×'.join(map(str, shape))}",
    )


# --- known data sets, on disk or downloaded ---------------------------------------------------


def _load_known(name: str, root: Path | None, download: bool) -> Dataset:
    """A data set of torchvision's, or the JPEG copy of CIFAR-10, wherever it lies."""
    source = SOURCES[name]
    for place in data_roots(root):
        files = [place / file for file in source.files]
        if all(file.is_file() for file in files):
            return cached(name, files, lambda place=place: _read_known(name, place))
        pictures = place / "cifar10"
        if name == "cifar10" and (pictures / "train").is_dir():
            return load_folder(pictures, None, name=name, title="CIFAR-10 (JPEG copy)")
    if not download:
        raise FileNotFoundError(_not_found(name, root, f"{source.title} is not on this machine"))
    place = _download(name, root)
    files = [place / file for file in source.files]
    return cached(name, files, lambda: _read_known(name, place))


def _read_known(name: str, place: Path) -> Dataset:
    """Reads torchvision's files below `place`; a damaged one is named."""
    import torchvision

    source = SOURCES[name]
    reader = getattr(torchvision.datasets, source.torchvision_name)
    try:
        parts = [reader(place, train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever the damage happens to provoke
        raise ValueError(
            f"{_damaged_file(name, place)} is damaged ({error or type(error).__name__}): "
            "delete it and load the data set again"
        ) from error
    tensors = []
    for part in parts:
        pixels = torch.as_tensor(part.data)
        images = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        tensors += [images.contiguous(), torch.as_tensor(part.targets)]
    classes = [label.split(" - ")[0] for label in parts[0].classes]  # "7 - seven" is plain "7"
    return Dataset(name, *tensors, tuple(classes), source.title)


def _damaged_file(name: str, place: Path) -> Path:
    """Which file cannot be read: for MNIST's the one that its header contradicts."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    for file in SOURCES[name].files:
        try:
            if file.endswith("idx3-ubyte"):
                read_image_file(str(place / file))
            elif file.endswith("idx1-ubyte"):
                read_label_file(str(place / file))
        except Exception:  # whatever it is, this is the file
            return place / file
    return (place / SOURCES[name].files[0]).parent


def _download(name: str, root: Path | None) -> Path:
    """Downloads to the first folder that can be written; returns that folder."""
    import torchvision

    source = SOURCES[name]
    reader = getattr(torchvision.datasets, source.torchvision_name)
    place = _writable(data_roots(root))
    with tempfile.TemporaryDirectory(prefix=".normlab-", dir=place) as aside, _socket_timeout():
        try:
            for train in (True, False):  # the second call finds everything there
                reader(aside, train=train, download=True)
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
