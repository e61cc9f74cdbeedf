"""A data set held as tensors, and batches of it made on the device."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as arrays_to_bytes
from torch import Tensor

from normlab.augment import parse_augmentation
from normlab.support.checks import as_list, number, whole_number
from normlab.support.files import write_bytes
from normlab.support.seeding import generator
from normlab.support.tensor_checks import as_images, as_labels, check_labels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels for training and testing.

    Args:
        name: short name, such as "mnist".
        train_images, test_images: uint8 (N, C, H, W), tensors or numpy arrays, which are copied.
        train_labels, test_labels: (N,) of any whole numbers, kept as int64, from 0 to
            len(classes) − 1.
        classes: the name of each class.
        source: what the images are, as figures should name them; never a path.
        test_name: what the second part is, "test" or "validation".
        mean, std: of each channel, or one for all, by which images in [0, 1] are normalised;
            without them, those of the training images.

    Raises `ValueError` or `TypeError` if they do not fit together.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    source: str
    test_name: str = "test"
    mean: Sequence[float] | None = field(default=None, repr=False)
    std: Sequence[float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        for part in ("train", "test"):
            images = as_images(getattr(self, f"{part}_images"), f"{part}_images")
            labels = as_labels(getattr(self, f"{part}_labels"), f"{part}_labels")
            check_labels(labels, f"{part}_labels", len(images), len(self.classes))
            object.__setattr__(self, f"{part}_images", images)
            object.__setattr__(self, f"{part}_labels", labels)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"train_images are of shape {tuple(self.train_images.shape[1:])} but test_images "
                f"of {tuple(self.test_images.shape[1:])}: they must have the same shape"
            )
        given = self.normalization
        measured = _measured(self.train_images) if None in given.values() else {}
        for name, values in given.items():
            values = measured[name] if values is None else _per_channel(values, name, images)
            object.__setattr__(self, name, values)

    @property
    def normalization(self) -> dict[str, Sequence[float] | None]:
        """The mean and the std that were given; None stands for those of the training images."""
        both = {"mean": self.mean, "std": self.std}
        return {name: None if isinstance(v, _Measured) else v for name, v in both.items()}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.train_images.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images, labels, class names and a given `normalization`."""
        digest = hashlib.sha256(repr(self.classes).encode())
        if given := {name: v for name, v in self.normalization.items() if v is not None}:
            digest.update(repr(given).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr((tuple(part.shape), str(part.dtype))).encode())
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()

    def loader(
        self,
        train: bool = True,
        batch_size: int = 128,
        *,
        shuffle: bool | None = None,
        augment: Sequence[str] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "BatchLoader":
        """Batches (images, labels): float (B, C, H, W), normalised, and int64 (B,).

        The training part is shuffled anew in every pass, the test part is in order; `shuffle`
        decides otherwise. `augment` names augmentations, as in `Recipe`.
        """
        return BatchLoader(
            *self._part_on("train" if train else "test", torch.device(device)),
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            shuffle=train if shuffle is None else shuffle,
            augment=augment,
            seed=seed,
            dtype=dtype,
        )

    def _part_on(self, part: str, device: torch.device) -> list[Tensor]:
        """Images and labels on a device, where all loaders share them."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # one key for one device
        if (part, device) not in self._copies:
            self._copies[part, device] = [each.to(device) for each in self._part(part)]
        return self._copies[part, device]

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], list[Tensor]]:
        return {}

    def _part(self, part: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")

    def save(self, path: Path, *, key: str = "") -> None:
        """Keeps the data set in one file, which `Dataset.open` maps into memory.

        Raises `OSError` if it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        about = [self.name, self.classes, self.source, self.test_name]
        about += [self.normalization, self._seal(key)]
        write_bytes(path, arrays_to_bytes(arrays, {"about": json.dumps(about)}))

    @classmethod
    def open(cls, path: Path, *, key: str = "") -> "Dataset":
        """The data set kept in a file; processes that open it share one copy of the images.

        Raises `ValueError` if the file is not whole, or was saved with another key.
        """
        try:
            with safe_open(path, framework="pt") as file:
                arrays = [file.get_tensor(name) for name in _ARRAYS]
                name, *texts, normalization, seal = json.loads(file.metadata()["about"])
            data = cls(name, *arrays, *texts, **normalization)
            if data._seal(key) != seal:
                raise ValueError("what was kept is something else")
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the data set kept in {path} is damaged: delete it") from error
        return data

    def _seal(self, key: str) -> str:
        """SHA-256 over all that is kept, and over a key that is not kept beside it."""
        whole = (key, self.name, self.source, self.test_name, self.fingerprint)
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    def subset(
        self, train: int | None = None, test: int | None = None, *, seed: int = 0
    ) -> "Dataset":
        """Fewer images, the classes balanced as far as they go; None keeps a part as it is."""
        if train is None and test is None:
            return self
        parts = {}
        for part, count in (("train", train), ("test", test)):
            images, labels = self._part(part)
            if count is not None:
                if whole_number(count, f"the {part} images of a subset") > len(images):
                    raise ValueError(f"a subset of {count} {part} images: there are {len(images)}")
                pick = _balanced(labels, count, generator(seed, "subset", part))
                images, labels = images[pick], labels[pick]
            parts |= {f"{part}_images": images, f"{part}_labels": labels}
        sizes = f"{len(parts['train_images']):,} + {len(parts['test_images']):,} images"
        return replace(self, **parts, source=f"{self.source}, subset of {sizes}")

    def with_validation(self, fraction: float = 0.1, *, seed: int = 0) -> "Dataset":
        """Puts a stratified part of the training set in the place of the test set.

        Hyper-parameters chosen on it leave the test set unseen.
        """
        number(fraction, "the validation fraction", positive=True, below=1)
        random = generator(seed, "validation")
        held_out = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label in range(len(self.classes)):
            members = (self.train_labels == label).nonzero().flatten()
            count = round(len(members) * fraction)
            held_out[members[torch.randperm(len(members), generator=random)[:count]]] = True
        if not held_out.any() or held_out.all():
            raise ValueError(f"a validation fraction of {fraction} leaves a part without images")
        return replace(
            self,
            train_images=self.train_images[~held_out],
            train_labels=self.train_labels[~held_out],
            test_images=self.train_images[held_out],
            test_labels=self.train_labels[held_out],
            source=f"{self.source}, validation part of the training set",
            test_name="validation",
        )


_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class _Measured(tuple):
    """Means or deviations of the training images: with other images they are measured anew."""


def _measured(images: Tensor) -> dict[str, _Measured]:
    """Mean and standard deviation of each channel of bytes (N, C, H, W), as numbers in [0, 1]."""
    # Counting how often each of 256 values occurs is exact, and needs no copy as floats.
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for some in images.split(4096):
        for channel, values in enumerate(some.unbind(1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256)
    share, values = counts / counts.sum(1, keepdim=True), torch.arange(256.0).double() / 255
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp_min(0).sqrt()
    return {"mean": _Measured(mean.tolist()), "std": _Measured(std.tolist())}


def _per_channel(values: object, name: str, images: Tensor) -> tuple[float, ...]:
    """A number for each channel of the images (N, C, H, W); one alone stands for all."""
    channels, least = images.shape[1], {"least": -math.inf} if name == "mean" else {}
    found = [number(value, name, positive=name == "std", **least) for value in as_list(values)]
    if len(found) not in (1, channels):
        raise ValueError(f"{name} must be {channels} numbers, one for each channel, not {values}")
    return tuple(found * (channels // len(found)))


def _balanced(labels: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices of `count` images, as equally from every class as the data allow, in random order."""
    shuffled = torch.randperm(len(labels), generator=random)
    rank = torch.empty_like(labels)  # how many of its class come before an image
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    first = rank[shuffled].argsort(stable=True)[:count]
    return shuffled[first.sort().values]


@dataclass(eq=False)
class BatchLoader:
    """Normalised, augmented batches of images that stay on one device as uint8.

    Iterating gives (images, labels): float (B, C, H, W) and int64 (B,); the last batch may be
    shorter. The order and the augmentations of pass number `epoch` follow from the seed and that
    number alone: they are the same for every network and device, and after an interruption.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    _: KW_ONLY
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    shuffle: bool = False
    augment: Sequence[str] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    epoch: int = 0

    def __post_init__(self) -> None:
        self.batch_size = whole_number(self.batch_size, "batch_size")
        self.augmentations = [parse_augmentation(text) for text in self.augment]
        # A channel that is constant over the training set (std 0) is only centred.
        scale = [1 / (255 * (std or 1)) for std in self.std]
        offset = [-mean / (std or 1) for mean, std in zip(self.mean, self.std, strict=True)]
        both = torch.tensor([scale, offset], dtype=self.dtype, device=self.images.device)
        self._scale, self._offset = both.view(2, -1, 1, 1)  # (C, 1, 1) each

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, draws = self.draw_epoch()
        self.epoch += 1
        for start in range(0, len(order), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.batch(order[rows], [drawn[rows] for drawn in draws])

    def draw_epoch(self) -> tuple[Tensor, list[Tensor]]:
        """The order of the images (N,) and each augmentation's draws (N, …), on the device."""
        count, device = len(self.images), self.images.device
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator(self.seed, "order", self.epoch))
        draws = [
            each.draw(count, generator(self.seed, each.name, self.epoch)).to(device)
            for each in self.augmentations
        ]
        return order.to(device), draws

    def batch(self, picked: Tensor, draws: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One batch: the images `picked` (B,), augmented as drawn, then normalised."""
        images = self.images[picked]
        for augmentation, drawn in zip(self.augmentations, draws, strict=True):
            images = augmentation.apply(images, drawn)
        images = images.to(self.dtype, memory_format=self.memory_format)
        return torch.addcmul(self._offset, images, self._scale), self.labels[picked]
