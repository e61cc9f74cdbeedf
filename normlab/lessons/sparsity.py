"""What the L1 penalty does to the weights: how many become small, and how much it counts."""

import torch
from torch import Tensor, nn

from normlab.penalties import l1_penalty, penalised_weights
from normlab.support.checks import number

SMALL = 1e-3  # a weight below it hardly counts beside those of about 0.1 that networks begin with


def small_weights(network: nn.Module, *, below: float = SMALL) -> float:
    """The share of the weights that `l1_penalty` counts with |w| < `below`, in [0, 1].

    The gradient of |w| is ±1 however small w is, so that a step of SGD carries a weight past 0 and
    the next one back: it ends within about rate · λ of 0, but not at 0.
    """
    number(below, "below", positive=True)
    weights = [weight.detach().flatten() for weight in penalised_weights(network)]
    return float(small_share(torch.cat(weights), below=below))


def small_share(weight: Tensor, *, below: float = SMALL) -> Tensor:
    """The share of a tensor's elements with |w| < `below`: a scalar tensor in [0, 1]."""
    return (weight.abs() < below).double().mean()


def penalty_share(network: nn.Module, loss: float, *, l1: float) -> float:
    """The share of the L1 penalty in the minimised sum: l1 · Σ|w| / (loss + l1 · Σ|w|), in [0, 1].

    `loss` is the mean cross-entropy in nats without the penalty, as `train_epoch` and `fit` report
    it. Raises `ValueError` for a negative loss or factor, and if loss and penalty are both 0.
    """
    loss, l1 = number(loss, "loss"), number(l1, "l1")
    penalty = l1 * float(l1_penalty(network).detach())
    if not loss + penalty:
        raise ValueError("loss and penalty are both 0: there is nothing to have a share of")
    return penalty / (loss + penalty)
