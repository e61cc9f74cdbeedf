"""The L1 penalty on weights, which is added to the loss."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.support.checks import one_of
from normlab.support.filter_banks import are_taken_together, in_memory_order
from normlab.support.tensor_checks import check_weights, trained_parameters

WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
L1_OVER = ("weights", "all")  # what `l1_penalty` sums over


def l1_penalty(
    network: nn.Module,
    layers: tuple[type[nn.Module], ...] = WEIGHT_LAYERS,
    *,
    over: str = "weights",
) -> Tensor:
    """The sum of |w| over the weights of convolution and linear layers: a scalar, differentiable.

    A sum, not a mean for each tensor: its strength does not depend on how weights are split into
    layers. The scales of norms are left out; `layers=(nn.Module,)` includes every layer's `weight`,
    and `over="all"` takes all parameters that are trained, biases and shifts too.

    Source: Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    Raises `ValueError` if the network has no such weight.
    """
    one_of(over, L1_OVER, "l1_over")
    weights = trained_parameters(network) if over == "all" else penalised_weights(network, layers)
    if are_taken_together(weights):
        return torch.cat([in_memory_order(weight).flatten() for weight in weights]).abs().sum()
    return torch.stack([weight.abs().sum() for weight in weights]).sum()


def penalised_weights(
    network: nn.Module, layers: tuple[type[nn.Module], ...] = WEIGHT_LAYERS
) -> list[Tensor]:
    """The weights of the layers of these classes; a shared weight is counted once."""
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
