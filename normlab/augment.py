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

from normlab.support.checks import one_of


def shift(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Moves each image (B, C, H, W) by whole pixels; what comes in at the border is black.

    `offsets` (B, 2) int64 are pixels down and to the right, at most `most` in size.
    """
    (batch, _, height, width), device = images.shape, images.device
    padded = F.pad(images, (most,) * 4)
    rows = torch.arange(most, most + height, device=device) - offsets[:, :1]  # (B, H)
    columns = torch.arange(most, most + width, device=device) - offsets[:, 1:]  # (B, W)
    which = torch.arange(batch, device=device).view(-1, 1, 1)
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors left and right the images (B, C, H, W) where `chosen` (B,) is true."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turns each image (B, C, H, W) counter-clockwise about its centre, by `degrees` (B,).

    Bilinear interpolation; what comes in at the corners is black. Returns float images, unrounded.
    """
    still = torch.zeros(len(degrees), 3, device=degrees.device)
    return affine(images, torch.cat([degrees.view(-1, 1), still], 1))


def affine(images: Tensor, moves: Tensor) -> Tensor:
    """Turns, enlarges and shifts each image (B, C, H, W), as `rotate` does, about its centre.

    `moves` (B, 4) are degrees counter-clockwise, the logarithm of the scale, and shifts down and to
    the right as parts of the height and the width.
    """
    images = images if images.is_floating_point() else images.float()
    height, width = images.shape[-2:]
    degrees, log_scale, down, right = moves.to(images.dtype).unbind(1)
    angle, shrink = degrees * (math.pi / 180), (-log_scale).exp()
    cosine, sine = angle.cos() * shrink, angle.sin() * shrink
    # The grid is in units of half a side, so a picture that is not square needs its ratio.
    up, over = sine * (height / width), sine * (width / height)
    first = torch.stack([cosine, -up, 2 * (up * down - cosine * right)], dim=1)
    second = torch.stack([over, cosine, -2 * (over * right + cosine * down)], dim=1)
    turn = torch.stack([first, second], dim=1)  # (B, 2, 3): where each pixel comes from
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def cutout(images: Tensor, places: Tensor, side: int) -> Tensor:
    """Covers a square of `side` pixels of each image (B, C, H, W) by the image's mean colour.

    `places` (B, 2) in [0, 1) are the square's centre, down and to the right; at the border a part
    of it lies outside. Source: DeVries & Taylor, "Improved Regularization … with Cutout", 2017.
    """

    def covered(place: Tensor, size: int) -> Tensor:  # (B, size)
        first = (place * size).floor().view(-1, 1) - side // 2
        away = torch.arange(size, device=images.device) - first
        return (away >= 0) & (away < side)

    rows, columns = (
        covered(*each) for each in zip(places.unbind(1), images.shape[2:], strict=True)
    )
    mean = images.float().mean((2, 3), keepdim=True).to(images.dtype)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], mean, images)


def jitter(images: Tensor, changes: Tensor) -> Tensor:
    """Changes brightness, contrast and saturation of each image (B, C, H, W) by factors (B, 3).

    A factor of 1 changes nothing; contrast is about the image's mean, saturation about grey. Values
    stay within 0 and 255. Returns float images.
    """
    images = images if images.is_floating_point() else images.float()
    brightness, contrast, saturation = changes.to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = images * brightness
    for factor, axes in ((contrast, (1, 2, 3)), (saturation, (1,))):
        images = torch.lerp(images.mean(axes, keepdim=True), images, factor)
    return images.clamp(0, 255)


@dataclass(frozen=True)
class Kind:
    """An augmentation: which random numbers it draws, and how it changes images by them."""

    amounts: tuple[float, float, float]  # the default, the least and the most
    draw: Callable[[int, float, torch.Generator], Tensor]  # (count, amount, rng) to (count, …)
    apply: Callable[[Tensor, Tensor, float], Tensor]  # (images, drawn, amount) to images
    whole: bool = False  # whether the amount must be a whole number


def _affine_moves(count: int, degrees: float, rng: torch.Generator) -> Tensor:
    """For `affine` (count, 4): a turn either way, 10 % larger or smaller, 10 % of a side away."""
    most = torch.tensor([degrees, math.log(1.1), 0.1, 0.1])
    return (2 * torch.rand(count, 4, generator=rng) - 1) * most


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
    "affine": Kind(
        (10, 0, 180),
        draw=_affine_moves,
        apply=lambda images, drawn, amount: affine(images, drawn),
    ),
    "cutout": Kind(
        (8, 1, 1024),
        draw=lambda count, amount, rng: torch.rand(count, 2, generator=rng),
        apply=lambda images, drawn, amount: cutout(images, drawn, int(amount)),
        whole=True,
    ),
    "jitter": Kind(
        (0.2, 0, 1),
        draw=lambda count, amount, rng: 1 + amount * (2 * torch.rand(count, 3, generator=rng) - 1),
        apply=lambda images, drawn, amount: jitter(images, drawn),
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """One of `AUGMENTATIONS`, with its amount."""

    name: str
    amount: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers for `count` images, on the CPU: (count, …)."""
        return AUGMENTATIONS[self.name].draw(count, self.amount, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The images (B, C, H, W) changed as `drawn` (B, …) says."""
        return AUGMENTATIONS[self.name].apply(images, drawn, self.amount)


def parse_augmentation(text: str) -> Augmentation:
    """Reads "shift" or "shift:2": a name and, after a colon, an amount instead of the default.

    "shift" moves by up to 4 pixels, "flip" mirrors with probability 0.5, "rotate" turns by up to
    7 degrees either way; "affine" turns by up to 10 degrees, scales and moves by up to 10 %;
    "cutout" covers a square of 8 pixels; "jitter" changes brightness, contrast and saturation by up
    to 0.2 of them. Raises `ValueError` for an unknown name or an amount out of range.
    """
    name, _, amount = str(text).partition(":")
    kind = AUGMENTATIONS[one_of(name, AUGMENTATIONS, "augmentation")]
    usual, least, most = kind.amounts
    try:
        value = float(amount or usual)
    except ValueError:
        value = math.nan
    if not least <= value <= most or (kind.whole and value != int(value)):
        wanted = f"{'a whole' if kind.whole else 'a'} number from {least:g} to {most:g}"
        raise ValueError(f"augmentation {text!r}: the amount must be {wanted}")
    return Augmentation(name, value)
