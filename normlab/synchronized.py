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


def synchronized_batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What `layer` gives in training for this process's share x (N, C, H, W) of a batch.

    Shares may be of different sizes, even empty. The layer's running statistics move as they
    would in one process with the whole batch.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, over the whole batch.
    """
    channels = x.shape[1]
    own = x.new_tensor([x.numel() // channels])
    sums = sum_over_processes(torch.cat([x.sum(dim=(0, 2, 3)), own]))
    count = sums[-1].detach()
    mean = sums[:-1] / count  # (C,)
    centred = x - mean.view(1, -1, 1, 1)
    variance = sum_over_processes((centred**2).sum(dim=(0, 2, 3))) / count  # (C,)
    _move_running_statistics(layer, mean.detach(), variance.detach() * count / (count - 1))
    y = centred / torch.sqrt(variance + layer.eps).view(1, -1, 1, 1)
    if layer.affine:
        y = y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    return y


@torch.no_grad()
def _move_running_statistics(layer: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    share = 1 / layer.num_batches_tracked.item() if momentum is None else momentum
    layer.running_mean.lerp_(mean, share)
    layer.running_var.lerp_(unbiased, share)


@contextmanager
def synchronized(network: nn.Module) -> Iterator[None]:
    """Inside the block the network's batch normalizations take the whole batch in training."""
    layers = [layer for layer in network.modules() if type(layer) is nn.BatchNorm2d]

    def forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if not layer.training:
            return nn.BatchNorm2d.forward(layer, x)
        return synchronized_batch_norm(layer, x)

    with replaced_forward(layers, forward):
        yield
