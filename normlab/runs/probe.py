"""What a network computes for a few made-up images: it tells networks apart that look the same.

An attribute, a global function that `forward` uses, a hook, a frozen normalization: none of them
shows in the layers and their weights.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normlab.support.module_state import copied, evaluating, set_training
from normlab.support.seeding import generator, seeded

IMAGES = 2
# How far apart the same logits may be, relative to the largest one. Processors, numbers of threads
# and versions of torch add in other orders: 10⁻⁶ for a few layers, 10⁻⁴ for many of them.
LOGITS_APART = 1e-3

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_DROPOUTS += (F.alpha_dropout, F.feature_alpha_dropout)


def probe(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, list[float]]:
    """Logits for images of a shape (C, H, W) in "evaluation" and "training", one after another.

    They are computed on the CPU by copies of the network, which stays as and where it is, like all
    random states, with weights that are drawn, the same for all networks: so the logits do not
    depend on those that there are. Left out is what cannot be computed, is no number, or depends
    on chance: all but dropout, whose place a fixed pattern takes.
    """
    images = torch.rand(IMAGES, *shape, generator=generator(0, "probe")).to(dtype)
    first, second = (_in_both_modes(network, images, seed) for seed in (0, 1))
    return {
        mode: logits
        for mode, logits in first.items()
        if mode in second and not are_apart(logits, second[mode])
    }


def are_apart(one: object, other: object, limit: float = LOGITS_APART) -> bool:
    """Whether two lists of logits are of networks that compute something else."""
    try:
        one, other = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    except (TypeError, ValueError, RuntimeError):  # from a damaged file
        return True
    if one.shape != other.shape:
        return True
    return not (one - other).abs().max() <= limit * other.abs().max()  # as NaN is not


def _in_both_modes(network: nn.Module, images: Tensor, seed: int) -> dict[str, list[float]]:
    """The logits by mode, those that are numbers; none if the network cannot be copied."""
    found = {}
    with torch.no_grad(), warnings.catch_warnings(), _seeded(seed), _PatternForDropout():
        warnings.simplefilter("ignore")
        with suppress(Exception):  # of a student's code, which may raise anything
            twin = copied(network).to("cpu", images.dtype)
            _draw_weights(twin)
            with evaluating(twin):
                found["evaluation"] = _six_digits(twin(images))
            set_training(twin)
            found["training"] = _six_digits(twin(images))
    return {mode: logits for mode, logits in found.items() if all(map(math.isfinite, logits))}


def _six_digits(logits: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in logits.flatten().tolist()]


def _draw_weights(network: nn.Module) -> None:
    """About as large as networks begin with: weights that are 0 would hide what lies before."""
    random = generator(0, "probe", "weights")
    for weight in network.parameters():
        size = (weight[0].numel() if weight.dim() > 1 else 1) ** -0.5
        weight.copy_(size * torch.randn(weight.shape, generator=random))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the random numbers of torch, Python and NumPy follow from the seed."""
    # NumPy's old generator, since that is the one that a network may use without holding it.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with seeded(seed, "probe"):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


class _PatternForDropout(TorchFunctionMode):
    """Inside, dropout multiplies by fixed numbers: random ones differ between processors."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        function = _faded if function in _DROPOUTS else function
        return function(*args, **(kwargs or {}))


def _faded(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    factors = torch.linspace(1 - p, 1 + p, input.numel(), dtype=input.dtype)
    return input * factors.view(input.shape)
