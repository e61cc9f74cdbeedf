"""A data set as tensors, and batches of it. To add one, see `SOURCES` in datasets/downloads.py."""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from normlab.augment import parse_augmentation
from normlab.support.checks import whole_number
from normlab.support.dataset_base import DatasetBase, channel_statistics
from normlab.support.seeding import generator
from normlab.support.tensor_checks import as_images, as_labels, check_labels


@dataclass(frozen=True, eq=False)
class Dataset(DatasetBase):
    """Images and labels for training and testing; `subset` and such: support/dataset_base.py.

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
        for name, values in channel_statistics(self.train_images, **self.normalization).items():
            object.__setattr__(self, name, values)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.train_images.shape[1:])

    def loader(
        self,
        train: bool = True,
        batch_size: int = 128,
        *,
        shuffle: bool | None = None,
        device: torch.device | str = "cpu",
        **options: object,
    ) -> "BatchLoader":
        """Batches (images, labels): float (B, C, H, W), normalised, and int64 (B,).

        The training part is shuffled anew in every pass, the test part is in order; `shuffle`
        decides otherwise. `options` are augment (names as in `Recipe`), seed and dtype.
        """
        return BatchLoader(
            *self.on_device("train" if train else "test", torch.device(device)),
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            shuffle=train if shuffle is None else shuffle,
            **options,
        )


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
