"""The loops that train and test a network for one epoch."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.penalties import l1_penalty
from normlab.support.checks import check_logits, images_and_labels, number
from normlab.support.module_state import modes_kept


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the images gave.

    `loss` is the mean cross-entropy in nats and `accuracy` the fraction of right images, every
    image counted once; `penalty` is the mean of what was added to the loss; `seconds` wall time.
    """

    loss: float
    accuracy: float
    penalty: float
    images: int
    seconds: float


class Tally:
    """Sums over batches that stay on the device, so that no step waits for the host."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._images = 0
        self._losses, self._right, self._penalties = [], [], []

    def add(self, logits: Tensor, labels: Tensor, penalty: Tensor | float = 0.0) -> None:
        """Counts a batch: logits (B, classes), labels (B,), the penalty of the step."""
        logits = logits.detach()
        self._images += len(labels)
        self._losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        self._right.append(right_images(logits, labels))
        self._penalties.append(torch.as_tensor(penalty).detach() * len(labels))

    def result(self) -> EpochResult:
        """The means over all images counted; raises `ValueError` if there were none."""
        if not self._images:
            raise ValueError("there were no batches to loop over")
        loss, right, penalty = (
            float(torch.stack(sums).cpu().double().sum()) / self._images
            for sums in (self._losses, self._right, self._penalties)
        )
        seconds = time.perf_counter() - self._started
        return EpochResult(loss, right, penalty, self._images, seconds)


def right_images(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the labels (B,) the logits (B, classes) give: a scalar. NaN is never right."""
    highest, guess = logits.max(1)  # as a maximum NaN would be the first class
    return ((guess == labels) & ~highest.isnan()).sum()


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are; the CPU if it has none."""
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every layer is in the mode it was in before."""
    with modes_kept(network):
        network.eval()
        yield


def set_training(network: nn.Module) -> None:
    """Training mode, but for frozen layers and what lies in them.

    A layer is frozen if it is in evaluation mode and has parameters, none of which is to be
    trained: `layer.eval().requires_grad_(False)`. So its running statistics stay as they are.
    Raises `ValueError` for a single layer in evaluation mode that has running statistics alone.
    """
    frozen = []
    for name, layer in network.named_modules():
        learns = [weight.requires_grad for weight in layer.parameters()]
        asked = network.training and not layer.training and layer not in frozen
        if asked and not learns and getattr(layer, "running_mean", None) is not None:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) is in evaluation mode, but with "
                "affine=False it has no parameters by which it could be frozen: give it some, or "
                "call train() on it"
            )
        if learns and not any(learns) and not layer.training:
            frozen += [part for part in layer.modules() if not part.training]
    network.train()
    for layer in frozen:
        layer.training = False


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients are computed inside the block, even where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def on_device(batches: Iterable, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, once each is known to be images and labels, on a device."""
    for batch in batches:
        images, labels = images_and_labels(batch)
        yield images.to(device), labels.to(device)


@gradients()
def train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    l1: float = 0.0,
) -> EpochResult:
    """Takes one optimisation step for each batch and returns the means over the images.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes).
        batches: gives (images, labels); any `DataLoader` or `Dataset.loader`.
        loss: of (logits, labels), averaged over the batch.
        scheduler: stepped after every batch, not every epoch.
        l1: factor of `l1_penalty`, which is added to the loss and reported apart from it.

    The reported loss is the plain cross-entropy, whatever `loss` is minimised. Afterwards the
    network is in training mode; layers frozen by `.eval()` and `.requires_grad_(False)` before keep
    their mode and their running statistics.
    Raises `ValueError` for an `l1` below 0, and for batches and logits of other shapes.
    """
    number(l1, "l1")  # finite and not negative
    device = device_of(network)
    tally = Tally()
    set_training(network)
    for images, labels in on_device(batches, device):
        logits = network(images)
        check_logits(network, images, logits)
        penalty = l1 * l1_penalty(network) if l1 else 0.0
        optimizer.zero_grad()
        (loss(logits, labels) + penalty).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        tally.add(logits, labels, penalty)
    return tally.result()


@torch.no_grad()
def test_epoch(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> EpochResult:
    """Measures the network in evaluation mode; afterwards it is in the mode it was in before.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes).
        batches: gives (images, labels); any `DataLoader` or `Dataset.loader`.

    Batch normalization with `track_running_stats=False` has no other statistics than those of a
    batch: then the result depends on the batches.
    Raises `ValueError` for batches and logits of other shapes.
    """
    device = device_of(network)
    tally = Tally()
    with evaluating(network):
        for images, labels in on_device(batches, device):
            logits = network(images)
            check_logits(network, images, logits)
            tally.add(logits, labels)
    return tally.result()


test_epoch.__test__ = False  # its name looks like a test to pytest
