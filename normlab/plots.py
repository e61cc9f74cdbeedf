"""Pictures of histories and confusions, from plain data: nothing here trains or predicts.

Every function draws into `ax` where it takes one, or makes a figure of its own, and returns the
figure. None calls `show`: a notebook shows its figures by itself, a script saves them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from normlab.history import QUANTITIES, Run
from normlab.support.checks import one_of, warn
from normlab.support.figures import (
    add_legend,
    drawn,
    fitted,
    legible,
    new_axes,
    own_style,
    paper,
    shortened,
)
from normlab.support.files import user_path, written_aside

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from torch import Tensor

Runs = Mapping[str, Run | Sequence[Run]]
"""What to compare: a run, or several that differ in their seed, for each label; `Results` too."""

# Okabe & Ito's colours, which colour-blind readers can tell apart, and with each a line style and
# a marker, which survive grey print; the last one is grey, which can be seen on black as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Which of them a norm has in every sweep and range test, so that figures can be compared.
_PLACES = {"BN": 0, "GN": 1, "LN": 2, "IN": 3, "none": 4}

NAMES = {
    "train_loss": ("Training loss", "cross-entropy (nats per image)"),
    "train_accuracy": ("Training accuracy", "accuracy (%)"),
    "test_loss": ("Test loss", "cross-entropy (nats per image)"),
    "test_accuracy": ("Test accuracy", "accuracy (%)"),
    "penalty": ("L1 penalty", "penalty (nats)"),
    "lr": ("Learning rate", "rate of the epoch's last step"),
    "seconds": ("Time of an epoch", "wall time (s)"),
}
MOST_INSIDE = 5  # names in a legend that leaves room for the curves


@drawn
def plot_curves(
    runs: Runs, quantity: str = "test_loss", *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """One curve for each label over the epochs, its last value written at its end.

    Several runs of a label become their mean with a band of one standard deviation. Losses have a
    logarithmic axis, so that the late epochs can be told apart.

    Raises `ValueError` for an unknown quantity or no runs.
    """
    one_of(quantity, QUANTITIES, "quantity")
    groups = _grouped(runs)
    ax = ax if ax is not None else new_axes(6.4, 4.2 + legend_height(len(groups)))
    _draw_panels([(ax, groups, quantity, title if title is not None else _title(groups, quantity))])
    return ax.figure


def _draw_panels(
    panels: Sequence[tuple[Axes, dict[str, list[Run]], str, str]], *, legends: bool = True
) -> None:
    """Fills axes, which may share their limits, each with groups, a quantity and a title."""
    lines = [_draw_curves(ax, groups, quantity) for ax, groups, quantity, _ in panels]
    for (ax, groups, quantity, title), some in zip(panels, lines, strict=True):
        _annotate(ax, quantity, title)
        if legends:
            _legend(ax, some, groups, quantity)
    for (ax, _, quantity, _), some in zip(panels, lines, strict=True):  # when no limit moves more
        if quantity != "lr":  # which is a setting, and ends near 0
            _write_ends(ax, some, quantity)


def _grouped(runs: Runs) -> dict[str, list[Run]]:
    groups = {
        label: [some] if isinstance(some, Run) else list(some) for label, some in runs.items()
    }
    empty = [label for label, some in groups.items() if not some]
    if empty or not groups:
        raise ValueError(f"there are no runs to plot{' of ' if empty else ''}{', '.join(empty)}")
    return groups


def _draw_curves(ax: Axes, groups: dict[str, list[Run]], quantity: str) -> list[Line2D]:
    """The mean over runs at each epoch for each label, and the bands; returns the lines."""
    scale = 100 if quantity.endswith("accuracy") else 1
    looks, lines = _looks(list(groups)), []
    for label, some in groups.items():
        length = min(len(run.history) for run in some)
        values = np.array([[row[quantity] for row in run.history[:length]] for run in some]) * scale
        epochs, mean, look = np.arange(1, length + 1), values.mean(0), looks[label]
        lines += ax.plot(epochs, mean, **look, markersize=3.5, linewidth=1.6, label=label)
        if len(some) > 1:
            low, high = mean - values.std(0, ddof=1), mean + values.std(0, ddof=1)
            ax.fill_between(epochs, low, high, color=look["color"], alpha=0.18, linewidth=0)
    return lines


def _looks(labels: list[str]) -> dict[str, dict]:
    """Colour, line and marker of each label; "BN + skip" is drawn as a relative of "BN".

    Relatives share colour and marker and differ in their lines. Without any, each label has a line
    of its own, which tells them apart in grey print.
    """
    families: dict[str, list[str]] = {}
    for label in labels:
        others = [other for other in labels if label.startswith(f"{other} ")]
        families.setdefault(min(others, key=len, default=label), []).append(label)
    alone = len(families) == len(labels)
    return {
        label: look_of(place, place if alone else member, hollow=member > 0)
        for place, family in enumerate(families.values())
        for member, label in enumerate(family)
    }


def look_of(place: int, line: int, *, hollow: bool = False) -> dict:
    """How a curve looks: an eighth has the first one's colour, but not its line and marker."""
    turn, colour = divmod(place, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": LINES[(line + turn) % len(LINES)],
        "marker": MARKERS[(colour + turn) % len(MARKERS)],
        "markerfacecolor": paper() if hollow or turn else COLOURS[colour],
    }


