"""Normalizations: the layers that networks use, and each of them written out by hand.

Every normalization subtracts a mean and divides by a standard deviation, then scales and shifts.
They differ in one thing only, the set of axes that share a mean. For images (N, C, H, W):

    batch normalization     one mean for each channel            averaged over N, H, W
    instance normalization  one for each image and channel       averaged over H, W
    layer normalization     one for each image                   averaged over C, H, W
    group normalization     one for each image and group         averaged over C/G, H, W

`NORMS` holds that table as data; `batch_norm` and its siblings are the same as tensor expressions.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.support.checks import one_of, plain, whole_number

EPSILON = 1e-5  # added to every variance, the same for all, so that no variant has an edge

N, C, H, W = range(4)  # the axes of a batch of images, by name


@dataclass(frozen=True)
class NormKind:
    """What one normalization averages over and learns."""

    name: str
    title: str
    averaged: tuple[str, ...]  # axes that share a mean; "C/G" is the channels within a group
    source: str
    uses_batch_statistics: bool = False

    def statistics(self, shape: tuple[int, int, int, int], *, groups: int = 1) -> int:
        """How many means there are for an input of `shape` (N, C, H, W).

        Raises `ValueError` if `groups` does not divide C.
        """
        images, channels = shape[:2]
        count = 1 if "N" in self.averaged else images
        if "C/G" in self.averaged:
            _check_groups(groups, channels)
            return count * groups
        return count if "C" in self.averaged else count * channels

    def parameters(self, shape: tuple[int, int, int, int]) -> int:
        """How many numbers are learned: neither the batch size nor the groups matter."""
        _, channels, height, width = shape
        return 2 * channels * (height * width if self.name == "ln-elementwise" else 1)


@dataclass(frozen=True)
class NoNorm(NormKind):
    """The identity: no statistics, nothing learned."""

    def statistics(self, shape: tuple[int, int, int, int], *, groups: int = 1) -> int:
        return 0

    def parameters(self, shape: tuple[int, int, int, int]) -> int:
        return 0


NORMS: dict[str, NormKind] = {
    kind.name: kind
    for kind in (
        NormKind("bn", "batch normalization", ("N", "H", "W"), "Ioffe & Szegedy 2015", True),
        NormKind("ln", "layer normalization", ("C", "H", "W"), "Ba, Kiros & Hinton 2016"),
        NormKind("gn", "group normalization", ("C/G", "H", "W"), "Wu & He 2018"),
        NormKind(
            "ln-elementwise",
            "layer normalization, scale and shift for every element",
            ("C", "H", "W"),
            "Ba, Kiros & Hinton 2016",
        ),
        NormKind("in", "instance normalization", ("H", "W"), "Ulyanov, Vedaldi & Lempitsky 2016"),
        NoNorm("none", "no normalization", (), ""),
    )
}

_ALIASES = {
    "b": "bn",
    "batch": "bn",
    "batchnorm": "bn",
    "l": "ln",
    "layer": "ln",
    "layernorm": "ln",
    "g": "gn",
    "group": "gn",
    "groupnorm": "gn",
    "i": "in",
    "instance": "in",
    "instancenorm": "in",
    "lnelementwise": "ln-elementwise",
    "layernormelementwise": "ln-elementwise",
    "no": "none",
    "identity": "none",
}


def norm_name(kind: str) -> str:
    """The short name of a normalization: "BN", "BatchNorm2d" and "batch_norm" are all "bn".

    Raises `ValueError` for a name that is none of these, with the nearest one that is.
    """
    if not isinstance(kind, str):
        raise TypeError(f"a normalization is given by its name, not by {kind!r}")
    plain = kind.strip().lower()
    if plain in NORMS:
        return plain
    words = re.sub("[^a-z0-9]", "", plain).replace("normalization", "norm")
    words = re.sub("[123]d$", "", words)  # BatchNorm2d
    if words in NORMS:
        return words
    if words in _ALIASES:
        return _ALIASES[words]
    near = difflib.get_close_matches(plain, [*NORMS, *(a for a in _ALIASES if len(a) > 2)], n=1)
    hint = f"; did you mean {_ALIASES.get(near[0], near[0])!r}?" if near else ""
    raise ValueError(f"unknown norm {kind!r}: it must be one of {', '.join(NORMS)}{hint}")


def divisors(number: int) -> list[int]:
    """The numbers of groups that `number` channels can be split into."""
    return [count for count in range(1, number + 1) if number % count == 0]


def make_norm(
    kind: str,
    channels: int,
    *,
    groups: int | None = None,
    size: tuple[int, int] | None = None,
) -> nn.Module:
    """A normalization layer for images (N, `channels`, H, W); the one place that knows the kinds.

    Args:
        kind: "bn", "ln", "gn", "ln-elementwise", "in", "none", or a longer name of these.
        channels: C, the number of channels of the input.
        groups: how many groups "gn" splits the channels into; needed by "gn" alone.
        size: (H, W) of the input; needed by "ln-elementwise" alone.

    "ln" is one group over C, H, W with a scale and a shift for each channel, as many parameters
    as "bn" and "gn"; "ln-elementwise" has a scale and a shift for each of the C·H·W elements.

    Raises:
        ValueError: unknown kind, groups that do not divide the channels, size missing.
    """
    kind = norm_name(kind)
    whole_number(channels, "channels")
    if kind == "gn":
        _check_groups(groups, channels)
    if kind == "ln-elementwise":
        size = _checked_size(size)
    makers: dict[str, Callable[[], nn.Module]] = {
        "bn": lambda: nn.BatchNorm2d(channels, eps=EPSILON),
        "ln": lambda: nn.GroupNorm(1, channels, eps=EPSILON),
        "gn": lambda: nn.GroupNorm(groups, channels, eps=EPSILON),
        "ln-elementwise": lambda: nn.LayerNorm([channels, *size], eps=EPSILON),
        "in": lambda: nn.InstanceNorm2d(channels, eps=EPSILON, affine=True),
        "none": nn.Identity,
    }
    return makers[one_of(kind, makers, "norm")]()


def _check_groups(groups: int | None, channels: int) -> None:
    if groups is None:
        raise ValueError("gn needs groups=…, the number of groups that the channels are split into")
    whole_number(groups, "groups")
    if channels % groups:
        allowed = ", ".join(map(str, divisors(channels)))
        raise ValueError(
            f"groups={groups} does not divide {channels} channels: it must be one of {allowed}"
        )


def _checked_size(size: tuple[int, int] | None) -> list[int]:
    size = plain(size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        given = "" if size is None else f", not {size!r}"
        raise ValueError(
            f"ln-elementwise learns a scale for every pixel, so it needs size=(H, W){given}"
        )
    return [whole_number(side, "each side of size") for side in size]


# --- by hand ---------------------------------------------------------------------------------


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
    count = x.numel() // x.shape[C]
    if count == 1:
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
    _check_groups(groups, x.shape[C])
    grouped = x.reshape(x.shape[N], groups, -1, *x.shape[H:])  # (N, G, C/G, H, W)
    return _scale_and_shift(_standardize(grouped, (2, 3, 4), eps).reshape(x.shape), weight, bias)
