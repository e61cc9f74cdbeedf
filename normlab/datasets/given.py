"""Images to test on: those of a data set, or of any `DataLoader`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Subset

from normlab.data import Dataset
from normlab.support.checks import as_list
from normlab.support.tensor_checks import images_and_labels

Given = Dataset | Iterable[tuple[Tensor, Tensor]]
"""What to test on: a data set, or the (images, labels) of any `DataLoader`."""


@dataclass(frozen=True)
class GivenImages:
    """Images to test on, wherever they come from."""

    batches: Given  # what `predict` takes
    labels: Tensor
    pictures: Callable[[Tensor], Tensor]  # of the indices (K,): uint8 (K, C, H, W)
    inputs: Callable[[Tensor], Tensor]  # of the indices: as a network gets them
    classes: tuple[str, ...]  # none if only the labels are known
    source: str  # what they are, for titles
    part: str = "test"


def given_images(
    data: Given,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    show: Callable[[Tensor], Tensor] | None = None,
) -> GivenImages:
    """The test images of a data set, or all of a `DataLoader`, which are held in memory."""
    if isinstance(data, Dataset):
        changes = {"classes": classes, "mean": mean, "std": std}
        if changes := {name: value for name, value in changes.items() if value is not None}:
            data = replace(data, **changes)
        batches = data.loader(train=False)
        return GivenImages(
            data,
            data.test_labels,
            data.test_images.__getitem__,
            lambda index: batches.batch(index, [])[0],
            data.classes,
            data.source,
            data.test_name,
        )
    batches = [images_and_labels(batch) for batch in data]
    if not batches:
        raise ValueError("there were no batches to loop over")
    images, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    named = classes if classes is not None else getattr(_dataset_of(data), "classes", ())
    source = type(_dataset_of(data)).__name__
    show = show or partial(_unnormalised, mean=mean, std=std)
    return GivenImages(
        list(zip(images.split(512), labels.split(512), strict=True)),
        labels,
        lambda index: _as_bytes(show(images[index])),
        images.__getitem__,
        tuple(map(str, named)),
        "images" if source in ("list", "TensorDataset", "Subset") else source,
    )


def _dataset_of(loader: object) -> object:
    """The data set that a `DataLoader` draws from, also where it takes a part of it."""
    found = getattr(loader, "dataset", loader)
    while isinstance(found, Subset):
        found = found.dataset
    return found


def _unnormalised(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """Images (K, C, H, W) in [0, 1] as they were before torchvision's `Normalize(mean, std)`."""
    for values, change in ((std, torch.Tensor.mul), (mean, torch.Tensor.add)):
        if values is not None:
            images = change(images, torch.tensor(as_list(values)).view(1, -1, 1, 1))
    return images


def _as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8; such are returned as they are. Others are refused."""
    images = torch.as_tensor(images)
    if images.dtype == torch.uint8:
        return images
    low, high = (float(end) for end in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not (low > -0.01 and high < 1.01):
        raise ValueError(
            f"the images go from {low:.2f} to {high:.2f}, so they are normalised: give mean= and "
            "std= of that, or show=, a function that makes them numbers from 0 to 1"
        )
    return (images.clamp(0, 1) * 255).round().byte()