def places_of(labels: Sequence[str]) -> dict[str, int]:
    """Which colour, line and marker each label has: a norm has its own in every figure.

    Other labels take those that no norm has, or the first ones where none is a norm.
    """
    free = itertools.count(len(_PLACES) if any(label in _PLACES for label in labels) else 0)
    return {label: _PLACES[label] if label in _PLACES else next(free) for label in labels}


def _title(groups: dict[str, list[Run]], quantity: str) -> str:
    """The quantity's name and what the images are."""
    name, runs = NAMES[quantity][0], [run for some in groups.values() for run in some]
    if all("validation_images" in run.identity["data"] for run in runs):
        name = name.replace("Test", "Validation")
    sources = {run.provenance["data_source"] for run in runs}
    return f"{name}, {', '.join(sorted(sources))}"


def _annotate(ax: Axes, quantity: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    set_title(ax, title, inches=4.2)  # values at the ends of the curves stand beside the axes
    ax.set_xlabel("epoch")
    ax.set_ylabel(NAMES[quantity][1])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if quantity.endswith("loss") and any(line.get_ydata()[-1] > 0 for line in ax.lines):
        _logarithmic(ax)
    if quantity.endswith("accuracy"):
        _focus_on_late_epochs(ax)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def set_title(ax: Axes, title: str, *, inches: float = 6.4, **options: float) -> None:
    """A title in as many lines as it takes above axes of about this width."""
    ax.set_title(fitted(title, inches, size=12), **options)


def _legend(ax: Axes, lines: list[Line2D], groups: dict[str, list[Run]], quantity: str) -> None:
    """Names the curves and says how many seeds they are of; a single run needs no name."""
    handles, names, title = _key(ax, lines, groups)
    if title or len(names) > 1:
        # A place that is free by what such curves do: matplotlib's search for one is slow.
        place = "lower right" if quantity.endswith("accuracy") else "upper right"
        place_legend(ax, handles, names, inside=place, title=title)


def place_legend(
    ax: Axes, handles: Sequence[Artist], names: Sequence[str], *, inside: str, title: str | None
) -> None:
    """A legend in the axes, or below them where it would cover the curves."""
    from matplotlib.transforms import ScaledTranslation

    options = {"loc": inside}
    if len(names) > MOST_INSIDE:
        below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
        options = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below}
        options["ncols"] = 2
    add_legend(ax, handles, [shortened(name) for name in names], title=title, **options)


def _key(
    ax: Axes, lines: list[Line2D], groups: dict[str, list[Run]]
) -> tuple[list[Artist], list[str], str | None]:
    """What a legend holds: the curves, their names, and what their bands are."""
    others = [one for one in ax.get_legend_handles_labels()[0] if one not in lines]
    handles = [*others, *lines]
    names = [handle.get_label() for handle in handles]
    most = max(map(len, groups.values()))
    counts = {k: f"{len(some)} seed{'s' if len(some) > 1 else ''}" for k, some in groups.items()}
    if len(set(counts.values())) > 1:
        named = [f"{name}, {counts[name]}" if name in counts else name for name in names]
        return handles, named, "mean ± sd"
    return handles, names, f"mean ± sd of {most} seeds" if most > 1 else None


