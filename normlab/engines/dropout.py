"""Dropout whose mask is drawn by the word instead of one number for each element."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normlab.engines.forwards import replaced_forward


class _Dropout(torch.autograd.Function):
    """x · mask / (1 − p), with mask / (1 − p) kept for the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, probability: float) -> Tensor:
        factors = _random_factors(x, probability)
        ctx.save_for_backward(factors)
        return x * factors

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def _random_factors(x: Tensor, probability: float) -> Tensor:
    """Factors laid out as x: 0 with `probability`, the others so large that their mean is 1.

    torch's own mask takes one number from a serial generator for each element, which is 35 to 40 %
    of a step of these networks. Here each draw of 64 bits serves four elements; the probability
    is thereby a multiple of 2⁻¹⁶, and the scale is that of the probability in fact used.
    """
    elements = x.numel()
    words = torch.empty(-(-elements // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None)  # all 64 bits; without the bounds the sign bit would stay 0
    dropped = _lanes(probability)
    factors = torch.empty(elements, dtype=x.dtype, device=x.device)
    # Compared and converted in one pass; products with a boolean would take twice as long.
    torch.ge(words.view(torch.int16)[:elements], dropped - 2**15, out=factors)
    factors.mul_(1 / (1 - dropped / 2**16))
    return factors.as_strided(x.shape, x.stride())


def _lanes(probability: float) -> int:
    """How many of the 2¹⁶ values of an element's share of a draw drop it."""
    return round(probability * 2**16)


def _keeps(probability: float) -> bool:
    """Whether some elements are kept at all; where not, torch is as quick."""
    return _lanes(probability) < 2**16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Sets elements to 0 with `probability` and scales the others so that the mean stays.

    Source: Srivastava et al., "Dropout", 2014.
    """
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return _Dropout.apply(x, probability)


@contextmanager
def quick_dropout(network: nn.Module) -> Iterator[None]:
    """Inside the block the network's `nn.Dropout` layers draw their masks the quick way."""
    layers = [layer for layer in network.modules() if type(layer) is nn.Dropout and _keeps(layer.p)]

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        if not layer.training or not layer.p:
            return x
        y = dropout(x, layer.p)
        return x.copy_(y) if layer.inplace else y  # what it returns may not be used

    with replaced_forward(layers, forward):
        yield
