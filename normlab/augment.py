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


def shift(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Moves each image (B, C, H, W) by whole pixels; what comes in at the border is black.

    `offsets` (B, 2) int64 are pixels down and to the right, none of them above `most`.
    """
    (batch, _, height, width), device = images.shape, images.device
    padded = F.pad(images, (most,) * 4)
    rows = torch.arange(height, device=device) + most - offsets[:, :1]  # (B, H)
    columns = torch.arange(width, device=device) + most - offsets[:, 1:]  # (B, W)
    which = torch.arange(batch, device=device).view(-1, 1, 1)
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors left and right the images (B, C, H, W) where `chosen` (B,) is true."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turns each image (B, C, H, W) counter-clockwise about its centre, by `degrees` (B,).

    The interpolation is bilinear, and what comes in at the corners is black. Returns float images,
    unrounded.
    """
    images = images if images.is_floating_point() else images.float()
    height, width = images.shape[-2:]
    angle = (degrees * (math.pi / 180)).to(images.dtype)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid is in units of half a side, so a picture that is not square needs its ratio.
    first = torch.stack([cosine, -sine * (height / width), zero], dim=1)
    second = torch.stack([sine * (width / height), cosine, zero], dim=1)
    turn = torch.stack([first, second], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class Kind:
    """What an augmentation draws for so many images, and does with it to images (B, C, H, W)."""

    amounts: tuple[float, float, float]  # the usual one, the least and the most
    draw: Callable[[int, float, torch.Generator], Tensor]  # from count and amount: (count, …)
    apply: Callable[[Tensor, Tensor, float], Tensor]  # from images, what was drawn, and amount
    whole: bool = False  # whether only whole amounts make sense


AUGMENTATIONS = {
    "shift": Kind(
        (4, 1, 64),
        draw=lambda n, most, rng: torch.randint(-int(most), int(most) + 1, (n, 2), generator=rng),
        apply=lambda images, drawn, amount: shift(images, drawn, int(amount)),
        whole=True,
    ),
    "flip": Kind(
        (0.5, 0, 1),
        draw=lambda count, amount, rng: torch.rand(count, generator=rng) < amount,
        apply=lambda images, drawn, amount: flip(images, drawn),
    ),
    "rotate": Kind(
        (7, 0, 180),
        draw=lambda count, amount, rng: (2 * torch.rand(count, generator=rng) - 1) * amount,
        apply=lambda images, drawn, amount: rotate(images, drawn),
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """One of `AUGMENTATIONS`, of a given amount."""

    name: str
    amount: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers for `count` images, on the CPU: (count, …)."""
        return AUGMENTATIONS[self.name].draw(count, self.amount, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The images (B, C, H, W) changed as `drawn` (B, …) says."""
        return AUGMENTATIONS[self.name].apply(images, drawn, self.amount)


def parse_augmentation(text: str) -> Augmentation:
    """Reads "shift" or "shift:2": a name and, after a colon, another amount than the usual.

    "shift" moves by up to 4 pixels, "flip" mirrors with probability 0.5, "rotate" turns by up to
    7 degrees either way. Raises `ValueError` for an unknown name or an amount out of range.
    """
    name, _, amount = str(text).partition(":")
    kind = AUGMENTATIONS[one_of(name, AUGMENTATIONS, "augmentation")]
    usual, least, most = kind.amounts
    try:
        value = number(float(amount or usual), f"the amount of {name!r}", least=least)
    except ValueError as error:
        raise ValueError(f"augmentation {text!r}: {error}") from None
    if value > most or (kind.whole and value != int(value)):
        whole = " and a whole number" if kind.whole else ""
        raise ValueError(f"augmentation {text!r}: the amount must be at most {most:g}{whole}")
    return Augmentation(name, value)
