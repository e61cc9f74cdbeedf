"""The picture of a sweep: a quantity over batch sizes or rates, a curve for each variant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from normlab.checks import one_of
from normlab.plots import COLOURS, LINES, MARKERS, NAMES, new_axes, places_of
from normlab.runs import QUANTITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

_SWEPT = {"batch_size": "batch size", "base_lr": "rate"}


def plot_sweep(
    table: DataFrame,
    x: str | None = None,
    quantity: str = "test_accuracy",
    *,
    ax: Axes | None = None,
) -> Figure:
    """A curve for each variant over the batch sizes or the rates of a sweep.

    Points are means over seeds with bars of one standard deviation. Where the other of the two was
    swept as well, each of its values has a curve of its own. A cross above the frame marks where
    the loss of a run diverged.

    Args:
        table: as from `run_sweep`.
        x: "batch_size" or "base_lr"; without it, whichever has more values.
        quantity: "test_accuracy", "test_loss", "train_accuracy" or "train_loss".

    Raises `ValueError` for an empty table or an unknown name.
    """
    if table.empty:
        raise ValueError("there are no runs to plot")
    axes = ("batch_size", "base_lr")
    x = one_of(x, axes, "axis") if x else max(axes, key=lambda name: table[name].nunique())
    one_of(quantity, [name for name in QUANTITIES if name in table], "quantity")
    (other,) = set(axes) - {x}
    ax = ax if ax is not None else new_axes(6.8, 4.2)
    by = ["variant", other] if len(table[other].unique()) > 1 else ["variant"]
    curves = {}
    for names, rows in table.groupby(by, sort=False):
        label = names[0] if len(names) == 1 else f"{names[0]}, {_SWEPT[other]} {names[1]:g}"
        curves[label] = rows.groupby(x)[quantity].agg(
            mean=lambda some: some.mean(skipna=False), sd=lambda some: some.std(skipna=False)
        )
    places = places_of(list(curves))
    for label, points in curves.items():
        _draw_swept(ax, points, quantity, label, places[label])
    above = _mark_diverged(ax, curves, places)
    _annotate_sweep(ax, table, x, quantity, above)
    return ax.figure


def _draw_swept(ax: Axes, points: DataFrame, quantity: str, label: str, place: int) -> None:
    """Means and standard deviations over seeds; none where a run diverged."""
    scale = 100 if quantity.endswith("accuracy") else 1
    look = place % len(COLOURS)
    ax.errorbar(
        points.index,
        points["mean"] * scale,
        _bars(points["mean"] * scale, points["sd"].fillna(0) * scale, quantity),
        color=COLOURS[look],
        linestyle=LINES[look],
        marker=MARKERS[look],
        markersize=4,
        capsize=2.5,
        linewidth=1.5,
        label=label,
    )


def _mark_diverged(ax: Axes, curves: dict[str, DataFrame], places: dict[str, int]) -> float:
    """Crosses above the frame, where they do not pass for values; returns how high they reach.

    That is in points; each label has a line of its own.
    """
    from matplotlib.transforms import ScaledTranslation

    height = 0.0
    for label, points in curves.items():
        diverged = points.index[points["mean"].isna()]
        if diverged.empty:  # a line without points outside the frame would upset the layout
            continue
        colour = COLOURS[places[label] % len(COLOURS)]
        shift = ScaledTranslation(0, (height + 6) / 72, ax.figure.dpi_scale_trans)
        where = ax.get_xaxis_transform() + shift
        look = {"color": colour, "markersize": 5, "clip_on": False, "transform": where}
        ax.plot(diverged, [1.0] * len(diverged), "x", **look)
        height += 8
    return height


def _bars(mean: Series, sd: Series, quantity: str) -> list[Series]:
    """How far the bars reach down and up: not where no accuracy and no loss can lie."""
    highest = 100 if quantity.endswith("accuracy") else math.inf
    return [sd.clip(upper=mean), sd.clip(upper=highest - mean)]


def _annotate_sweep(ax: Axes, table: DataFrame, x: str, quantity: str, above: float) -> None:
    """Names everything; the title stands so many points above the frame."""
    from matplotlib.ticker import NullLocator

    name, unit = NAMES[quantity]
    values = sorted(table[x].unique())
    if len(values) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())
    named = {"batch_size": "batch size (images)", "base_lr": "learning rate"}[x]
    diverged = " (crosses above the frame: a run diverged)" if above else ""
    ax.set_xlabel(named + diverged)
    ax.set_ylabel(unit)
    counts = table.groupby(["variant", "batch_size", "base_lr"])["seed"].count()
    seeds = f"mean ± sd of {counts.max()} seeds" if counts.max() > 1 else "one seed"
    ax.set_title(f"{name}, last epoch, {seeds}", pad=6 + above)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
