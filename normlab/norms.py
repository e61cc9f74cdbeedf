"""Normalizations: the table of them, and the layers that networks use.

Most subtract a mean and divide by a standard deviation, then scale and shift. They differ in one
thing only, the set of axes that share a mean. For images (N, C, H, W):

    batch normalization     one mean for each channel            averaged over N, H, W
    instance normalization  one for each image and channel       averaged over H, W
    layer normalization     one for each image                   averaged over C, H, W
    group normalization     one for each image and group         averaged over C/G, H, W

`NORMS` holds that table as data. No network and no loop depends on the name of a norm: to add one,
add an entry there.
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from normlab.support.checks import check_groups, height_and_width, whole_number

EPSILON = 1e-5  # added to every variance, the same for all, so that no variant has an edge


@dataclass(frozen=True)
class NormKind:
    """What one normalization averages over, what it learns, and how its layer is made.

    Args:
        title: its name in figures; what follows a comma is left out of headings.
        averaged: axes that share statistics; "C/G" is the channels within a group.
        source: who described it.
        make: makes the layer for (channels, groups, size).
        aliases: other names for `make_norm`, without the word "norm".
        moment: the name of its statistic, such as "mean square".
        learned: names of the learned parameters; each has a number for every place along
            `learned_axes`.
    """

    title: str
    averaged: tuple[str, ...]
    source: str
    make: Callable[[int, int, tuple[int, int]], nn.Module]
    aliases: tuple[str, ...] = ()
    moment: str = "mean"
    learned: tuple[str, ...] = ("scale", "shift")
    learned_axes: tuple[str, ...] = ("C",)

    def own_axes(self, shape: tuple[int, int, int, int], *, groups: int = 1) -> dict[str, int]:
        """The axes along which the means differ, with their sizes, such as {"N": 4, "G": 2}."""
        sizes = dict(zip("NCHW", shape, strict=True))
        if "C/G" in self.averaged:
            check_groups(groups, sizes.pop("C"))
            sizes = {"N": sizes["N"], "G": groups, **sizes}
        return {axis: size for axis, size in sizes.items() if axis not in self.averaged}

    def statistics(self, shape: tuple[int, int, int, int], *, groups: int = 1) -> int:
        """How many means an input of `shape` (N, C, H, W) has; `groups` must divide C."""
        return math.prod(self.own_axes(shape, groups=groups).values()) if self.averaged else 0

    def parameters(self, shape: tuple[int, int, int, int]) -> int:
        """How many parameters the layer has for an input of `shape` (N, C, H, W)."""
        sides = dict(zip("NCHW", shape, strict=True))
        return len(self.learned) * math.prod(sides[axis] for axis in self.learned_axes)


NORMS = {
    "bn": NormKind(
        "batch normalization",
        ("N", "H", "W"),
        "Ioffe & Szegedy 2015",
        lambda channels, groups, size: nn.BatchNorm2d(channels, eps=EPSILON),
        aliases=("b", "batch"),
    ),
    "ln": NormKind(
        "layer normalization",
        ("C", "H", "W"),
        "Ba, Kiros & Hinton 2016",
        lambda channels, groups, size: nn.GroupNorm(1, channels, eps=EPSILON),
        aliases=("l", "layer"),
    ),
    "gn": NormKind(
        "group normalization",
        ("C/G", "H", "W"),
        "Wu & He 2018",
        lambda channels, groups, size: nn.GroupNorm(groups, channels, eps=EPSILON),
        aliases=("g", "group"),
    ),
    "ln-elementwise": NormKind(
        "layer normalization, scale and shift for every element",
        ("C", "H", "W"),
        "Ba, Kiros & Hinton 2016",
        lambda channels, groups, size: nn.LayerNorm([channels, *size], eps=EPSILON),
        aliases=("layer elementwise",),
        learned_axes=("C", "H", "W"),
    ),
    "in": NormKind(
        "instance normalization",
        ("H", "W"),
        "Ulyanov, Vedaldi & Lempitsky 2016",
        lambda channels, groups, size: nn.InstanceNorm2d(channels, eps=EPSILON, affine=True),
        aliases=("i", "instance"),
    ),
    "none": NormKind(
        "no normalization",
        (),
        "",
        lambda channels, groups, size: nn.Identity(),
        aliases=("no", "identity"),
        learned=(),
    ),
}


def norm_name(kind: str) -> str:
    """The short name of a normalization: "BN", "BatchNorm2d" and "batch_norm" are all "bn".

    Raises `ValueError` for a name that is none of these, with the nearest one that is.
    """
    if not isinstance(kind, str):
        raise TypeError(f"a normalization is given by its name, not by {kind!r}")
    names = {
        _squeezed(alias): name for name, each in NORMS.items() for alias in (name, *each.aliases)
    }
    if _squeezed(kind) in names:
        return names[_squeezed(kind)]
    near = difflib.get_close_matches(kind.lower(), [name for name in names if len(name) > 2], n=1)
    hint = f"; did you mean {names[near[0]]!r}?" if near else ""
    raise ValueError(f"unknown norm {kind!r}: it must be one of {', '.join(NORMS)}{hint}")


def _squeezed(name: str) -> str:
    """The part of a name that tells norms apart: "batch" of "BatchNorm2d" and "batch_norm"."""
    return re.sub("[^a-z0-9]|norm(alization)?|[123]d$", "", name.lower())


def make_norm(
    kind: str, channels: int, *, groups: int | None = None, size: tuple[int, int] | None = None
) -> nn.Module:
    """A normalization layer for images (N, `channels`, H, W).

    Args:
        kind: "bn", "ln", "gn", "ln-elementwise", "in", "none", or a longer name of these.
        channels: C, the number of channels of the input.
        groups: how many groups "gn" splits the channels into; needed by "gn" alone.
        size: (H, W) of the input; needed by "ln-elementwise" alone.

    "ln" is one group over C, H, W with a scale and a shift for each channel, as many parameters
    as "bn" and "gn"; "ln-elementwise" has a scale and a shift for each of the C·H·W elements.

    Raises `ValueError` for an unknown kind, groups that do not divide the channels, a missing size.
    """
    name = norm_name(kind)
    found = NORMS[name]
    whole_number(channels, "channels")
    if "C/G" in found.averaged:
        check_groups(groups, channels, name)
    if "H" in found.learned_axes:
        size = height_and_width(size, name)
    return found.make(channels, groups, size)


def is_norm(layer: nn.Module) -> bool:
    """Whether it is a layer that the table makes, or one called …Norm, and has no layers itself."""
    made = {type(kind.make(4, 1, (1, 1))) for kind in NORMS.values() if kind.averaged}
    named = re.search(r"^[^_].*norm(alization)?[1-3]?d?$", type(layer).__name__, re.I)
    known = isinstance(layer, (nn.modules.batchnorm._NormBase, *made))
    return (known or named is not None) and not list(layer.children())
