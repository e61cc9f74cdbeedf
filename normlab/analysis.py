"""What a trained network predicts, and where it is wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.history import Run
from normlab.support.checks import one_of, whole_number
from normlab.support.module_state import evaluating
from normlab.support.tensor_checks import check_network, warn_of_batch_statistics

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

    def __len__(self) -> int:
        return len(self.images)


@torch.no_grad()
def predict(
    network: nn.Module, data: Dataset, *, train: bool = False, batch_size: int = 512
) -> Tensor:
    """Logits (N, classes) on the CPU for the test images (or, with `train`, the training images).

    The network is in evaluation mode meanwhile and in its former mode afterwards. Warns where its
    batch normalization keeps no running statistics: then the logits of an image depend on the
    others of its batch, and so on `batch_size`.
    """
    check_network(network, data.input_shape, len(data.classes))
    warn_of_batch_statistics(network)
    example = next(network.parameters(), torch.zeros(()))
    place = {"device": example.device, "dtype": example.dtype}
    batches = data.loader(train, batch_size, shuffle=False, **place)
    with evaluating(network):
        return torch.cat([network(images) for images, _ in batches]).cpu()


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


def _predictions(predictor: Predictor, data: Dataset) -> tuple[Tensor, Tensor]:
    """Class and probability for the test images: kept in a run, computed for a network."""
    if isinstance(predictor, Run):
        if predictor.identity["data"]["fingerprint"] == data.fingerprint:
            return predictor.predicted, predictor.probability
        predictor = predictor.network
    return class_and_probability(predict(predictor, data))


def find_mistakes(
    network: Predictor, data: Dataset, count: int = 10, *, order: str = "confident"
) -> Mistakes:
    """Up to `count` test images that the network, or the run's network, gets wrong.

    `order` is "confident" for the highest probabilities first, or "first" for the order of the test
    set. If there are fewer than `count` mistakes, all are returned.
    """
    return find_common_mistakes([network], data, count, order=order)


def find_common_mistakes(
    networks: Mapping[str, Predictor] | Iterable[Predictor],
    data: Dataset,
    count: int = 10,
    *,
    order: str = "confident",
) -> Mistakes:
    """Up to `count` test images that all the networks or runs get wrong.

    The predicted class, its probability and the order are those of the first network.
    """
    whole_number(count, "count")
    one_of(order, ("confident", "first"), "order of mistakes")
    predictors = list(networks.values() if isinstance(networks, Mapping) else networks)
    if not predictors:
        raise ValueError("there is no network to look for mistakes of")
    guesses = [_predictions(predictor, data) for predictor in predictors]
    missed = torch.stack([predicted != data.test_labels for predicted, _ in guesses]).all(0)
    wrong = missed.nonzero().flatten()
    predicted, probability = guesses[0]
    if order == "confident":
        wrong = wrong[probability[wrong].argsort(descending=True, stable=True)]
    chosen = wrong[:count]
    return Mistakes(
        images=data.test_images[chosen],
        true=data.test_labels[chosen],
        predicted=predicted[chosen],
        probability=probability[chosen],
        index=chosen,
        classes=data.classes,
        total=len(wrong),
        tested=len(data.test_labels),
        source=data.source,
        part=data.test_name,
    )


def confusion_matrix(network: Predictor, data: Dataset) -> Tensor:
    """Counts, int64 (classes, classes): row the true class, column the predicted one."""
    predicted, _ = _predictions(network, data)
    classes = len(data.classes)
    pairs = data.test_labels * classes + predicted
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)
