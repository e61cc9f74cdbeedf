"""The plain way through an epoch: the loops of `training.py`, as a student would call them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from normlab.data import BatchLoader, Dataset
from normlab.recipes import DTYPES, SCHEDULES, Recipe, make_optimizer
from normlab.support.seeding import seeded
from normlab.training import EpochResult, test_epoch, train_epoch

Counted = Callable[[Iterable], Iterator]
"""Hands on the batches of an epoch and counts them for a display."""


class PlainEngine:
    """Trains and tests a network, an epoch for each `launch` and `collect`.

    The other engines are quicker and compute the same, each by the same `train_step`.
    """

    name = "plain"
    layout = torch.contiguous_format  # of images and weights

    def __init__(
        self, network: nn.Module, recipe: Recipe, train: BatchLoader, test: BatchLoader
    ) -> None:
        self.network, self.recipe, self.batches, self.tests = network, recipe, train, test
        self.device = train.images.device
        self.steps = len(train)
        self.all_steps = recipe.epochs * self.steps
        self.optimizer = self.make_optimizer()
        self.step_options = step_options(recipe)
        self.epoch, self.scale = 0, 1.0

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, whose state is kept in checkpoints."""
        return make_optimizer(self.network, self.recipe)

    def prepare(self) -> str:
        """Gets ready for the first epoch; says what is in the way, if anything."""
        return ""

    def lay_out(self) -> None:
        """Lays the network and its images out in memory as this engine is quickest."""
        self.network.to(memory_format=self.layout)
        self.batches.memory_format = self.tests.memory_format = self.layout

    def launch(self, epoch: int, scale: float = 1.0) -> Iterator[None]:
        """Starts an epoch, where the device works on its own; otherwise only notes its number.

        The learning rates of the recipe's schedule are multiplied by `scale`. From each `next` to
        another a part is enqueued, and then it is the turn of those that train at once.
        """
        self._set_epoch(epoch, scale)
        yield

    def _set_epoch(self, epoch: int, scale: float) -> None:
        self.epoch = self.batches.epoch = epoch
        self.scale = scale

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        """The results of training and testing in the epoch that was launched."""
        done = self.epoch * self.steps
        recipe = self.recipe.replace(lr=self.recipe.lr * self.scale)
        scheduler = make_scheduler(self.optimizer, recipe, self.all_steps, done=done)
        batches, options = counted(self.batches), {"scheduler_steps": "batch", **self.step_options}
        with self.random_state():
            train = train_epoch(
                self.network, batches, self.optimizer, scheduler=scheduler, **options
            )
            return train, test_epoch(self.network, self.tests)

    def do_epoch(self, epoch: int) -> tuple[EpochResult, EpochResult]:
        """Trains and tests for an epoch, with nobody to take turns with."""
        for _ in self.launch(epoch):
            pass
        return self.collect(iter)

    def close(self) -> None:
        """Leaves the network as a student's loop would, after the last epoch or an error."""

    def last_rate(self, epoch: int) -> float:
        """The learning rate of the last step of an epoch."""
        return self.recipe.rate_at((epoch + 1) * self.steps - 1, self.all_steps) * self.scale

    def random_state(self) -> AbstractContextManager[None]:
        """The state from which this epoch's dropout is drawn."""
        return seeded(self.recipe.seed, "dropout", self.epoch, device=self.device)


AUTOCAST = {"bfloat16": torch.bfloat16}  # what the forward pass of a step computes in, if another


def step_options(recipe: Recipe) -> dict:
    """What `train_step` is told by the recipe."""
    loss = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    l1 = {"l1": recipe.l1, "l1_over": recipe.l1_over}
    return {"loss": loss, **l1, "autocast": AUTOCAST.get(recipe.dtype)}


def training_batches(data: Dataset, recipe: Recipe, device: torch.device) -> BatchLoader:
    """The training images as the recipe takes them."""
    options = {"augment": recipe.augment, "seed": recipe.seed, "dtype": DTYPES[recipe.dtype]}
    return data.loader(batch_size=recipe.batch_size, device=device, **options)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, *, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler to step after every batch, for `steps` batches of which some are `done`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.lr
    factor = functools.partial(SCHEDULES[recipe.schedule], steps=steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)
