"""Augmentation of a whole batch at once, on the device where the batch is.

An augmentation has two halves: `draw` picks random numbers for n images on the CPU, from a
generator of its own, and `apply` uses them, with plain tensor operations that work on uint8 and
float alike. So the same seed gives the same augmented images on every device and for every network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.support.checks import number, one_of


def shift(images: Tensor, offsets: Tensor, most: int | None = None) -> Tensor:
    """Moves each image by whole pixels; what comes in at the border is black.

    Args:
        images: (B, C, H, W).
        offsets: (B, 2) int64, pixels down and to the right.
        most: the largest offset, where it is known: then nothing is read back from a GPU.
    """
    margin = int(offsets.abs().max()) if most is None else most
    batch, _, height, width = images.shape
    padded = F.pad(images, (margin,) * 4)
    device = images.device
    rows = torch.arange(height, device=device) + margin - offsets[:, :1]  # (B, H)
    columns = torch.arange(width, device=device) + margin - offsets[:, 1:]  # (B, W)
    which = torch.arange(batch, device=device).view(-1, 1, 1)
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors left and right the images (B, C, H, W) where `chosen` (B,) is true."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turns each image counter-clockwise about its centre, with bilinear interpolation.

    Args:
        images: (B, C, H, W), uint8 or float.
        degrees: (B,) float; what comes in at the corners is black.

    Returns float images, unrounded.
    """
    if not images.is_floating_point():
        images = images.float()
    height, width = images.shape[-2:]
    angle = (degrees * (math.pi / 180)).to(images.dtype)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid is in units of half a side, so a picture that is not square needs its ratio.
    turn = torch.stack(
        [
            torch.stack([cosine, -sine * (height / width), zero], dim=1),
            torch.stack([sine * (width / height), cosine, zero], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class Augmentation:
    """One named augmentation of a given amount."""

    name: str
    amount: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers for `count` images, on the CPU: (count, …)."""
        return _KINDS[self.name].draw(count, self.amount, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The images (B, C, H, W) changed as `drawn` (B, …) says."""
        return _KINDS[self.name].apply(images, drawn, self.amount)


@dataclass(frozen=True)
class _Kind:
    default: float
    least: float
    most: float
    draw: Callable[[int, float, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor, float], Tensor]


def _draw_offsets(count: int, amount: float, generator: torch.Generator) -> Tensor:
    return torch.randint(-int(amount), int(amount) + 1, (count, 2), generator=generator)


def _draw_chosen(count: int, amount: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < amount


def _draw_degrees(count: int, amount: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, generator=generator) - 1) * amount


_KINDS = {
    "shift": _Kind(
        4, 1, 64, _draw_offsets, lambda images, drawn, most: shift(images, drawn, int(most))
    ),
    "flip": _Kind(0.5, 0, 1, _draw_chosen, lambda images, drawn, _: flip(images, drawn)),
    "rotate": _Kind(7, 0, 180, _draw_degrees, lambda images, drawn, _: rotate(images, drawn)),
}

AUGMENTATIONS = tuple(_KINDS)


def parse_augmentation(text: str) -> Augmentation:
    """Reads "shift" or "shift:2": a name and, after a colon, another amount than the usual.

    "shift" moves by up to 4 pixels, "flip" mirrors with probability 0.5, "rotate" turns by up to
    7 degrees either way. Raises `ValueError` for an unknown name or an amount out of range.
    """
    name, _, amount = str(text).partition(":")
    kind = _KINDS[one_of(name, AUGMENTATIONS, "augmentation")]
    if not amount:
        return Augmentation(name, float(kind.default))
    try:
        value = number(float(amount), f"the amount of {name!r}", least=kind.least)
    except ValueError as error:
        raise ValueError(f"augmentation {text!r}: {error}") from None
    if value > kind.most or (name == "shift" and value != int(value)):
        whole = " and a whole number" if name == "shift" else ""
        raise ValueError(f"augmentation {text!r}: the amount must be at most {kind.most:g}{whole}")
    return Augmentation(name, value)
