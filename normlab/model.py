"""The networks of the assignments, of the parts in support/layers.py, with a norm to choose.

Each network is one function that lists its layers, with the shape after each as a comment. A
convolution is padded unless it is `valid`; letters say what follows it: N the norm, R a ReLU, D
dropout. None knows which normalization it gets: `make_norm` alone does.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from normlab.norms import make_norm, norm_name
from normlab.support.checks import image_shape, number, one_of, whole_number
from normlab.support.layers import LayerBuilder, NormMaker, Residual, draw_weights
from normlab.support.seeding import seeded


def _mnist_l1(part: LayerBuilder) -> list[nn.Module]:
    conv = functools.partial(part.conv, then="RND")
    return [
        conv(10, valid=True),  # (B, 10, 26, 26)
        conv(20, valid=True),  # (B, 20, 24, 24)
        part.conv(10, kernel=1),  # (B, 10, 24, 24)
        part.pool(),  # (B, 10, 12, 12)
        conv(20, valid=True),  # (B, 20, 10, 10)
        conv(10, valid=True),  # (B, 10, 8, 8)
        conv(10, valid=True),  # (B, 10, 6, 6)
        conv(10),  # (B, 10, 6, 6)
    ]


def _mnist_eva6(part: LayerBuilder) -> list[nn.Module]:
    conv = functools.partial(part.conv, then="RND")
    return [
        conv(8, valid=True),  # (B, 8, 26, 26)
        conv(10, valid=True),  # (B, 10, 24, 24)
        part.pool(),  # (B, 10, 12, 12)
        conv(12, valid=True),  # (B, 12, 10, 10)
        conv(14, valid=True),  # (B, 14, 8, 8)
        conv(16),  # (B, 16, 8, 8)
        conv(16, valid=True),  # (B, 16, 6, 6)
    ]


def _cifar10_norms(part: LayerBuilder) -> list[nn.Module]:
    conv = functools.partial(part.conv, then="NRD")
    return [
        conv(8),  # (B, 8, 32, 32)
        conv(16),  # (B, 16, 32, 32)
        part.conv(8, kernel=1),  # (B, 8, 32, 32)
        part.pool(),  # (B, 8, 16, 16)
        conv(16),  # (B, 16, 16, 16)
        conv(32),  # (B, 32, 16, 16)
        conv(32),  # (B, 32, 16, 16)
        part.conv(8, kernel=1),  # (B, 8, 16, 16)
        part.pool(),  # (B, 8, 8, 8)
        conv(16),  # (B, 16, 8, 8)
        conv(32),  # (B, 32, 8, 8)
        conv(64),  # (B, 64, 8, 8)
    ]


def _cifar10_add(part: LayerBuilder) -> list[nn.Module]:
    conv = functools.partial(part.conv, then="RND")

    def added(*layers: nn.Module) -> nn.Module:
        body = nn.Sequential(*layers)
        return Residual(body, nn.Identity()) if part.skip else body

    return [
        conv(16),  # (B, 16, 32, 32)
        conv(32),  # (B, 32, 32, 32)
        part.conv(16, "R", kernel=1),  # (B, 16, 32, 32)
        part.pool(),  # (B, 16, 16, 16)
        added(conv(16), conv(16), conv(32), part.conv(16, "R", kernel=1)),  # (B, 16, 16, 16)
        part.pool(),  # (B, 16, 8, 8)
        added(conv(16), conv(16), conv(16)),  # (B, 16, 8, 8)
    ]


def _cifar10_skip(part: LayerBuilder) -> list[nn.Module]:
    conv = functools.partial(part.conv, then="RND")

    def bottleneck(*channels: int) -> nn.Module:
        before = part.shape
        first, second, last = channels
        body = nn.Sequential(
            part.conv(first, "NRD"), part.conv(second, "NRD"), part.conv(last, "N")
        )
        if part.skip:
            part.shape = before
            body = Residual(body, part.conv(last, "N", kernel=1))
        return nn.Sequential(body, *part.after("RD"))

    return [
        conv(8),  # (B, 8, 32, 32)
        conv(16),  # (B, 16, 32, 32)
        part.conv(8, "RD", kernel=1),  # (B, 8, 32, 32)
        part.pool(),  # (B, 8, 16, 16)
        bottleneck(16, 24, 32),  # (B, 32, 16, 16)
        part.conv(8, "RD", kernel=1),  # (B, 8, 16, 16)
        part.pool(),  # (B, 8, 8, 8)
        bottleneck(16, 32, 48),  # (B, 48, 8, 8)
    ]


@dataclass(frozen=True)
class Design:
    """A network as the assignment has it; the defaults of `build_network`."""

    layers: Callable[[LayerBuilder], list[nn.Module]]
    input_shape: tuple[int, int, int]
    groups: int
    dropout: float
    drop: type[nn.Module] = nn.Dropout  # of single elements; or `nn.Dropout2d`, of whole channels


NETWORKS = {
    "mnist-l1": Design(_mnist_l1, (1, 28, 28), groups=5, dropout=0.05),
    "mnist-eva6": Design(_mnist_eva6, (1, 28, 28), groups=2, dropout=0.02, drop=nn.Dropout2d),
    "cifar10-norms": Design(_cifar10_norms, (3, 32, 32), groups=4, dropout=0.05),
    "cifar10-add": Design(_cifar10_add, (3, 32, 32), groups=2, dropout=0.0),
    "cifar10-skip": Design(_cifar10_skip, (3, 32, 32), groups=4, dropout=0.05, drop=nn.Dropout2d),
}


class Network(nn.Sequential):
    """A network of `build_network`: images (B, C, H, W) to logits (B, classes).

    `description` holds the arguments that build the same network again.
    """

    description: dict

    def __init__(self, layers: list[nn.Module], description: dict) -> None:
        super().__init__(*layers)
        self.description = description


def build_network(
    name: str,
    norm: str | NormMaker = "bn",
    *,
    groups: int | None = None,
    dropout: float | None = None,
    skip: bool = True,
    classes: int = 10,
    input_shape: tuple[int, int, int] | None = None,
    seed: int | None = None,
) -> Network:
    """Builds the network of an assignment with the normalization asked for.

    Args:
        name: one of `NETWORKS`.
        norm: a name as for `make_norm`, or a function of (channels, (H, W)) that returns a layer.
        groups: groups of "gn"; without it, as many as the assignment has.
        dropout: probability in [0, 1); without it, the assignment's.
        skip: False leaves out the skip connections of the networks that have some.
        classes: number of logits.
        input_shape: (C, H, W) of the images; without it, the assignment's.
        seed: of the initial weights; for one seed the convolutions start the same with every
            norm. The global random state stays as it is; without a seed one is drawn from it.

    Raises `ValueError` for unknown names, groups that do not divide the channels of a layer, and
    images too small to leave a pixel.
    """
    design = NETWORKS[one_of(name, NETWORKS, "network")]
    if not isinstance(norm, str) and not callable(norm):
        raise TypeError(f"norm must be a name or a function of (channels, size), not {norm!r}")
    own_name = getattr(norm, "__qualname__", type(norm).__qualname__)
    arguments = {
        "name": name,
        "norm": norm_name(norm) if isinstance(norm, str) else own_name,
        "groups": design.groups if groups is None else whole_number(groups, "groups"),
        "dropout": design.dropout if dropout is None else number(dropout, "dropout", below=1),
        "skip": bool(skip),
        "classes": whole_number(classes, "classes"),
        "input_shape": image_shape(design.input_shape if input_shape is None else input_shape),
    }

    def by_name(channels: int, size: tuple[int, int]) -> nn.Module:
        return make_norm(norm, channels, groups=arguments["groups"], size=size)

    dropped = functools.partial(design.drop, arguments["dropout"]) if arguments["dropout"] else None
    make = by_name if isinstance(norm, str) else norm
    part = LayerBuilder(name, arguments["input_shape"], make, dropped, arguments["skip"])
    seed = int(torch.randint(2**62, ())) if seed is None else whole_number(seed, "seed", least=0)
    with seeded(seed, "layers"):
        layers = [*design.layers(part), part.head(arguments["classes"])]
        network = Network(layers, arguments)
    draw_weights(network, seed)
    return network
