"""Pictures of images: samples of a data set, and what networks get wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normlab.analysis import Mistakes
from normlab.augment import parse_augmentation
from normlab.checks import whole_number
from normlab.data import Dataset
from normlab.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_samples(
    data: Dataset,
    augment: Sequence[str] = (),
    *,
    per_class: int = 8,
    seed: int = 0,
    title: str | None = None,
) -> Figure:
    """Training images, a row for each class; with `augment` as a network gets to see them.

    The same seed picks the same images, so that two pictures show them before and after.
    """
    from matplotlib import pyplot

    classes = len(data.classes)
    picked = _sample(data, whole_number(per_class, "per_class"), seed)
    images = _augmented(data.train_images[picked], augment, seed)
    size = (0.55 * per_class + 1.2, 0.55 * classes + 0.4)
    figure, axes = pyplot.subplots(
        classes, per_class, figsize=size, layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure.suptitle(title if title is not None else _samples_title(data, augment), fontsize=10)
    for row, name in zip(axes, data.classes, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for ax, image in zip(axes.flat, images, strict=True):
        ax.set(xticks=[], yticks=[])
        _show(ax, image)
    return figure


def _samples_title(data: Dataset, augment: Sequence[str]) -> str:
    how = f", augmented by {', '.join(augment)}" if augment else ""
    return f"{data.source}, training images{how}"


def _sample(data: Dataset, per_class: int, seed: int) -> Tensor:
    """Indices of training images, `per_class` of each class, one class after another."""
    order = torch.randperm(len(data.train_labels), generator=generator(seed, "samples"))
    labels = data.train_labels[order]
    rows = [order[labels == label][:per_class] for label in range(len(data.classes))]
    short = min(map(len, rows))
    if short < per_class:
        raise ValueError(f"per_class={per_class}: one class has {short} training images only")
    return torch.cat(rows)


def _augmented(images: Tensor, augment: Sequence[str], seed: int) -> Tensor:
    for text in augment:
        augmentation = parse_augmentation(text)
        drawn = augmentation.draw(len(images), generator(seed, "samples", augmentation.name))
        images = augmentation.apply(images, drawn)
    return images.byte()


def _show(ax: Axes, image: Tensor) -> None:
    """An image (C, H, W) of bytes, grey where it has one channel."""
    pixels = image.permute(1, 2, 0).numpy()
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def plot_mistakes(
    mistakes: Mistakes, rows: int = 5, cols: int = 2, title: str | None = None
) -> Figure:
    """A matrix of misclassified images, each with its true and its predicted class.

    Images are as they were before normalization. Where there are fewer than rows × cols, the
    title says so.
    """
    from matplotlib import pyplot

    room = whole_number(rows, "rows") * whole_number(cols, "cols")
    heading = _mistakes_title(mistakes, room, title, width=max(46, 26 * cols))
    if not len(mistakes):
        figure = pyplot.figure(figsize=(4.6, 0.9))
        figure.text(0.5, 0.5, heading, ha="center", va="center", fontsize=11)
        return figure
    rows = min(rows, -(-len(mistakes) // cols))  # no empty rows where there are few
    size = (2.4 * cols, 1.85 * rows + 0.2 * (heading.count("\n") + 1) + 0.4)
    figure, axes = pyplot.subplots(rows, cols, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(heading, fontsize=11)
    for place, ax in enumerate(axes.flat):
        ax.axis("off")
        if place < len(mistakes):
            _draw_mistake(ax, mistakes, place)
    return figure


def _mistakes_title(mistakes: Mistakes, room: int, title: str | None, *, width: int) -> str:
    what = f"misclassified {mistakes.part} images"
    head = what.capitalize() if title is None else f"{title}: {what}"
    count = f"{mistakes.total:,} of {mistakes.tested:,}"
    if mistakes.total < room:
        count = f"only {count}" if mistakes.total else f"none of {mistakes.tested:,}"
    return "\n".join(textwrap.fill(line, width) for line in (head, f"{mistakes.source}: {count}"))


def _draw_mistake(ax: Axes, mistakes: Mistakes, place: int) -> None:
    _show(ax, mistakes.images[place])
    true, predicted = (mistakes.classes[int(k[place])] for k in (mistakes.true, mistakes.predicted))
    probability = float(mistakes.probability[place])
    sure = f"{100 * probability:.1f} %" if probability < 0.9995 else "> 99.9 %"
    ax.set_title(f"true: {true}\npredicted: {predicted} ({sure})", fontsize=9)
