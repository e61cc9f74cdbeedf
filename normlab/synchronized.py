"""Batch normalization whose statistics are those of the whole batch, though processes share it.

torch's `SyncBatchNorm` does this on GPUs and refuses on CPUs. Here it is by hand: the mean is a sum
over all processes divided by the number of values in all, the variance likewise, and both sums are
differentiable, so that the gradient of one process's loss reaches the images of the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normlab.forwards import replaced_forward

BatchNorm = nn.modules.batchnorm._BatchNorm  # of any number of dimensions


class _SumOverProcesses(torch.autograd.Function):
    """y = Σ x over processes. Each x is in every process's y, so its gradient is their sum too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's x, in all of them: differentiable."""
    return _SumOverProcesses.apply(x)


def synchronized_batch_norm(layer: BatchNorm, x: Tensor) -> Tensor:
    """What `layer` gives in training for this process's share x (N, C, ...) of a batch.

    Shares may be of different sizes, even empty. The layer's running statistics move as they
    would in one process with the whole batch.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, over the whole batch.
    """
    layer._check_input_dim(x)
    others = [axis for axis in range(x.dim()) if axis != 1]
    by_channel = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    own = x.new_tensor([x.numel() // x.shape[1]])
    sums = sum_over_processes(torch.cat([x.sum(others), own]))
    count = sums[-1].detach()
    mean = sums[:-1] / count  # (C,)
    centred = x - mean.view(by_channel)
    variance = sum_over_processes((centred**2).sum(others)) / count  # (C,)
    _move_running_statistics(layer, mean.detach(), variance.detach() * count / (count - 1))
    y = centred / torch.sqrt(variance + layer.eps).view(by_channel)
    if layer.affine:
        y = y * layer.weight.view(by_channel) + layer.bias.view(by_channel)
    return y


@torch.no_grad()
def _move_running_statistics(layer: BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    share = 1 / layer.num_batches_tracked.item() if momentum is None else momentum
    layer.running_mean.lerp_(mean, share)
    layer.running_var.lerp_(unbiased, share)


@contextmanager
def synchronized(network: nn.Module) -> Iterator[None]:
    """Inside the block the network's batch normalizations take the whole batch in training.

    Raises `ValueError` for one with a forward of its own, which cannot be replaced.
    """
    layers = _batch_norms(network)

    def forward(layer: BatchNorm, x: Tensor) -> Tensor:
        if layer.training or layer.running_mean is None:
            return synchronized_batch_norm(layer, x)
        return BatchNorm.forward(layer, x)

    with replaced_forward(list(layers.values()), forward):
        yield


@contextmanager
def synchronized_by_torch(network: nn.Module) -> Iterator[None]:
    """The same by torch's `SyncBatchNorm`, whose layers take the place of the network's own."""
    layers = _batch_norms(network)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
    try:
        yield
    finally:  # they have shared their weights and statistics
        for name, layer in layers.items():
            network.set_submodule(name, layer)


def _batch_norms(network: nn.Module) -> dict[str, BatchNorm]:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, BatchNorm)}
    for layer in layers.values():
        if type(layer).forward is not BatchNorm.forward:
            raise ValueError(
                f"{type(layer).__name__} has a forward of its own, so its statistics cannot be "
                "synchronised over processes"
            )
    return layers
