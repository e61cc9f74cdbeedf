"""What a trained network predicts, and where it is wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.datasets.given import Given, GivenImages, given_images
from normlab.history import Run
from normlab.support.checks import one_of, whole_number
from normlab.support.grad_cam import grad_cam
from normlab.support.module_state import evaluating
from normlab.support.tensor_checks import (
    check_labels,
    check_logits,
    check_network,
    images_and_labels,
    warn_of_batch_statistics,
)

Predictor = nn.Module | Run
"""A network, or a run, which remembers what its network predicted for the test images."""


@dataclass(frozen=True)
class Mistakes:
    """Test images that a network gets wrong."""

    images: Tensor = field(repr=False)  # uint8 (K, C, H, W), as they are in the data set
    true: Tensor  # class indices, int64 (K,)
    predicted: Tensor  # class indices, int64 (K,)
    probability: Tensor  # of the predicted class, by softmax: float (K,)
    index: Tensor  # place of each image in the test set, int64 (K,)
    classes: tuple[str, ...] = field(repr=False)  # their names
    total: int  # how many mistakes there are in all; K may be fewer
    tested: int  # how many images were tested
    source: str  # what the images are, for titles
    part: str = "test"  # or "validation" where that took its place
    heat: Tensor | None = field(default=None, repr=False)  # `grad_cam` of the predicted classes

    def __len__(self) -> int:
        return len(self.images)


@torch.no_grad()
def predict(
    network: nn.Module, data: Given, *, train: bool = False, batch_size: int = 512
) -> Tensor:
    """Logits (N, classes) on the CPU for the test images (or, with `train`, the training images).

    Of a `DataLoader`, whose images are taken as it gives them, for all its batches in their order.
    The network is in evaluation mode meanwhile and in its former mode afterwards. Warns where its
    batch normalization keeps no running statistics: then the logits of an image depend on the
    others of its batch, and so on `batch_size`.
    """
    if isinstance(data, Dataset):
        check_network(network, data.input_shape, len(data.classes))
        like = next(network.parameters(), torch.zeros(()))
        data = data.loader(train, batch_size, shuffle=False, device=like.device, dtype=like.dtype)
    elif train:
        raise ValueError("train=True is for a Dataset, which has two parts: give the one loader")
    warn_of_batch_statistics(network)
    found = []
    with evaluating(network):
        for batch in data:
            images, _ = images_and_labels(batch, network)
            found.append(network(images))
            check_logits(network, images, found[-1])
    if not found:
        raise ValueError("there were no batches to loop over")
    return torch.cat(found).cpu()


def class_and_probability(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class, int64 (N,), and its softmax probability, float32 (N,).

    Raises `FloatingPointError` if some logits are NaN.
    """
    if broken := int(logits.isnan().any(1).sum()):
        raise FloatingPointError(
            f"the logits of {broken} of {len(logits)} images are no numbers (NaN): the weights of "
            "the network, or the images, hold some"
        )
    probability, predicted = logits.float().softmax(1).max(1)
    return predicted, probability


def _guesses(predictor: Predictor, images: GivenImages) -> tuple[Tensor, Tensor, Sequence[str]]:
    """Class and probability of each image, computed or kept in a run; the classes' names."""
    if isinstance(predictor, Run):
        kept = predictor.identity.get("data", {}).get("fingerprint")
        if isinstance(images.batches, Dataset) and kept == images.batches.fingerprint:
            return predictor.predicted, predictor.probability, images.classes
        predictor = predictor.network
    logits = predict(predictor, images.batches)
    width = logits.shape[1]
    check_labels(images.labels, "labels", len(logits), width)
    classes = images.classes or tuple(map(str, range(width)))
    if len(classes) != width:
        raise ValueError(f"{len(classes)} class names do not fit {width} logits an image")
    return *class_and_probability(logits), classes


def find_mistakes(network: Predictor, data: Given, count: int = 10, **options: object) -> Mistakes:
    """Up to `count` test images that the network, or the run's network, gets wrong.

    Takes the options of `find_common_mistakes`.
    """
    return find_common_mistakes([network], data, count, **options)


def find_common_mistakes(
    networks: Mapping[str, Predictor] | Iterable[Predictor],
    data: Given,
    count: int = 10,
    *,
    order: str = "confident",
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    show: Callable[[Tensor], Tensor] | None = None,
    cam: str | None = None,
) -> Mistakes:
    """Up to `count` test images that all the networks or runs get wrong.

    The predicted class, its probability and the order are those of the first network.

    Args:
        data: a `Dataset`, or any batches of (images, labels), which are held in memory.
        count: how many; if there are fewer mistakes, all are returned.
        order: "confident" for the highest probabilities first, "first" for the order of the images.
        classes: their names, where the data do not tell them.
        mean, std: by which the network's images in [0, 1] were normalised. A data set is then
            normalised by these; the images of a `DataLoader` are shown without.
        show: makes the images (K, C, H, W) of a `DataLoader` numbers from 0 to 1, in another way.
        cam: the name of a layer of the first network whose `grad_cam` is drawn over the images.
    """
    whole_number(count, "count")
    one_of(order, ("confident", "first"), "order of mistakes")
    predictors = list(networks.values() if isinstance(networks, Mapping) else networks)
    if not predictors:
        raise ValueError("there is no network to look for mistakes of")
    images = given_images(data, classes, mean, std, show)
    guesses = [_guesses(predictor, images) for predictor in predictors]
    missed = torch.stack([predicted != images.labels for predicted, *_ in guesses]).all(0)
    wrong = missed.nonzero().flatten()
    predicted, probability, names = guesses[0]
    if order == "confident":
        wrong = wrong[probability[wrong].argsort(descending=True, stable=True)]
    chosen, heat = wrong[:count], None
    if cam is not None:
        network = getattr(predictors[0], "network", predictors[0])
        heat = grad_cam(network, images.inputs(chosen), predicted[chosen], layer=cam)
    return Mistakes(
        images=images.pictures(chosen),
        true=images.labels[chosen],
        predicted=predicted[chosen],
        probability=probability[chosen],
        index=chosen,
        classes=names,
        total=len(wrong),
        tested=len(images.labels),
        source=images.source,
        part=images.part,
        heat=heat,
    )


def confusion_matrix(
    network: Predictor,
    data: Given,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Counts, int64 (classes, classes): row the true class, column the predicted one.

    `data` is a `Dataset`, which `mean` and `std` normalise in another way than its own, or any
    batches of (images, labels), which are taken as they are.
    """
    return _confusion(network, given_images(data, None, mean, std))[0]


def _confusion(network: Predictor, images: GivenImages) -> tuple[Tensor, tuple[str, ...]]:
    """The counts, and the classes' names."""
    predicted, _, names = _guesses(network, images)
    pairs = images.labels * len(names) + predicted
    return torch.bincount(pairs, minlength=len(names) ** 2).view(len(names), -1), names


def class_accuracy(
    network: Predictor,
    data: Given,
    classes: Sequence[str] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, float]:
    """The fraction of images classified correctly, by class; NaN for a class without images.

    `data`, `mean` and `std` are as for `confusion_matrix`.
    """
    counts, names = _confusion(network, given_images(data, classes, mean, std))
    return dict(zip(names, (counts.diagonal() / counts.sum(1)).tolist(), strict=True))
