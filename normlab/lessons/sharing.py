"""Which elements share statistics in a layer, found by trial."""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normlab.support.checks import check_instance, whole_number
from normlab.support.seeding import seeded

# How far each element is moved. One step alone may hide what is shared: two numbers that are
# normalised without an epsilon come out as ±1 until the move changes which of them is the larger.
STEPS = (0.5, 5.0, -5.0)
ROUNDING = 1e-5  # of the largest output: so little may be an error of float32


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
    from scipy.sparse.csgraph import connected_components

    check_instance(layer, nn.Module, "a layer", "nn.BatchNorm2d(4), say")
    check_instance(shape, tuple, "shape", "(N, C, H, W), say")
    for side in shape:
        whole_number(side, "each side of shape")
    output = _as_function(layer, training=training, seed=seed)
    with seeded(seed, "input"):
        x = torch.randn(shape)
    try:
        before = output(x)
    except RuntimeError as error:
        what, why = type(layer).__name__, " ".join(str(error).split())
        raise ValueError(f"{what} takes no input of shape {tuple(shape)}: {why}") from error
    if before.shape != x.shape:
        turned = f"turns shape {tuple(shape)} into {tuple(before.shape)}"
        raise ValueError(f"the layer {turned}: it must keep it")
    touched = torch.eye(x.numel(), dtype=torch.bool)
    for place, step in itertools.product(range(x.numel()), STEPS):
        moved = x.clone()
        moved.view(-1)[place] += step
        change = (output(moved) - before).abs().flatten()
        touched[place] |= change > ROUNDING * before.abs().max()
    numbers = connected_components(touched.numpy(), directed=False)[1]
    return torch.as_tensor(numbers, dtype=torch.int64).view(shape)


def _as_function(layer: nn.Module, *, training: bool, seed: int) -> Callable[[Tensor], Tensor]:
    """A copy on the CPU, without a learned 0, that gives the same for the same input every time."""
    twin = copy.deepcopy(layer).float().cpu().train(training)
    with torch.no_grad(), seeded(seed, "parameters"):
        for parameter in twin.parameters():
            parameter.uniform_(0.5, 1.5)
    start = copy.deepcopy(twin.state_dict())

    @torch.no_grad()
    def output(x: Tensor) -> Tensor:
        twin.load_state_dict(start)  # running statistics move with every call
        with seeded(seed, "layer"):
            return twin(x)

    return output
