"""Penalties on weights that are added to the loss."""

import torch
from torch import Tensor, nn

WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def l1_penalty(network: nn.Module, layers: tuple[type[nn.Module], ...] = WEIGHT_LAYERS) -> Tensor:
    """The sum of |w| over the weights of convolution and linear layers: a scalar, differentiable.

    A sum, not a mean for each tensor: its strength does not depend on how weights are split into
    layers. The scales of the normalizations are left out, since shrinking them is another thing
    than sparsity; `layers=(nn.Module,)` includes every layer's `weight`.

    Source: Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    Raises `ValueError` if the network has no such weight.
    """
    weights = {
        id(layer.weight): layer.weight
        for layer in network.modules()
        if isinstance(layer, layers) and isinstance(getattr(layer, "weight", None), Tensor)
    }
    if not weights:
        names = ", ".join(layer.__name__.lstrip("_") for layer in layers)
        raise ValueError(f"{type(network).__name__} has no weights of {names} layers to penalise")
    return torch.stack([weight.abs().sum() for weight in weights.values()]).sum()
