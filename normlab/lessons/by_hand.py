"""Each normalization written out with means over axes, and a batch to compute by hand."""

import torch
from torch import Tensor

from normlab.norms import EPSILON
from normlab.support.checks import check_groups

N, C, H, W = range(4)  # the axes of a batch of images, by name

# Chosen so that all means are whole, and so that the first number, 7, lies below the mean of its
# channel, on that of its group, and above those of its image and of its channel in all images. The
# standard deviations of these four are whole, too.
_CHANNELS = (
    ((7, 9, 7, 9), (7, 9, 5, 3), (6, 1, 0, 1), (9, 8, 7, 8)),  # image 1
    ((2, 4, 9, 5), (1, 5, 4, 2), (0, 3, 3, 2), (7, 7, 5, 5)),
    ((2, 8, 2, 8), (2, 0, 2, 0), (9, 8, 4, 3), (7, 9, 7, 9)),
    ((0, 3, 2, 3), (1, 1, 2, 4), (1, 2, 2, 3), (7, 4, 9, 4)),
)


def example_batch() -> Tensor:
    """Four images of four channels of 2×2 whole numbers from 0 to 9: float32 (4, 4, 2, 2).

    For each of BN, LN, IN and GN with two groups all means are whole numbers.
    """
    return torch.tensor(_CHANNELS, dtype=torch.float32).view(4, 4, 2, 2)


def _standardize(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """(x − mean) / standard deviation, both over `axes`; the variance divides by the count."""
    mean = x.mean(dim=axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=axes, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps)


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · weight + bias; vectors (C,) count for a channel, (C, H, W) for an element."""
    if weight is not None:
        x = x * (weight.view(-1, 1, 1) if weight.dim() == 1 else weight)
    if bias is not None:
        x = x + (bias.view(-1, 1, 1) if bias.dim() == 1 else bias)
    return x


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = EPSILON,
) -> Tensor:
    """Batch normalization of x (N, C, H, W): each channel over the batch and its positions.

    In training the mini-batch gives mean and variance, and the running statistics (C,), where
    given, move towards them in place: new = (1 − momentum) · old + momentum · batch. The mini-batch
    is divided by its biased variance (over n = N·H·W), but the running one stores the unbiased
    (over n − 1). In evaluation the running statistics are used instead.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015.
    Raises `ValueError` in training if each channel has one value only.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm in evaluation needs running_mean and running_var")
        mean, variance = running_mean.view(1, -1, 1, 1), running_var.view(1, -1, 1, 1)
        return _scale_and_shift((x - mean) / torch.sqrt(variance + eps), weight, bias)
    if x.numel() == x.shape[C]:
        raise ValueError(f"batch normalization of shape {tuple(x.shape)} has one value a channel")
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(x.mean(dim=(N, H, W)), momentum)
            running_var.lerp_(x.var(dim=(N, H, W), correction=1), momentum)
    return _scale_and_shift(_standardize(x, (N, H, W), eps), weight, bias)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = EPSILON
) -> Tensor:
    """Instance normalization of x (N, C, H, W): each channel of each image over its positions.

    Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016.
    """
    return _scale_and_shift(_standardize(x, (H, W), eps), weight, bias)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = EPSILON
) -> Tensor:
    """Layer normalization of x (N, C, H, W): each image over all its channels and positions.

    `weight` and `bias` are (C,) for "ln" and (C, H, W) for "ln-elementwise".
    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """
    return _scale_and_shift(_standardize(x, (C, H, W), eps), weight, bias)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = EPSILON,
) -> Tensor:
    """Group normalization of x (N, C, H, W): each group of C/groups channels of each image.

    One group is layer normalization, C groups are instance normalization.
    Source: Wu & He, "Group Normalization", 2018.
    Raises `ValueError` if `groups` does not divide C.
    """
    check_groups(groups, x.shape[C])
    grouped = x.reshape(x.shape[N], groups, -1, *x.shape[H:])  # (N, G, C/G, H, W)
    return _scale_and_shift(_standardize(grouped, (2, 3, 4), eps).reshape(x.shape), weight, bias)
