"""The ways through an epoch. They compute what the plain loop computes; `engines.py` chooses one.

`PlainEngine` is the loop of `training.py`. `CpuEngine` is the same loop with the tensors laid out
channels last, a dropout that draws its mask from random bits by the word, and memory that stays
with the process.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from normlab.data import BatchLoader
from normlab.engines.allocator import kept_memory
from normlab.engines.dropout import quick_dropout
from normlab.recipes import Recipe, make_optimizer, make_scheduler, schedule_factor
from normlab.support.seeding import seeded
from normlab.training import EpochResult, test_epoch, train_epoch

Counted = Callable[[Iterable], Iterator]
"""Hands on the batches of an epoch and counts them for a display."""


class PlainEngine:
    """The loops of `training.py`, as a student would call them."""

    name = "plain"

    def __init__(
        self, network: nn.Module, recipe: Recipe, train: BatchLoader, test: BatchLoader
    ) -> None:
        self.network, self.recipe, self.batches, self.tests = network, recipe, train, test
        self.model = network  # what is called in training
        self.device = train.images.device
        self.computes_in = recipe.dtype  # "bfloat16" where matrix products are in half precision
        self.steps = len(train)
        self.optimizer = self.make_optimizer()
        self.loss = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        self.epoch = 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, whose state is kept in checkpoints."""
        return make_optimizer(self.network, self.recipe)

    def prepare(self) -> str:
        """Gets ready for the first epoch; says what is in the way, if anything."""
        return ""

    def launch(self, epoch: int) -> None:
        """Starts an epoch, where the device works on its own; otherwise only notes its number."""
        self.epoch = epoch

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        """The results of training and testing in the epoch that was launched."""
        with self.around(), self.random_state():
            return self.train(counted), self.test()

    def train(self, counted: Counted) -> EpochResult:
        """One pass over the training images."""
        self.batches.epoch = self.epoch
        scheduler = make_scheduler(
            self.optimizer,
            self.recipe,
            self.recipe.epochs * self.steps,
            done=self.epoch * self.steps,
        )
        return train_epoch(
            self.model,
            counted(self.batches),
            self.optimizer,
            loss=self.loss,
            scheduler=scheduler,
            l1=self.recipe.l1,
        )

    def test(self) -> EpochResult:
        """One pass over the test images."""
        return test_epoch(self.network, self.tests)

    def close(self) -> None:
        """Leaves the network as a student's loop would, after the last epoch or an error."""

    def last_rate(self, epoch: int) -> float:
        """The learning rate of the last step of an epoch."""
        factor = schedule_factor(self.recipe.schedule, self.recipe.epochs * self.steps)
        return self.recipe.lr * factor((epoch + 1) * self.steps - 1)

    def random_state(self) -> AbstractContextManager[None]:
        """The state from which this epoch's dropout is drawn."""
        return seeded(self.recipe.seed, "dropout", self.epoch, device=self.device)

    def around(self) -> AbstractContextManager[None]:
        """What holds while an epoch runs."""
        return nullcontext()


class CpuEngine(PlainEngine):
    """The plain loop, channels last, with quicker dropout, its memory kept from step to step."""

    name = "cpu-channels-last"

    def prepare(self) -> str:
        self.network.to(memory_format=torch.channels_last)
        self.batches.memory_format = self.tests.memory_format = torch.channels_last
        return ""

    def close(self) -> None:
        self.network.to(memory_format=torch.contiguous_format)

    @contextmanager
    def around(self) -> Iterator[None]:
        with quick_dropout(self.network), kept_memory():
            yield


def batch_sizes(images: int, batch_size: int) -> list[tuple[int, int]]:
    """How many batches of which size an epoch has: whole ones, and perhaps a shorter last."""
    sizes = [(images // batch_size, batch_size), (1, images % batch_size)]
    return [(count, size) for count, size in sizes if count and size]