def _logarithmic(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, and more where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    lowest, highest = ax.get_ylim()
    subs = (1, 2, 5) if highest > 8 * lowest else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _focus_on_late_epochs(ax: Axes) -> None:
    """Ends the axis at 100 %, and cuts off first epochs that take more than half of it."""
    drawn = [line for one in ax.get_shared_y_axes().get_siblings(ax) for line in one.lines]
    curves = [np.asarray(line.get_ydata()) for line in drawn]
    late = np.concatenate([curve[len(curve) // 4 :] for curve in curves])
    first, span = min(curve.min() for curve in curves), max(late.max() - late.min(), 0.5)
    ax.set_ylim(top=min(ax.get_ylim()[1], 100 + 0.05 * span))  # no ticks above 100 %
    if late.min() - first > span:
        ax.set_ylim(bottom=late.min() - 0.35 * span)
    if min(min(line.get_ydata()) for line in ax.lines) < ax.get_ylim()[0]:
        ax.set_xlabel("epoch (the first values lie below the frame)")


def _write_ends(ax: Axes, lines: list[Line2D], quantity: str) -> None:
    """Writes the last values to the right of the axes, moved apart where they would overlap."""
    ax.get_ylim()  # settles the limits, which the transformation below needs
    to_axes = ax.transScale + ax.transLimits
    lines = sorted(lines, key=lambda line: line.get_ydata()[-1])
    ends = [line.get_xydata()[-1] for line in lines]
    heights = _spread([to_axes.transform(end)[1] for end in ends], gap=0.055)
    for line, end, height in zip(lines, ends, heights, strict=True):
        number = f"{end[1]:.2f} %" if quantity.endswith("accuracy") else f"{end[1]:#.3g}"
        ax.annotate(
            f"{number} {shortened(line.get_label(), 20)}",
            end,
            (1.035, height),
            textcoords="axes fraction",
            color=legible(line.get_color(), ax.figure.get_facecolor()),
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _spread(heights: list[float], *, gap: float) -> list[float]:
    """Ascending heights in [0, 1] moved as little as needed to lie `gap` apart."""
    floor = 0.0
    for place in range(len(heights)):
        heights[place] = max(heights[place], floor)
        floor = heights[place] + gap
    ceiling = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - gap
    return heights


@drawn
def plot_loss_and_accuracy(runs: Runs, *, training: bool = False) -> Figure:
    """Test loss and test accuracy side by side; with `training`, those of training above them.

    Training and test have the same axes, so that the distance between them can be read off.
    """
    from matplotlib import pyplot

    groups = _grouped(runs)
    parts = ("train", "test") if training else ("test",)
    many = len(groups) > MOST_INSIDE
    size = (12.0, 4.4 * len(parts) + legend_height(len(groups), columns=6))
    figure, axes = pyplot.subplots(
        len(parts), 2, figsize=size, sharey="col", layout="constrained", squeeze=False
    )
    names = [f"{part}_{kind}" for part in parts for kind in ("loss", "accuracy")]
    titles = [_title(groups, name) for name in names]
    panels = list(zip(axes.flat, [groups] * len(names), names, titles, strict=True))
    _draw_panels(panels, legends=not many)
    if many:
        _common_legend(figure, axes.flat[0], groups)
    return figure


def _common_legend(figure: Figure, ax: Axes, groups: dict[str, list[Run]]) -> None:
    """Names the curves of all panels once, below them."""
    handles, names, title = _key(ax, ax.get_lines(), groups)
    columns = min(len(names), int(figure.get_figwidth() / 2))
    place = {"loc": "outside lower center", "ncols": columns}
    add_legend(figure, handles, [shortened(name) for name in names], title=title, **place)


def legend_height(names: int, *, columns: int = 2) -> float:
    """How many inches a legend below the axes takes, where so many names need one."""
    return 0.2 * math.ceil(names / columns) + 0.3 if names > MOST_INSIDE else 0


@drawn
def plot_panels(panels: Mapping[str, Runs], quantity: str = "test_accuracy") -> Figure:
    """A panel of curves for each key, three beside each other, all with the same axes.

    The panels have the same labels, which the legend below them names once.

    Raises `ValueError` for an unknown quantity, no panels, no runs, or other labels in one panel.
    """
    from matplotlib import pyplot

    one_of(quantity, QUANTITIES, "quantity")
    if len({tuple(runs) for runs in panels.values()}) != 1:
        raise ValueError("there are no panels to plot, or not all have the same labels")
    groups = [_grouped(runs) for runs in panels.values()]
    columns, rows = min(len(groups), 3), math.ceil(len(groups) / 3)
    size = (5.0 * columns, 3.6 * rows + 0.9)
    shared = {"sharex": True, "sharey": True, "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(rows, columns, figsize=size, **shared)
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    used = list(axes.flat[: len(groups)])
    _draw_panels(
        list(zip(used, groups, [quantity] * len(used), panels, strict=True)), legends=False
    )
    _common_legend(figure, used[0], groups[0])
    every = {label: runs for group in groups for label, runs in group.items()}
    figure.suptitle(fitted(_title(every, quantity), size[0], size=12))
    return figure


@drawn
def plot_confusion(
    matrix: Tensor, classes: Sequence[str], *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Counts (classes, classes) as a table: row the true class, column the predicted one.

    The colours show the share of a true class's images; the right ones, on the diagonal, are left
    uncoloured so that the mistakes stand out.
    """
    from matplotlib import colormaps

    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(
            f"the confusion matrix is of shape {counts.shape}, which does not fit "
            f"{len(classes)} classes"
        )
    beside = 1 + 0.075 * max(8, *(len(shortened(name)) for name in classes))  # inches for names
    side = max((0.52 if len(classes) <= 30 else 0.4) * len(classes), 2.8) + beside
    ax = ax if ax is not None else new_axes(side, side)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    np.fill_diagonal(share, 0)
    top = max(share.max(), 0.01)  # so that one or two mistakes stay pale
    # Colours of its own: matplotlib would colour each of a large table's millions of pixels.
    ax.imshow(colormaps["Oranges"](share / top, bytes=True), interpolation="nearest")
    ax.grid(False)
    _write_counts(ax, counts, pale=share <= 0.65 * top)
    _label_classes(ax, classes)
    heading = title if title is not None else "Test images by true and predicted class"
    set_title(ax, heading, inches=side - beside)
    return ax.figure


def _write_counts(ax: Axes, counts: np.ndarray, *, pale: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        weight = "bold" if row == column else "normal"
        style = {"fontweight": weight, "color": "black" if pale[row, column] else "white"}
        style |= {"fontsize": 8, "ha": "center", "va": "center"}
        text = ax.text(column, row, f"{counts[row, column]}", **style)
        text.set_in_layout(False)  # the axes hold it anyway; to measure thousands takes long


def _label_classes(ax: Axes, classes: Sequence[str]) -> None:
    places, names = range(len(classes)), [shortened(name) for name in classes]
    turned = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 2 else {}
    ax.set_xticks(places, names, **turned)
    ax.set_yticks(places, names)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")


def save_if_drawn(draw: Callable[[], Figure], path: Path) -> bool:
    """Saves the figure that `draw` makes; returns whether, with a warning where that fails."""
    try:
        save_figure(draw(), path)
    except Exception as error:  # whatever it is: it must not cost a training its other results
        warn(f"{path.name} could not be drawn: {type(error).__name__}: {error}")
        return False
    return True


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 110) -> Path:
    """Writes the figure, whole or not at all, and closes it; returns the path.

    The name's ending says the format: png, svg or pdf; `ValueError` for another.
    """
    from matplotlib import pyplot

    path = user_path(path)
    form = one_of(path.suffix.lstrip("."), ("png", "svg", "pdf"), "ending of a figure's name")
    with own_style(), written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi, format=form, facecolor=figure.get_facecolor())
    pyplot.close(figure)
    return path
