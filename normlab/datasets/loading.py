"""Data sets by name: the bundled digits, those of torchvision, a folder of images."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from normlab.assignments import Assignment
from normlab.data import Dataset
from normlab.datasets.cache import cached
from normlab.datasets.downloads import SOURCES, find_or_download
from normlab.datasets.folders import load_folder, resized
from normlab.model import NETWORKS
from normlab.support.checks import check_instance, image_shape, nearest

DATASETS = ("digits", *SOURCES)


def load_dataset(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    download: bool = True,
    *,
    input_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """Loads a data set: from files that are here if possible, else by downloading it.

    Args:
        name: "digits" (bundled, no download), "mnist", "fashion-mnist", "cifar10", "svhn", or a
            folder with `train/<class>/*` and `test/<class>/*` of images in any format of Pillow's.
        root: a folder that holds data or shall receive it; without it, or when it holds none, the
            folder in NORMLAB_DATA is looked at, then normlab's own cache folder.
        download: whether to fetch what is nowhere to be found.
        input_shape: (C, H, W) to convert the images to; a folder of images that differ in size
            needs it.
        mean, std: to normalise by, as for `Dataset`.

    The images of a folder, once decoded, are kept as one file in the cache folder, so that the
    next load is quick. MNIST of other files than the original ones is called "MNIST, changed".
    Raises `ValueError` for an unknown name or damaged files, `FileNotFoundError` for missing
    ones, `OSError` for a download that failed; nothing half-written stays behind.
    """
    check_dataset_name(name)
    if input_shape is not None:
        input_shape = image_shape(input_shape)
        if input_shape[0] not in (1, 3):
            raise ValueError(
                f"input_shape must be (C, H, W) with 1 or 3 channels, not {input_shape!r}"
            )
    if name == "digits":
        data = _load_digits(input_shape or (1, 28, 28))
    elif name in SOURCES:
        data = find_or_download(name, None if root is None else Path(root), download)
        data = data if input_shape in (None, data.input_shape) else _converted(data, input_shape)
    else:
        data = load_folder(Path(name).expanduser(), input_shape)
    return data if mean is None and std is None else replace(data, mean=mean, std=std)


def described(data: Dataset) -> str:
    """What it holds, and what its images are normalised by, in two lines."""
    shape = "×".join(map(str, data.input_shape))
    return (
        f"{data.source}: {len(data.train_images):,} training and {len(data.test_images):,} test "
        f"images of {shape}, {len(data.classes)} classes ({', '.join(data.classes)})\n"
        f"mean {', '.join(f'{m:.4f}' for m in data.mean)}; "
        f"standard deviation {', '.join(f'{s:.4f}' for s in data.std)}"
    )


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


def _converted(data: Dataset, shape: tuple[int, int, int]) -> Dataset:
    """The same data set with images of another shape (C, H, W)."""
    return replace(
        data,
        train_images=resized(data.train_images, shape),
        test_images=resized(data.test_images, shape),
        source=f"{data.source} as {'×'.join(map(str, shape))}",
    )


def _load_digits(shape: tuple[int, int, int]) -> Dataset:
    """The digits, which are cached as well: importing scikit-learn takes some 3 s."""
    return cached("digits", [], lambda: _read_digits(shape), (shape, version("scikit-learn")))


def _read_digits(shape: tuple[int, int, int]) -> Dataset:
    """scikit-learn's 1,797 digits of 8×8, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1)  # (1797, 1, 8, 8), values 0 to 16
    images, labels = resized(images * (255 / 16), shape), torch.from_numpy(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=360, random_state=0, stratify=digits.target
    )
    parts = images[train], labels[train], images[test], labels[test]
    return Dataset("digits", *parts, digits.target_names, "scikit-learn digits")


def check_root(root: str | Path | None) -> None:
    """Raises `FileNotFoundError` for a data root that is no folder."""
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"the data root {root} is not a folder")


def load_assignment_data(
    assignment: Assignment,
    name: str | Path | None = None,
    root: str | Path | None = None,
    *,
    side: int | None = None,
) -> Dataset:
    """The assignment's data set, or the one called `name`, from `root` if it lies there.

    The bundled digits take the shape that the assignment's network is made for; `side` resizes
    the images of any data set, to as many channels as that network has.
    """
    check_root(root)  # on a worker of a cluster it may be missing
    name = name or assignment.dataset
    shape = NETWORKS[assignment.network].input_shape if assignment.network else (1, 28, 28)
    if side is not None:
        shape = (shape[0], side, side)
    elif name != "digits":
        shape = None
    return load_dataset(name, root, input_shape=shape)


def load_images(data: Dataset | Callable[[], Dataset] | None, assignment: Assignment) -> Dataset:
    """The images: those given, or what the function returns; without either, the assignment's."""
    data = load_assignment_data(assignment) if data is None else data
    data = data() if callable(data) else data
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    return data
