"""The data sets that torchvision can download: read from files that are here, else fetched."""

import http.client
import os
import shutil
import socket
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from normlab.data import Dataset
from normlab.datasets.cache import cache_folder
from normlab.datasets.folders import load_folder

DOWNLOAD_TIMEOUT = 30  # seconds without a byte, after which a download counts as failed


@dataclass(frozen=True)
class Source:
    """A data set of torchvision's."""

    title: str  # in figures; without the hyphen, the name of torchvision's class
    address: str  # its official page
    files: tuple[str, ...]  # what the download leaves below the data root
    classes: tuple[str, ...] = ()  # if torchvision's class does not name them
    parts: tuple[dict, dict] = ({"train": True}, {"train": False})  # arguments of that class
    jpegs: str = ""  # a folder below the data root that may hold the same images as JPEG files
    fingerprint: str = ""  # of the original, if torchvision knows no check sums of these files

    def is_in(self, place: Path) -> bool:
        """Whether all its files are there."""
        return all(os.path.isfile(place / file) for file in self.files)

    def jpegs_in(self, place: Path) -> bool:
        """Whether a JPEG copy of its images is there."""
        return bool(self.jpegs) and os.path.isdir(place / self.jpegs / "train")

    def open(self, place: Path, **options: object) -> list:
        """The training and the test part, as torchvision has them."""
        import torchvision

        kind = getattr(torchvision.datasets, self.title.replace("-", ""))
        return [kind(place, **part, **options) for part in self.parts]

    def read(self, name: str, place: Path) -> Dataset:
        """The data set whose files are below `place`; torchvision compares their check sums."""
        try:
            idx = self.files[0].endswith("ubyte")
            data = Dataset(name, *(self._read_idx(place) if idx else self._read(place)), self.title)
        except Exception as error:  # torchvision raises whatever the damage happens to provoke
            paths = dict.fromkeys(str(place / Path(file).parts[0]) for file in self.files)
            what, why = " or ".join(paths), str(error) or type(error).__name__
            text = f"{what} is damaged ({why}): delete it and load the data set again"
            raise ValueError(text) from error
        original = self.fingerprint in ("", data.fingerprint)
        return data if original else replace(data, source=f"{self.title}, changed")

    def _read(self, place: Path) -> list:
        """Images, labels, images, labels and classes."""
        found, parts = [], self.open(place)
        for part in parts:
            images = np.asarray(part.data)  # (N, H, W), (N, H, W, C) or (N, C, H, W)
            images = images[:, None] if images.ndim == 3 else images
            channels_last = images.shape[1] not in (1, 3)
            found.append(images.transpose(0, 3, 1, 2) if channels_last else images)
            found.append(part.targets if hasattr(part, "targets") else part.labels)
        return [*found, self.classes or parts[0].classes]

    def _read_idx(self, place: Path) -> list:
        """The same of files like MNIST's, without torchvision, whose import takes a second."""
        images, labels, test_images, test_labels = (
            np.fromfile(place / file, np.uint8, offset=16 if "images" in file else 8)
            for file in self.files
        )
        shape = (-1, 1, 28, 28)
        parts = images.reshape(shape), labels, test_images.reshape(shape), test_labels
        return [*parts, self.classes]


_IDX_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
_DIGITS = tuple("0123456789")
SOURCES = {
    "mnist": Source(
        "MNIST",
        "http://yann.lecun.com/exdb/mnist/",
        tuple(f"MNIST/raw/{name}" for name in _IDX_FILES),
        _DIGITS,
        fingerprint="a6b692a2344fdfb743f3ad93edd47d328eff4055214ed53a838e3b15387196cc",
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        tuple(f"FashionMNIST/raw/{name}" for name in _IDX_FILES),
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": Source(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        tuple(f"cifar-10-batches-py/{name}" for name in _CIFAR_FILES),
        jpegs="cifar10",
    ),
    "svhn": Source(
        "SVHN",
        "http://ufldl.stanford.edu/housenumbers/",
        ("train_32x32.mat", "test_32x32.mat"),
        _DIGITS,
        ({"split": "train"}, {"split": "test"}),
    ),
}


def data_roots(root: Path | None = None) -> list[Path]:
    """The folders that are searched for data, in order."""
    asked = [root, os.environ.get("NORMLAB_DATA")]
    return [*(Path(place).expanduser() for place in asked if place), cache_folder() / "data"]


def find_or_download(name: str, root: Path | None, download: bool) -> Dataset:
    """A data set of torchvision's, wherever it lies; from the internet if it lies nowhere."""
    source = SOURCES[name]
    for place in data_roots(root):
        if source.is_in(place):
            return source.read(name, place)
        if source.jpegs_in(place):
            title = f"{source.title} (JPEG copy)"
            return load_folder(place / source.jpegs, None, name=name, title=title)
    if download:
        return source.read(name, _download(source, root))
    raise FileNotFoundError(_with_advice(f"{source.title} is not on this machine", source, root))


def _download(source: Source, root: Path | None) -> Path:
    """Downloads to the first folder that can be written; returns that folder."""
    place = _writable(data_roots(root))
    with ExitStack() as stack:
        aside = stack.enter_context(tempfile.TemporaryDirectory(prefix=".normlab-", dir=place))
        # torchvision has no time-out: a silent server would hang a notebook for good.
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            source.open(aside, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            why = f"{source.title} could not be downloaded ({' '.join(str(error).split())})"
            raise OSError(_with_advice(why, source, root)) from error
        for file in source.files:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(aside, file), place / file)
    return place


def _writable(places: list[Path]) -> Path:
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise OSError(f"none of {', '.join(map(str, places))} can be written to")


def _with_advice(why: str, source: Source, root: Path | None) -> str:
    folder = data_roots(root)[0] / Path(source.files[0]).parent
    return f'{why}: unpack it from {source.address} into {folder}, or take "digits"'
