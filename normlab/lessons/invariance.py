"""What happens to a network when the weights before a normalization are multiplied."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.support.checks import check_instance, number, whole_number
from normlab.support.module_state import copied
from normlab.support.seeding import seeded
from normlab.support.tensor_checks import check_weights


@dataclass(frozen=True)
class Rescaled:
    """What multiplying a layer's weights, or those of some of its filters, did.

    `output_change` is the largest change of an output, as a share of the largest output;
    `gradient_ratio` the Euclidean norm of the gradient for the multiplied weights afterwards, over
    that before; `gradient_cosine` the cosine between the two: 1 if the direction is the same.
    """

    layer: str
    factor: float
    output_change: float
    gradient_ratio: float
    gradient_cosine: float


def rescale_weights(
    network: nn.Module,
    images: Tensor,
    *,
    layer: str | None = None,
    filters: Iterable[int] | None = None,
    factor: float = 10.0,
) -> Rescaled:
    """Multiplies a layer's weights by `factor` and says what that does to output and gradient.

    A normalization divides by the standard deviation, which the factor multiplies too: of BN(W x)
    nothing changes when W grows tenfold, and the gradient for W becomes a tenth. That holds for
    whatever shares a standard deviation: any single filter with BN and IN, a whole group of
    filters with GN, the whole layer with LN. A ReLU between lets the factor through.

    It holds up to epsilon: with a variance v, the output grows by √((v + ε) / (v + ε / factor²)).
    GN and LN also need a layer without a bias, which would have to grow too; BN and IN remove it
    where no ReLU stands between.

    Args:
        network: a whole one, or a part such as `nn.Sequential(convolution, norm)`; it is tried as
            a copy, in training mode.
        images: what it takes, (B, C, H, W).
        layer: name of the layer, as in `network.named_modules()`; without it, the first
            convolution.
        filters: the numbers of those that are multiplied, from 0, such as `[0]` or `range(5)`;
            without them, all of the layer's.
        factor: above 0.

    The gradient is that of a fixed random weighting of the outputs. Source: van Laarhoven, "L2
    Regularization versus Batch and Weight Normalization", 2017.
    Raises `ValueError` if there is no such layer, no such filter, or no image.
    """
    check_instance(network, nn.Module, "a network", "nl.build_network(…) gives one")
    if not len(images):
        raise ValueError("rescale_weights needs at least one image")
    factor = number(factor, "factor", positive=True)
    check_weights(network)
    name, count = _find(network, layer)
    filters = range(count) if filters is None else filters
    rows = sorted({whole_number(each, "a filter", least=0) for each in filters})
    if not rows or rows[-1] >= count:
        raise ValueError(
            f"filters must be numbers from 0 to {count - 1}, as layer {name!r} has {count} of "
            f"them, not {rows}"
        )
    before, slope = _output_and_gradient(network, images, name, rows, 1.0)
    after, new_slope = _output_and_gradient(network, images, name, rows, factor)
    return Rescaled(
        layer=name,
        factor=factor,
        output_change=float((after - before).abs().max() / before.abs().max()),
        gradient_ratio=float(new_slope.norm() / slope.norm()),
        gradient_cosine=float(torch.cosine_similarity(slope, new_slope, dim=0)),
    )


def _find(network: nn.Module, layer: str | None) -> tuple[str, int]:
    """The layer asked for, or the first convolution: its name, and how many filters it has."""
    for name, each in network.named_modules():
        wanted = isinstance(each, nn.modules.conv._ConvNd) if layer is None else name == layer
        weight = dict(each.named_parameters(recurse=False)).get("weight")  # not a computed one
        if wanted and weight is not None:
            return name, len(weight)
    what = "convolution" if layer is None else f"layer {layer!r} with a weight"
    raise ValueError(f"{type(network).__name__} has no {what}, whose weights could be multiplied")


def _output_and_gradient(
    network: nn.Module, images: Tensor, layer: str, rows: list[int], factor: float
) -> tuple[Tensor, Tensor]:
    """The output of a copy with rows of the weight multiplied, and their gradient, flattened."""
    twin = copied(network).train()
    weight = twin.get_submodule(layer).weight.requires_grad_()
    with torch.no_grad():
        weight[rows] *= factor
    with torch.enable_grad(), seeded(0, "rescaled", device=images.device):  # the same dropout
        output = twin(images)
        weighting = torch.randn(output.shape, dtype=output.dtype).to(output.device)
        (gradient,) = torch.autograd.grad((output * weighting).sum(), weight)
    return output.detach(), gradient[rows].flatten()
