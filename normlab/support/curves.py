"""What makes curves over epochs readable: their axes, their legend, the values at their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from normlab.support.colours import legible
from normlab.support.figures import shortened
from normlab.support.type_hints import Axes, Figure, Line2D


def two_columns(panels: int, names: int, **shared: object) -> tuple[Figure, np.ndarray]:
    """A figure with the axes of so many panels, and room for a legend of so many names below."""
    from matplotlib import pyplot

    columns, rows = min(panels, 2), -(-panels // 2)
    size = (4.8 * columns, 3.4 * rows + 0.6 + 0.2 * -(-names // (2 * columns)))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **shared
    )
    for ax in axes.flat[panels:]:
        ax.remove()
    for ax in axes.flat:
        ax.tick_params(labelbottom=True)  # also where no panel stands below
    return figure, axes.flat[:panels]


def set_scales(ax: Axes, quantity: str) -> None:
    """Whole epochs; a logarithmic axis for losses; for accuracies one that ends at 100 %."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if quantity.endswith("loss") and any(line.get_ydata()[-1] > 0 for line in ax.lines):
        _make_logarithmic(ax)
    if quantity.endswith("accuracy"):
        _focus_on_late_epochs(ax)


def _make_logarithmic(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, and more where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    lowest, highest = ax.get_ylim()
    subs = (1, 2, 5) if highest > 8 * lowest else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _focus_on_late_epochs(ax: Axes) -> None:
    """Ends the axis at 100 %, and cuts off first epochs that take more than half of it."""
    beside = [line for one in ax.get_shared_y_axes().get_siblings(ax) for line in one.lines]
    curves = [np.asarray(line.get_ydata()) for line in beside]
    late = np.concatenate([curve[len(curve) // 4 :] for curve in curves])
    first, span = min(curve.min() for curve in curves), max(late.max() - late.min(), 0.5)
    ax.set_ylim(top=min(ax.get_ylim()[1], 100 + 0.05 * span))  # no ticks above 100 %
    if late.min() - first > span:
        ax.set_ylim(bottom=late.min() - 0.35 * span)
    if min(min(line.get_ydata()) for line in ax.lines) < ax.get_ylim()[0]:
        ax.set_xlabel("epoch (the first values lie below the frame)")


def write_ends(ax: Axes, lines: Sequence[Line2D], quantity: str) -> None:
    """Writes the last values to the right of the axes, moved apart where they would overlap."""
    ax.get_ylim()  # settles the limits, which the transformation below needs
    to_axes = ax.transScale + ax.transLimits
    lines = sorted(lines, key=lambda line: line.get_ydata()[-1])
    ends = [line.get_xydata()[-1] for line in lines]
    heights = _spread([to_axes.transform(end)[1] for end in ends], gap=0.055)
    text = {"textcoords": "axes fraction", "annotation_clip": False, "fontsize": 9, "va": "center"}
    arrow = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    for line, end, height in zip(lines, ends, heights, strict=True):
        number = f"{end[1]:.2f} %" if quantity.endswith("accuracy") else f"{end[1]:#.3g}"
        text["color"] = legible(line.get_color(), ax.figure.get_facecolor())
        text["arrowprops"] = arrow | {"color": line.get_color()}
        ax.annotate(f"{number} {shortened(line.get_label(), 20)}", end, (1.035, height), **text)


def _spread(heights: Sequence[float], *, gap: float) -> np.ndarray:
    """Ascending heights in [0, 1] moved as little as needed to lie `gap` apart, below the title."""
    steps = gap * np.arange(len(heights))
    apart = np.maximum.accumulate(np.maximum(heights, 0) - steps) + steps
    return np.minimum(apart, 0.97 - steps[::-1])


def legend_key(ax: Axes, groups: Mapping[str, Sequence]) -> dict:
    """What a legend holds: the curves, their names, what their bands are; nothing for one run.

    `groups` are the runs of each label, which differ in their seed.
    """
    seeds = {label: len(runs) for label, runs in groups.items()}
    lines = [line for line in ax.lines if not line.get_label().startswith("_child")]
    most, same = max(seeds.values()), len(set(seeds.values())) == 1
    counts = {k: "" if same else f", {n} seed{'s' if n > 1 else ''}" for k, n in seeds.items()}
    labels = [line.get_label() for line in lines]
    labels = [shortened(label) + counts.get(label, "") for label in labels]
    bands = f"mean ± sd of {most} seeds" if same else "mean ± sd"
    key = {"handles": lines, "labels": labels, "title": bands if most > 1 else None}
    return key if most > 1 or len(lines) > 1 else {}
