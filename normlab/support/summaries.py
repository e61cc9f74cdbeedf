"""What a network consists of, in numbers and words: its parameters, its work, its norms."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from normlab.support.module_state import modes_kept
from normlab.support.tensor_checks import check_weights


def count_parameters(network: nn.Module) -> int:
    """How many numbers the network learns, a shared one counted once."""
    check_weights(network)
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def multiply_adds(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the convolution and linear layers for one image, forward."""
    check_weights(network)
    example, counted = next(network.parameters(), torch.zeros(())), []

    def count(layer: nn.Module, _: tuple, output: Tensor) -> None:
        counted.append(output[0].numel() * layer.weight[0].numel())

    with torch.no_grad(), modes_kept(network), ExitStack() as stack:
        for layer in network.eval().modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                stack.callback(layer.register_forward_hook(count).remove)
        network(example.new_zeros(1, *input_shape))
    return sum(counted)


def described_norm(layer: nn.Module) -> str:
    """What a layer that normalises is and averages over: "GroupNorm of 2 groups over C/G, H, W"."""
    name, groups = type(layer).__name__, getattr(layer, "num_groups", 0)
    if isinstance(layer, nn.BatchNorm2d):
        return f"{name} over N, H, W"
    if isinstance(layer, nn.InstanceNorm2d):
        return f"{name} over H, W"
    if isinstance(layer, nn.GroupNorm):
        return f"{name} of {'1 group over C' if groups == 1 else f'{groups} groups over C/G'}, H, W"
    whole = len(getattr(layer, "normalized_shape", ())) == 3
    return f"{name} over C, H, W" if whole else name
