"""What a network consists of: the table of its layers, its parameters and its work."""

import contextlib
import io
import re
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from normlab.support.checks import image_shape
from normlab.support.module_state import copied, modes_kept
from normlab.support.seeding import fork_random_state
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


def summary(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Prints torchsummary's table for images of `input_shape` (C, H, W); returns the parameters.

    The table is made from a copy on the CPU: weights, running statistics, training mode and the
    random state stay as they are. torchsummary counts shared layers twice and misses parameters
    not named weight or bias; where that happens, a line below the table says so, and the number
    returned is the right one.
    """
    import torchsummary

    input_shape = image_shape(input_shape)
    check_weights(network)
    twin = copied(network).cpu().float()
    parameters = sum(weight.numel() for weight in network.parameters())
    printed = io.StringIO()
    with fork_random_state(torch.device("cpu")), contextlib.redirect_stdout(printed):
        try:
            torchsummary.summary(twin, input_shape, device="cpu")
        except AttributeError:  # it cannot add up a table in which it found no weight
            print("torchsummary finds no layer with weights.")
        except RuntimeError as error:
            name = type(network).__name__
            raise ValueError(f"{name} cannot take images of {input_shape}: {error}") from error
    print(printed.getvalue(), end="")
    counted = re.search(r"Total params: ([\d,]+)", printed.getvalue())
    if counted is None or int(counted[1].replace(",", "")) != parameters:
        print(f"torchsummary counts shared or unusual layers wrongly: it is {parameters:,}.")
    return parameters
