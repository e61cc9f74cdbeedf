"""Pictures of images: samples of a data set, and what networks get wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normlab.analysis import Mistakes
from normlab.augment import parse_augmentation
from normlab.data import Dataset
from normlab.support.checks import whole_number
from normlab.support.figures import drawn, fitted, mosaic, new_axes, shortened
from normlab.support.seeding import generator
from normlab.support.type_hints import Axes, Figure


@drawn
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
    picked = _sample(data, whole_number(per_class, "per_class"), seed)
    images = _augmented(data.train_images[picked], augment, seed)
    names = [shortened(name) for name in data.classes]
    width = max(0.55 * per_class + 0.6 + 0.08 * max(map(len, names)), 2.5)
    how = f", augmented by {', '.join(augment)}" if augment else ""
    usual = f"{data.source}, training images{how}"
    heading = fitted(usual if title is None else title, width)
    ax = new_axes(width, 0.55 * len(names) + 0.2 * heading.count("\n") + 0.4)
    ax.figure.suptitle(heading, fontsize=10)
    # One picture of all images: hundreds of axes take half a minute.
    gap = max(1, images.shape[-1] // 14)
    ax.imshow(mosaic(images.numpy(), per_class, gap), interpolation="nearest", aspect="equal")
    height = images.shape[-2]
    middles = [(height + gap) * row + height / 2 - 0.5 for row in range(len(names))]
    ax.set_yticks(middles, names, fontsize=9)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_anchor("E")  # what is left of the room is the names'
    return ax.figure


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


@drawn
def plot_mistakes(
    mistakes: Mistakes, rows: int = 5, cols: int = 2, title: str | None = None
) -> Figure:
    """A matrix of misclassified images, each with its true and its predicted class.

    Images are as they were before normalization, below a `grad_cam` if they were asked for one:
    red is what speaks most for the predicted class. Where there are fewer than rows × cols, the
    title says so.
    """
    from matplotlib import pyplot

    rows, cols = whole_number(rows, "rows"), whole_number(cols, "cols")
    column = min(2.4, max(6.4 / cols, 1.28))  # inches: five fit a page
    width = max(4.6, column * cols)
    heading = _mistakes_title(mistakes, rows * cols, title, width)
    if not len(mistakes):
        figure = pyplot.figure(figsize=(4.6, 0.9))
        figure.text(0.5, 0.5, heading, ha="center", va="center", fontsize=11)
        return figure
    rows = min(rows, -(-len(mistakes) // cols))  # no empty rows where there are few
    size = (width, min(1.85, column + 0.45) * rows + 0.2 * (heading.count("\n") + 1) + 0.4)
    figure, axes = pyplot.subplots(rows, cols, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(heading, fontsize=11)
    for place, ax in enumerate(axes.flat):
        ax.axis("off")
        if place < len(mistakes):
            _draw_mistake(ax, mistakes, place, column)
    return figure


def _mistakes_title(mistakes: Mistakes, room: int, title: str | None, width: float) -> str:
    what = f"misclassified {mistakes.part} images"
    head = what.capitalize() if title is None else f"{title}: {what}"
    count = f"{mistakes.total:,} of {mistakes.tested:,}"
    if mistakes.total < room:
        count = f"only {count}" if mistakes.total else f"none of {mistakes.tested:,}"
    return fitted(f"{head}\n{mistakes.source}: {count}", width, size=11)


def _draw_mistake(ax: Axes, mistakes: Mistakes, place: int, width: float) -> None:
    """The image, grey where it has one channel, below its classes."""
    pixels = mistakes.images[place].permute(1, 2, 0).numpy()
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    if mistakes.heat is not None:
        ax.imshow(mistakes.heat[place].numpy(), cmap="jet", vmin=0, vmax=1, alpha=0.4)
    classes = [shortened(name, 22) for name in mistakes.classes]
    true, predicted = (classes[int(k[place])] for k in (mistakes.true, mistakes.predicted))
    probability = float(mistakes.probability[place])
    sure = f"{100 * probability:.1f}" if probability < 0.9995 else "> 99.9"
    text = f"true: {true}\npredicted: {predicted} ({sure}\N{NO-BREAK SPACE}%)"
    ax.set_title(fitted(text, width, size=9), fontsize=9)
