"""What a network consists of: the table of its layers, its norms, its parameters and its work."""

import contextlib
import io
import math
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


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalises: one of torch's, or of one's own with "Norm" at its name's end."""
    name = type(layer).__name__.lower()
    return bool(re.search(r"norm(alization)?[1-3]?d?$", name)) and not list(layer.children())


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


def summary(
    network: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    device: str | torch.device | None = None,
    receptive_field: bool = False,
    input_shape: tuple[int, int, int] | None = None,
) -> int:
    """Prints torchsummary's table for images of `input_size` (C, H, W); returns the parameters.

    The table is made from a copy on the CPU: weights, running statistics, training mode and the
    random state stay as they are. torchsummary counts shared layers twice and misses parameters
    not named weight or bias; where that happens, a line below the table says so, and the number
    returned is the right one.

    Args:
        device: taken for calls written for torchsummary; the table is the same on every device.
        receptive_field: adds how many rows of the image each layer sees (`receptive_fields`).
        input_shape: another name of `input_size`.
    """
    import torchsummary

    input_size = image_shape(input_size if input_shape is None else input_shape)
    check_weights(network)
    twin = copied(network).cpu().float()
    parameters = sum(weight.numel() for weight in network.parameters())
    printed = io.StringIO()
    with fork_random_state(torch.device("cpu")), contextlib.redirect_stdout(printed):
        try:
            torchsummary.summary(twin, input_size, device="cpu")
        except AttributeError:  # it cannot add up a table in which it found no weight
            print("torchsummary finds no layer with weights.")
        except RuntimeError as error:
            name = type(network).__name__
            raise ValueError(f"{name} cannot take images of {input_size}: {error}") from error
    table = printed.getvalue()
    if receptive_field:
        seen = iter(receptive_fields(network, input_size))
        row = re.compile(r"(?<=\n)( *\w+-\d+ .*)")
        table = table.replace("Param #\n", "Param #     Sees\n")
        table = row.sub(lambda found: f"{found[1]} {next(seen) or '':>8}", table)
    print(table, end="")
    counted = re.search(r"Total params: ([\d,]+)", table)
    if counted is None or int(counted[1].replace(",", "")) != parameters:
        print(f"torchsummary counts shared or unusual layers wrongly: it is {parameters:,}.")
    return parameters


@torch.no_grad()
def receptive_fields(network: nn.Module, input_size: tuple[int, int, int]) -> list[int | None]:
    """How many rows of the image each layer's middle output depends on, in the order of calls.

    None for outputs that are no images. Found by images in which one row is NaN: it spreads as far
    as an input counts. The statistics of GN, LN and IN, which reach over the whole image, are left
    out.
    """
    twin, found = copied(network).cpu().float().eval(), []
    spreading = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)

    def look(_: nn.Module, __: tuple, output: Tensor) -> None:
        rows = output[:, :, output.shape[2] // 2] if output.dim() == 4 else None
        found.append(None if rows is None else int(rows.isnan().flatten(1).any(1).sum()))

    for layer in list(twin.modules()):
        if isinstance(layer, spreading):
            layer.forward = lambda images: images
        if layer is not twin and not isinstance(layer, nn.Sequential | nn.ModuleList):
            layer.register_forward_hook(look)  # where torchsummary has a row
    channels, height, width = input_size
    images = torch.zeros(height, channels, height, width)
    images[range(height), :, range(height)] = math.nan
    twin(images)
    return found
