"""What a trained network predicts, and where it is wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.history import Run
from normlab.support.checks import as_list, one_of, whole_number
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
Tested = Dataset | Iterable[tuple[Tensor, Tensor]]
"""What to test on: a data set, or the (images, labels) of any `DataLoader`."""


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
    network: nn.Module, data: Tested, *, train: bool = False, batch_size: int = 512
) -> Tensor:
    """Logits (N, classes) on the CPU for the test images (or, with `train`, the training images).

    Of a `DataLoader`, whose images are taken as it gives them, for all its batches in their order.
    The network is in evaluation mode meanwhile and in its former mode afterwards. Warns where its
    batch normalization keeps no running statistics: then the logits of an image depend on the
    others of its batch, and so on `batch_size`.
    """
    if isinstance(data, Dataset):
        check_network(network, data.input_shape, len(data.classes))
        example = next(network.parameters(), torch.zeros(()))
        place = {"device": example.device, "dtype": example.dtype}
        data = data.loader(train, batch_size, shuffle=False, **place)
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


@dataclass(frozen=True)
class _Images:
    """The images that predictors are tested on, wherever they come from."""

    batches: Tested  # what `predict` takes
    labels: Tensor
    pictures: Callable[[Tensor], Tensor]  # of the indices (K,): uint8 (K, C, H, W)
    inputs: Callable[[Tensor], Tensor]  # of the indices: as a network gets them
    classes: tuple[str, ...]  # none if only the labels are known
    source: str
    part: str = "test"

    def predictions(self, predictor: Predictor) -> tuple[Tensor, Tensor, int]:
        """Class and probability, kept in a run of these images or computed; how many classes."""
        if isinstance(predictor, Run):
            kept = predictor.identity.get("data", {}).get("fingerprint")
            if isinstance(self.batches, Dataset) and kept == self.batches.fingerprint:
                return predictor.predicted, predictor.probability, len(self.classes)
            predictor = predictor.network
        logits = predict(predictor, self.batches)
        width = logits.shape[1]
        check_labels(self.labels, "labels", len(logits), width)
        if self.classes and len(self.classes) != width:
            raise ValueError(f"{len(self.classes)} class names do not fit {width} logits an image")
        return *class_and_probability(logits), width


def _images_of(
    data: Tested,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    show: Callable[[Tensor], Tensor] | None = None,
) -> _Images:
    """The test images of a data set, or all of a `DataLoader`, which are held in memory."""
    if isinstance(data, Dataset):
        changes = {"classes": classes, "mean": mean, "std": std}
        if changes := {name: value for name, value in changes.items() if value is not None}:
            data = replace(data, **changes)
        about = (data.classes, data.source, data.test_name)
        pictures, batch = data.test_images.__getitem__, data.loader(train=False).batch
        return _Images(data, data.test_labels, pictures, lambda index: batch(index, [])[0], *about)
    batches = [images_and_labels(batch) for batch in data]
    if not batches:
        raise ValueError("there were no batches to loop over")
    images, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    named = classes if classes is not None else getattr(_dataset_of(data), "classes", ())
    source = type(_dataset_of(data)).__name__
    show = show or partial(_unnormalised, mean=mean, std=std)
    return _Images(
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
    while isinstance(found, torch.utils.data.Subset):
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


def find_mistakes(network: Predictor, data: Tested, count: int = 10, **options: object) -> Mistakes:
    """Up to `count` test images that the network, or the run's network, gets wrong.

    Takes the options of `find_common_mistakes`.
    """
    return find_common_mistakes([network], data, count, **options)


def find_common_mistakes(
    networks: Mapping[str, Predictor] | Iterable[Predictor],
    data: Tested,
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
    images = _images_of(data, classes, mean, std, show)
    guesses = [images.predictions(predictor) for predictor in predictors]
    missed = torch.stack([predicted != images.labels for predicted, *_ in guesses]).all(0)
    wrong = missed.nonzero().flatten()
    predicted, probability, width = guesses[0]
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
        classes=images.classes or tuple(map(str, range(width))),
        total=len(wrong),
        tested=len(images.labels),
        source=images.source,
        part=images.part,
        heat=heat,
    )


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor, *, layer: str) -> Tensor:
    """Where a layer's outputs speak for a class: (K, H, W) in [0, 1], the most at each image's 1.

    The outputs are weighted by the mean gradients of the class's logit; what speaks against it is
    0. Source: Selvaraju et al., "Grad-CAM", 2017.

    Args:
        images: (K, C, H, W) as the network gets them.
        classes: (K,) int64.
        layer: a name among `network.named_modules()`, of a layer whose outputs are images.
    """
    layers, kept = dict(network.named_modules()), []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # a ReLU may work in place

    hook = layers[one_of(layer, layers, "layer")].register_forward_hook(keep)
    try:
        with evaluating(network), torch.inference_mode(False), torch.enable_grad():
            example = next(network.parameters())
            logits = network(images.clone().to(example).requires_grad_())
            chosen = logits.gather(1, classes.to(example.device).view(-1, 1)).sum()
            (gradients,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        hook.remove()
    if gradients.dim() != 4:
        raise ValueError(f"layer {layer!r} makes no images, but {tuple(gradients.shape)}")
    heat = (gradients.mean((2, 3), keepdim=True) * kept[-1]).sum(1, keepdim=True).relu().detach()
    heat = heat / heat.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return F.interpolate(heat, images.shape[2:], mode="bilinear").squeeze(1).cpu()


def confusion_matrix(
    network: Predictor,
    data: Tested,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Counts, int64 (classes, classes): row the true class, column the predicted one.

    `data` is a `Dataset`, which `mean` and `std` normalise in another way than its own, or any
    batches of (images, labels), which are taken as they are.
    """
    return _confusion(network, _images_of(data, None, mean, std))


def _confusion(network: Predictor, images: _Images) -> Tensor:
    predicted, _, classes = images.predictions(network)
    pairs = images.labels * classes + predicted
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_accuracy(
    network: Predictor,
    data: Tested,
    classes: Sequence[str] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, float]:
    """The fraction of images classified correctly, by class; NaN for a class without images.

    `data`, `mean` and `std` are as for `confusion_matrix`.
    """
    images = _images_of(data, classes, mean, std)
    counts = _confusion(network, images)
    shares = (counts.diagonal() / counts.sum(1)).tolist()
    return dict(zip(images.classes or map(str, range(len(shares))), shares, strict=True))
