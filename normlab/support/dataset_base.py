"""What a `Dataset` can do as a whole: be split, kept in a file, copied to a device."""

import hashlib
import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as arrays_to_bytes
from torch import Tensor

from normlab.support.checks import as_list, number, whole_number
from normlab.support.files import write_bytes
from normlab.support.seeding import generator

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class DatasetBase:
    """The base of `Dataset`, which has the fields."""

    def subset(self, train: int | None = None, test: int | None = None, *, seed: int = 0) -> Self:
        """Fewer images, the classes balanced as far as they go; None keeps a part as it is."""
        if train is None and test is None:
            return self
        parts = {}
        for part, count in (("train", train), ("test", test)):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if count is not None:
                if whole_number(count, f"the {part} images of a subset") > len(images):
                    raise ValueError(f"a subset of {count} {part} images: there are {len(images)}")
                pick = _balanced(labels, count, generator(seed, "subset", part))
                images, labels = images[pick], labels[pick]
            parts |= {f"{part}_images": images, f"{part}_labels": labels}
        sizes = f"{len(parts['train_images']):,} + {len(parts['test_images']):,} images"
        return replace(self, **parts, source=f"{self.source}, subset of {sizes}")

    def with_validation(self, fraction: float = 0.1, *, seed: int = 0) -> Self:
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

    @property
    def normalization(self) -> dict[str, tuple[float, ...] | None]:
        """The mean and the std that were given; None stands for those of the training images."""
        both = {"mean": self.mean, "std": self.std}
        return {name: None if isinstance(v, _Measured) else v for name, v in both.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images, labels, class names and a given `normalization`."""
        digest = hashlib.sha256(repr(self.classes).encode())
        if given := {name: v for name, v in self.normalization.items() if v is not None}:
            digest.update(repr(given).encode())
        for part in (getattr(self, name) for name in _ARRAYS):
            digest.update(repr((tuple(part.shape), str(part.dtype))).encode())
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()

    def on_device(self, part: str, device: torch.device) -> list[Tensor]:
        """Images and labels of "train" or "test" on a device, where all loaders share them."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # one key for one device
        if (part, device) not in self._copies:
            both = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            self._copies[part, device] = [each.to(device) for each in both]
        return self._copies[part, device]

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], list[Tensor]]:
        return {}

    def save(self, path: Path, *, key: str = "") -> None:
        """Keeps the data set in one file, which `Dataset.open` maps into memory.

        Raises `OSError` if it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        about = [self.name, self.classes, self.source, self.test_name]
        about += [self.normalization, self._seal(key)]
        write_bytes(path, arrays_to_bytes(arrays, {"about": json.dumps(about)}))

    @classmethod
    def open(cls, path: Path, *, key: str = "") -> Self:
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


def _balanced(labels: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices of `count` images, as equally from every class as the data allow, in random order."""
    shuffled = torch.randperm(len(labels), generator=random)
    rank = torch.empty_like(labels)  # how many of its class come before an image
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    first = rank[shuffled].argsort(stable=True)[:count]
    return shuffled[first.sort().values]


class _Measured(tuple):
    """Means or deviations of the training images: with other images they are measured anew."""


def channel_statistics(images: Tensor, mean: object, std: object) -> dict[str, tuple[float, ...]]:
    """The mean and the std given, a number for each channel; for None that of the images."""
    measured = _measured(images) if mean is None or std is None else {}
    return {
        name: measured[name] if values is None else _per_channel(values, name, images.shape[1])
        for name, values in (("mean", mean), ("std", std))
    }


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


def _per_channel(values: object, name: str, channels: int) -> tuple[float, ...]:
    """A number for each channel; one alone stands for all."""
    limit = {"least": -math.inf} if name == "mean" else {"positive": True}
    found = [number(value, name, **limit) for value in as_list(values)]
    if len(found) not in (1, channels):
        raise ValueError(f"{name} must be {channels} numbers, one for each channel, not {values}")
    return tuple(found * (channels // len(found)))
