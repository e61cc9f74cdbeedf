"""Dropout whose mask is drawn by the word instead of one number for each element."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

VALUES = 2**16  # of an element's share of a draw; a probability is a multiple of one in so many


class _Dropout(torch.autograd.Function):
    """x · mask / (1 − p), with mask / (1 − p) kept for the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, probability: float) -> Tensor:
        factors = _random_factors(x, probability)
        ctx.save_for_backward(factors)
        return (x * factors).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * ctx.saved_tensors[0]).to(gradient.dtype), None


def _random_factors(x: Tensor, probability: float) -> Tensor:
    """Factors laid out as x: 0 with `probability`, the others so large that their mean is 1.

    torch's own mask takes one number from a serial generator for each element, which is 35 to 40 %
    of a step of these networks. Here each draw of 64 bits serves four elements; the scale is that
    of the probability in fact used, and in half precision as exact as in float32.
    """
    elements = x.numel()
    words = torch.empty(-(-elements // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None)  # all 64 bits; without the bounds the sign bit would stay 0
    dropped = round(probability * VALUES)
    exact = torch.promote_types(x.dtype, torch.float32)
    factors = torch.empty(elements, dtype=exact, device=x.device)
    # Compared and converted in one pass; products with a boolean would take twice as long.
    torch.ge(words.view(torch.int16)[:elements], dropped - VALUES // 2, out=factors)
    factors.mul_(1 / (1 - dropped / VALUES))
    return factors.as_strided(x.shape, x.stride())


def dropout(x: Tensor, probability: float) -> Tensor:
    """Sets elements to 0 with `probability` and scales the others so that the mean stays.

    Source: Srivastava et al., "Dropout", 2014.
    """
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return _Dropout.apply(x, probability)


def _forward(layer: nn.Dropout, x: Tensor) -> Tensor:
    if not layer.training or not layer.p:
        return x
    y = dropout(x, layer.p)
    return x.copy_(y) if layer.inplace else y  # what it returns may not be used


@contextmanager
def quick_dropout(network: nn.Module) -> Iterator[None]:
    """Inside the block the network's `nn.Dropout` layers draw their masks the quick way.

    But for those that drop about everything. Names, hooks and all that is stored stay as they are.
    """
    layers = [layer for layer in network.modules() if type(layer) is nn.Dropout]
    layers = [layer for layer in layers if round(layer.p * VALUES) < VALUES]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
