"""Which elements share statistics in a layer, found by trial."""

import copy

import torch
from torch import Tensor, nn

from normlab.checks import instance, whole_number
from normlab.seeding import seeded


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
    Raises `TypeError` for what is no layer or no shape, `ValueError` if the output is of another
    shape.
    """
    instance(layer, nn.Module, "a layer", "nn.BatchNorm2d(4), say")
    instance(shape, tuple, "shape", "(N, C, H, W), say")
    for side in shape:
        whole_number(side, "each side of shape")
    twin = copy.deepcopy(layer).double().train(training)
    with torch.no_grad(), seeded(seed, "parameters"):
        for parameter in twin.parameters():
            parameter.uniform_(0.5, 1.5)
    start = {name: value.clone() for name, value in twin.state_dict().items()}

    @torch.no_grad()
    def output(x: Tensor) -> Tensor:
        twin.load_state_dict(start)  # running statistics move with every call
        with seeded(seed, "layer"):
            return twin(x)

    with seeded(seed, "input"):
        x = torch.randn(shape, dtype=torch.float64)
    before = output(x)
    if before.shape != x.shape:
        raise ValueError(
            f"the layer turns shape {tuple(shape)} into {tuple(before.shape)}: it must keep it"
        )
    touched = torch.eye(x.numel(), dtype=torch.bool)
    for place in range(x.numel()):
        moved = x.clone()
        moved.view(-1)[place] += 0.5
        change = (output(moved) - before).abs().flatten()
        touched[place] |= change > 1e-9 * before.abs().max()
    return _components(touched | touched.T).view(shape)


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
