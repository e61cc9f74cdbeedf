"""Which elements share statistics in a layer, found by trial."""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normlab.support.checks import instance, whole_number
from normlab.support.seeding import seeded

# How far each element is moved. One step alone may hide what is shared: two numbers that are
# normalised without an epsilon come out as ±1 until the move changes which of them is the larger.
STEPS = (0.5, 5.0, -5.0)


def shared_statistics(
    layer: nn.Module, shape: tuple[int, ...], *, training: bool = True, seed: int = 0
) -> Tensor:
    """Finds by trial which elements of an input share statistics in a layer.

    One element after another is changed a little; where that changes the output of another
    element, the two have a mean or a variance in common. It is tried on a copy, whose learned
    numbers are all replaced: a scale of 0 would hide what is shared.

    Args:
        layer: maps an input to an output of the same shape; it is left as it is.
        shape: of the input, (N, C, H, W) say; the layer is run once for each of its elements.
        training: whether the layer is tried in training mode or as in evaluation.
        seed: of the input that is tried.

    Returns int64 of that shape: elements that share statistics have the same number, from 0 on.
    Raises `TypeError` for what is no layer or no shape, `ValueError` if the layer does not take
    the input or the output is of another shape.
    """
    instance(layer, nn.Module, "a layer", "nn.BatchNorm2d(4), say")
    instance(shape, tuple, "shape", "(N, C, H, W), say")
    for side in shape:
        whole_number(side, "each side of shape")
    twin = _twin(layer, training=training, seed=seed)
    with seeded(seed, "input"):
        x = torch.randn(shape, dtype=torch.float64)
    output, tolerance = _in_some_precision(twin, x, seed)
    before = output(x)
    if before.shape != x.shape:
        raise ValueError(
            f"the layer turns shape {tuple(shape)} into {tuple(before.shape)}: it must keep it"
        )
    touched = torch.eye(x.numel(), dtype=torch.bool)
    for place, step in itertools.product(range(x.numel()), STEPS):
        moved = x.clone()
        moved.view(-1)[place] += step
        change = (output(moved) - before).abs().flatten()
        touched[place] |= change > tolerance * before.abs().max()
    return _components(touched | touched.T).view(shape)


def _twin(layer: nn.Module, *, training: bool, seed: int) -> nn.Module:
    """A copy to be tried, on the CPU, with learned numbers of which none is 0."""
    twin = copy.deepcopy(layer).cpu().train(training)
    with torch.no_grad(), seeded(seed, "parameters"):
        for parameter in twin.parameters():
            parameter.uniform_(0.5, 1.5)
    return twin


def _in_some_precision(
    twin: nn.Module, x: Tensor, seed: int
) -> tuple[Callable[[Tensor], Tensor], float]:
    """What the layer makes of an input, in float64, or float32 where it takes no other.

    With it comes the smallest change that is more than rounding, relative to the largest output.
    Raises `ValueError` if it takes neither.
    """
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        output = _output(twin.to(dtype), dtype, seed)
        try:
            output(x)
        except RuntimeError as error:
            problem = error
        else:
            return output, tolerance
    reason = " ".join(str(problem).split())
    raise ValueError(f"{type(twin).__name__} takes no input of shape {tuple(x.shape)}: {reason}")


def _output(layer: nn.Module, dtype: torch.dtype, seed: int) -> Callable[[Tensor], Tensor]:
    """The layer as a function that gives the same for the same input, however often."""
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    @torch.no_grad()
    def output(x: Tensor) -> Tensor:
        layer.load_state_dict(start)  # running statistics move with every call
        with seeded(seed, "layer"):
            return layer(x.to(dtype)).double()

    return output


def _components(linked: Tensor) -> Tensor:
    """Numbers of the connected parts of a graph, given as a symmetric boolean matrix."""
    numbers = torch.full((len(linked),), -1)
    for first in range(len(linked)):
        if numbers[first] >= 0:
            continue
        part = linked[first]
        while (grown := linked[part].any(0) | part).sum() > part.sum():
            part = grown
        numbers[part] = numbers.max() + 1
    return numbers
