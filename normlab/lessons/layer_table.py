"""The table of a network's layers, and how far each of them sees."""

import contextlib
import io
import math
import re

import torch
from torch import Tensor, nn

from normlab.norms import is_norm
from normlab.support.checks import image_shape
from normlab.support.module_state import copied
from normlab.support.seeding import fork_random_state
from normlab.support.tensor_checks import check_weights


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
    as an input counts. The statistics of norms, which reach over the whole image, are left out.
    """
    twin, found = copied(network).cpu().float().eval(), []

    def look(_: nn.Module, __: tuple, output: Tensor) -> None:
        rows = output[:, :, output.shape[2] // 2] if output.dim() == 4 else None
        found.append(None if rows is None else int(rows.isnan().flatten(1).any(1).sum()))

    for layer in list(twin.modules()):
        if is_norm(layer):
            layer.forward = lambda images, *_, **__: images
        if layer is not twin and not isinstance(layer, nn.Sequential | nn.ModuleList):
            layer.register_forward_hook(look)  # where torchsummary has a row
    channels, height, width = input_size
    images = torch.zeros(height, channels, height, width)
    images[range(height), :, range(height)] = math.nan
    twin(images)
    return found
