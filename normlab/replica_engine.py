"""The way through an epoch that several processes share, under `replicas.data_parallel`."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from normlab.data import Batches
from normlab.engine import Counted, CpuEngine, batch_sizes
from normlab.recipes import Recipe
from normlab.replicas import Replicas, replicas, summed
from normlab.synchronized import synchronized, synchronized_by_torch
from normlab.training import EpochResult


class Share:
    """Which images of a batch are this process's: told for each batch as it comes."""

    def __init__(self, here: Replicas) -> None:
        self.here = here
        self.first = self.last = self.total = 0

    def __call__(self, rows: slice) -> slice:
        """The part of the rows of a batch that this process takes."""
        self.total = rows.stop - rows.start
        ranks = (self.here.rank, self.here.rank + 1)
        self.first, self.last = (self.total * rank // self.here.count for rank in ranks)
        return slice(rows.start + self.first, rows.start + self.last)

    @property
    def weight(self) -> float:
        """What a mean over the share counts in a mean over processes."""
        return (self.last - self.first) * self.here.count / self.total


class ReplicaEngine(CpuEngine):
    """The plain loop on this process's share of every batch; `DistributedDataParallel` around it.

    Order, augmentation and dropout are those of the whole batch. DDP averages the gradients of the
    processes, so the loss of each counts by its share. The loop is that of a CPU on GPUs as well.
    """

    name = "data-parallel"

    def __init__(self, network: nn.Module, recipe: Recipe, train: Batches, test: Batches) -> None:
        super().__init__(network, recipe, train, test)
        here = replicas()
        check_shares(len(train.images), train.batch_size, len(test.images))
        self.share = train.own = Share(here)
        test.own = Share(here)
        mean_loss = self.loss
        self.loss = lambda logits, labels: mean_loss(logits, labels) * self.share.weight

    @contextmanager
    def around(self) -> Iterator[None]:
        with super().around(), self._statistics(), warnings.catch_warnings():
            # 1×1 filters are of both layouts, and DDP takes the other one than autograd.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            # The name is on its way out, but there is no other in all versions of torch.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            # Made anew for every epoch: DDP keeps to the layout that the weights have by now.
            # Its buffers need not be sent at every step: `test` sends them when they are used.
            self.model = DistributedDataParallel(self.network, broadcast_buffers=False)
            yield

    def _statistics(self) -> AbstractContextManager[None]:
        """Makes batch normalization take the statistics of all processes, where that is asked."""
        if not replicas().sync_batch_norm:
            return nullcontext()
        return (synchronized_by_torch if self.device.type == "cuda" else synchronized)(self.network)

    def train(self, counted: Counted) -> EpochResult:
        try:
            return _combined(super().train(counted))
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise ValueError(
                f"some parameters of {type(self.network).__name__} have no part in its output, "
                "which several processes cannot train: remove those layers, or use one process"
            ) from error

    def test(self) -> EpochResult:
        for buffer in self.network.buffers():  # those of the first process are what is kept
            torch.distributed.broadcast(buffer, src=0)
        return _combined(super().test())


def check_shares(training: int, batch_size: int, test: int) -> None:
    """Raises `ValueError` if a batch of so many training images has fewer than processes."""
    count = replicas().count
    fewest = min(*(size for _, size in batch_sizes(training, batch_size)), test)
    if fewest < count:
        raise ValueError(
            f"{count} processes cannot share a batch of {fewest} images: use fewer processes, or "
            "another batch_size"
        )


def _combined(own: EpochResult) -> EpochResult:
    """The means over the images of all processes."""
    sums = (own.loss * own.images, own.accuracy * own.images, own.penalty * own.images)
    loss, right, penalty, images = summed(*sums, own.images)
    return EpochResult(loss / images, right / images, penalty / images, int(images), own.seconds)
