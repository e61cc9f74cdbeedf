"""Penalties on weights that are added to the loss, and what they do to the weights."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.support.checks import number
from normlab.support.network_checks import check_weights

WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)

SMALL = 1e-3  # a weight below it hardly counts beside those of about 0.1 that networks begin with


def l1_penalty(network: nn.Module, layers: tuple[type[nn.Module], ...] = WEIGHT_LAYERS) -> Tensor:
    """The sum of |w| over the weights of convolution and linear layers: a scalar, differentiable.

    A sum, not a mean for each tensor: its strength does not depend on how weights are split into
    layers. The scales of norms are left out; `layers=(nn.Module,)` includes every layer's `weight`.

    Source: Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    Raises `ValueError` if the network has no such weight.
    """
    return torch.stack([weight.abs().sum() for weight in _weights(network, layers)]).sum()


def _weights(network: nn.Module, layers: tuple[type[nn.Module], ...]) -> list[Tensor]:
    """The weights of the layers, shared ones once."""
    chosen = (layer for layer in network.modules() if isinstance(layer, layers))
    # Asked for once each: a parametrized weight is computed anew, as another tensor, every time.
    found = (getattr(layer, "weight", None) for layer in chosen)
    weights = {id(weight): weight for weight in found if isinstance(weight, Tensor)}
    if any(map(is_lazy, weights.values())):
        check_weights(network)
    if not weights:
        names = ", ".join(layer.__name__.lstrip("_") for layer in layers)
        raise ValueError(f"{type(network).__name__} has no weights of {names} layers to penalise")
    return list(weights.values())


def small_weights(network: nn.Module, *, below: float = SMALL) -> float:
    """The share of the weights that `l1_penalty` counts with |w| < `below`, in [0, 1].

    The gradient of |w| is ±1 however small w is, so that a step of SGD carries a weight past 0 and
    the next one back: it comes to lie below some rate · λ, and not at 0.
    """
    number(below, "below", positive=True)
    weights = [weight.detach().flatten() for weight in _weights(network, WEIGHT_LAYERS)]
    return float(small_share(torch.cat(weights), below=below))


def small_share(weight: Tensor, *, below: float = SMALL) -> Tensor:
    """The share of a tensor's elements with |w| < `below`: a scalar tensor in [0, 1]."""
    return (weight.abs() < below).double().mean()


def penalty_share(network: nn.Module, loss: float, *, l1: float) -> float:
    """The share of the penalty in what was minimised: l1 · Σ|w| / (loss + l1 · Σ|w|), in [0, 1].

    `loss` is the mean cross-entropy in nats without the penalty, as `train_epoch` and `fit` report
    it. Raises `ValueError` for a negative loss or factor, and where there is nothing to share.
    """
    loss, l1 = number(loss, "loss"), number(l1, "l1")
    penalty = l1 * float(l1_penalty(network).detach())
    if not loss + penalty:
        raise ValueError("loss and penalty are both 0: there is nothing to have a share of")
    return penalty / (loss + penalty)
