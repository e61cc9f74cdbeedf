"""The picture of a sweep: a quantity over batch sizes or rates, a curve for each variant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from normlab.history import QUANTITIES
from normlab.plots import NAMES
from normlab.support.checks import one_of
from normlab.support.colours import looks_of
from normlab.support.figures import (
    drawn,
    label_axes,
    legend_height,
    new_axes,
    place_legend,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

_SWEPT = {"batch_size": "batch size", "base_lr": "rate"}


@drawn
def plot_sweep(
    table: DataFrame,
    x: str | None = None,
    quantity: str = "test_accuracy",
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """A curve for each variant over the batch sizes or the rates of a sweep.

    Points are means over seeds with bars of one standard deviation. Where the other of the two was
    swept as well, each of its values has a curve of its own. A cross above the frame marks where
    the loss of a run diverged.

    Args:
        table: as from `run_sweep`, which notes the data set in its `attrs`; the title names it.
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
    curves = _curves(table, x, other, quantity)
    ax = ax if ax is not None else new_axes(6.8, 4.2 + legend_height(len(curves)))
    looks = {label: look | {"label": label} for label, look in looks_of(curves).items()}
    bars = [_draw_swept(ax, points, quantity, looks[label]) for label, points in curves.items()]
    above = _mark_diverged(ax, curves, looks)
    _annotate_sweep(
        ax, table, x, quantity, above, title if title is not None else _title(table, quantity)
    )
    place_legend(ax, "best", [shortened(name) for name in curves], handles=bars)
    return ax.figure


def _curves(table: DataFrame, x: str, other: str, quantity: str) -> dict[str, DataFrame]:
    """Mean and standard deviation of the quantity for each x, by the labels of the curves."""
    by = ["variant", other] if len(table[other].unique()) > 1 else ["variant"]
    curves = {}
    for names, rows in table.groupby(by, sort=False):
        label = names[0] if len(names) == 1 else f"{names[0]}, {_SWEPT[other]} {names[1]:g}"
        curves[label] = rows.groupby(x)[quantity].agg(
            mean=lambda some: some.mean(skipna=False), sd=lambda some: some.std(skipna=False)
        )
    return curves


def _draw_swept(ax: Axes, points: DataFrame, quantity: str, look: dict) -> ErrorbarContainer:
    """Means and standard deviations over seeds; none where a run diverged."""
    scale = 100 if quantity.endswith("accuracy") else 1
    return ax.errorbar(
        points.index,
        points["mean"] * scale,
        _bars(points["mean"] * scale, points["sd"].fillna(0) * scale, quantity),
        markersize=4,
        capsize=2.5,
        linewidth=1.5,
        **look,
    )


def _mark_diverged(ax: Axes, curves: dict[str, DataFrame], looks: dict[str, dict]) -> float:
    """Crosses above the frame, where they do not pass for values; returns how high they reach.

    That is in points; each label has a line of its own.
    """
    from matplotlib.transforms import ScaledTranslation

    height = 0.0
    for label, points in curves.items():
        diverged = points.index[points["mean"].isna()]
        if diverged.empty:  # a line without points outside the frame would upset the layout
            continue
        shift = ScaledTranslation(0, (height + 6) / 72, ax.figure.dpi_scale_trans)
        where = ax.get_xaxis_transform() + shift
        look = {"color": looks[label]["color"], "clip_on": False, "transform": where}
        ax.plot(diverged, [1.0] * len(diverged), "x", markersize=5, **look)
        height += 8
    return height


def _bars(mean: Series, sd: Series, quantity: str) -> list[Series]:
    """How far the bars reach down and up: not where no accuracy and no loss can lie."""
    highest = 100 if quantity.endswith("accuracy") else math.inf
    return [sd.clip(upper=mean), sd.clip(upper=highest - mean)]


def _annotate_sweep(
    ax: Axes, table: DataFrame, x: str, quantity: str, above: float, title: str
) -> None:
    """Names the axes, and the crosses where some reach above the frame."""
    from matplotlib.ticker import NullLocator

    values = sorted(table[x].unique())
    if len(values) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())
    named = {"batch_size": "batch size (images)", "base_lr": "learning rate"}[x]
    diverged = " (crosses above the frame: a run diverged)" if above else ""
    label_axes(ax, title, named + diverged, NAMES[quantity][1], pad=6 + above)


def _title(table: DataFrame, quantity: str) -> str:
    """The quantity, what the images are, and of how many runs a point is."""
    counts = table.groupby(["variant", "batch_size", "base_lr"])["seed"].count()
    seeds = f"mean ± sd of {counts.max()} seeds" if counts.max() > 1 else "one seed"
    source = f", {table.attrs['source']}" if "source" in table.attrs else ""
    return f"{NAMES[quantity][0]}{source}, last epoch, {seeds}"
