"""The step and the loops that train and test a network, on every device."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from normlab.penalties import l1_penalty
from normlab.support.checks import number
from normlab.support.module_state import TRAINED, evaluating, set_training
from normlab.support.schedulers import stepped_after
from normlab.support.tensor_checks import check_logits, check_optimizer, images_and_labels


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the images gave.

    `loss` is the mean cross-entropy in nats and `accuracy` the fraction of images classified
    correctly, every image counted once; `penalty` is what was added to the loss, as a mean over
    images; `seconds` is wall time.
    """

    loss: float
    accuracy: float
    penalty: float
    images: int
    seconds: float


@torch.no_grad()
def batch_sums(
    logits: Tensor, labels: Tensor, penalty: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor | float, int]:
    """The sums over a batch: cross-entropies, correct predictions, penalties, and images.

    The penalty is counted once for each image. The sums stay on the device, so that no step waits
    for the CPU. An image whose logits are NaN is counted as wrong.
    """
    highest, guess = logits.max(1)  # NaN counts as the maximum
    right = ((guess == labels) & ~highest.isnan()).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss, right, penalty * len(labels), len(labels)


def epoch_result(sums: Sequence[Iterable], started: float) -> EpochResult:
    """The means over all images, from the `batch_sums` of each batch; waits for the device."""
    columns = [list(map(torch.as_tensor, column)) for column in zip(*sums, strict=True)]
    totals = [float(torch.stack(column).cpu().double().sum()) for column in columns]
    if not totals or not totals[-1]:
        raise ValueError("there were no batches to loop over")
    images = int(totals.pop())
    return EpochResult(*(t / images for t in totals), images, time.perf_counter() - started)


def train_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    l1: float = 0.0,
    l1_over: str = "weights",
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | float]:
    """One optimisation step on images (B, C, H, W), labels (B,): that of `fit` on every device.

    Args:
        network: maps images to logits (B, classes).
        loss: of (logits, labels), averaged over the batch.
        l1: factor of `l1_penalty`, which is added to the loss.
        l1_over: what it sums over: "weights", or "all" parameters.
        autocast: `torch.bfloat16` for mixed precision: convolutions and linear layers compute in
            it, while weights and loss stay in float32.

    Returns the logits, which are those of before the step, and the penalty.
    Raises `ValueError` for an `l1` below 0 and for logits of another shape.
    """
    number(l1, "l1")  # finite and not negative
    precision = nullcontext()
    if autocast is not None:  # a cast weight that is cached would never change in a CUDA graph
        precision = torch.autocast(images.device.type, autocast, cache_enabled=False)
    with precision:
        logits = network(images)
    check_logits(network, images, logits)
    logits = logits if autocast is None else logits.float()
    penalty = l1 * l1_penalty(network, over=l1_over) if l1 else 0.0
    optimizer.zero_grad()
    (loss(logits, labels) + penalty).backward()
    optimizer.step()
    return logits.detach(), penalty


@torch.inference_mode(False)
@torch.enable_grad()
def train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: LRScheduler | None = None,
    scheduler_steps: str | None = None,
    **options: object,
) -> EpochResult:
    """Takes a `train_step` for each batch and returns the means over the images.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes).
        batches: gives (images, labels); any `DataLoader` or `Dataset.loader`.
        scheduler: of the learning rate. OneCycleLR and CyclicLR are stepped after every batch;
            StepLR, MultiStepLR, ExponentialLR, ReduceLROnPlateau, and those that end within an
            epoch's number of batches (CosineAnnealingLR, OneCycleLR), after the epoch.
        scheduler_steps: "batch" or "epoch", where the scheduler itself does not tell.
        options: loss, l1, l1_over and autocast, as for `train_step`; the penalty is reported apart
            from the loss.

    ReduceLROnPlateau sees the training loss (or accuracy, if its mode is "max"): to show it
    another, step it yourself. The reported loss is the plain cross-entropy, whatever `loss` is
    minimised. Afterwards the network is in training mode; layers frozen by `.eval()` and
    `.requires_grad_(False)` before keep their mode and their running statistics.
    Warns of trainable parameters that the optimiser leaves out.
    Raises `ValueError` for an optimiser that holds none of them, a scheduler that may count batches
    or epochs, an `l1` below 0, and for batches and logits of other shapes.
    """
    started, sums = time.perf_counter(), []
    check_optimizer(network, optimizer)
    after = None if scheduler is None else stepped_after(scheduler, scheduler_steps, batches)
    set_training(network)
    for batch in batches:
        images, labels = images_and_labels(batch, network)
        logits, penalty = train_step(network, images, labels, optimizer, **options)
        if after == "batch":
            scheduler.step()
        sums.append(batch_sums(logits, labels, penalty))
    result = epoch_result(sums, started)
    if after == "epoch" and isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(result.accuracy if scheduler.mode == "max" else result.loss)
    elif after == "epoch":
        scheduler.step()
    TRAINED.add(network)
    return result


@torch.no_grad()
def test_epoch(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> EpochResult:
    """Measures the network in evaluation mode; afterwards it is in the mode it was in before.

    The arguments are as for `train_epoch`. Batch normalization with
    `track_running_stats=False` has no other statistics than those of a batch: then the result
    depends on the batches.
    """
    started, sums = time.perf_counter(), []
    with evaluating(network):
        for batch in batches:
            images, labels = images_and_labels(batch, network)
            logits = network(images)
            check_logits(network, images, logits)
            sums.append(batch_sums(logits, labels))
    return epoch_result(sums, started)


test_epoch.__test__ = False  # its name looks like a test to pytest


def train_epochs(engine: object, history: list, counted: Callable) -> Iterator[dict | None]:
    """The loop of `fit` over a `History`: gives its rows, and None where others have a turn."""
    for epoch in range(len(history), engine.recipe.epochs):
        factor = engine.recipe.plateau_factor([row["train_loss"] for row in history])
        yield from engine.launch(epoch, factor)  # on a GPU it enqueues the epoch
        train, test = engine.collect(counted)  # of `train_epoch` and `test_epoch`
        yield history.add(train, test, lr=engine.last_rate(epoch))
