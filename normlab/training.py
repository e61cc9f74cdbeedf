"""The loops that train and test a network for one epoch."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.checks import number
from normlab.penalties import l1_penalty


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
        self._right.append((logits.argmax(1) == labels).sum())
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


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are; the CPU if it has none."""
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every layer is in the mode it was in before."""
    modes = [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


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

    The reported loss is the plain cross-entropy, whatever `loss` is minimised.
    Raises `ValueError` for an `l1` below 0.
    """
    number(l1, "l1")  # finite and not negative
    device = device_of(network)
    tally = Tally()
    network.train()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits = network(images)
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
    """
    device = device_of(network)
    tally = Tally()
    with evaluating(network):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            tally.add(network(images), labels)
    return tally.result()


test_epoch.__test__ = False  # its name looks like a test to pytest
