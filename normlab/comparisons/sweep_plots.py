"""The picture of a sweep: a quantity over batch sizes or rates, a curve for each variant."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

from normlab.history import QUANTITIES
from normlab.plots import NAMES
from normlab.support.checks import one_of
from normlab.support.colours import curve_styles
from normlab.support.figures import (
    drawn,
    label_axes,
    new_axes,
    place_legend,
    save_if_drawn,
    shortened,
)
from normlab.support.type_hints import Axes, DataFrame, Figure, Index

# What an axis says, and a label.
_SWEPT = {"batch_size": ("batch size (images)", "batch size"), "base_lr": ("learning rate", "rate")}


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
    x = one_of(x, _SWEPT, "axis") if x else max(_SWEPT, key=lambda name: table[name].nunique())
    one_of(quantity, [name for name in QUANTITIES if name in table], "quantity")
    (other,) = _SWEPT.keys() - {x}
    curves = _curves(table, x, other, quantity)
    ax = ax if ax is not None else new_axes(6.8, 4.2, names=len(curves))
    bars, above = [], 0
    for (label, points), style in zip(curves.items(), curve_styles(curves).values(), strict=True):
        mean, sd = points["mean"], points["sd"].fillna(0)  # no mean where a run diverged
        highest = 100 if quantity.endswith("accuracy") else math.inf
        reach = [sd.clip(upper=mean), sd.clip(upper=highest - mean)]  # as far as values can lie
        style |= {"label": label, "markersize": 4, "capsize": 2.5, "linewidth": 1.5}
        bars.append(ax.errorbar(mean.index, mean, reach, **style))
        above += _mark_diverged(ax, mean.index[mean.isna()], style["color"], above)
    values = sorted(table[x].unique())
    if len(values) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
    diverged = " (crosses above the frame: a run diverged)" if above else ""
    title = title if title is not None else _title(table, quantity)
    label_axes(ax, title, _SWEPT[x][0] + diverged, NAMES[quantity][1], pad=6 + above)
    place_legend(ax, "best", [shortened(label) for label in curves], handles=bars)
    return ax.figure


def _curves(table: DataFrame, x: str, other: str, quantity: str) -> dict[str, DataFrame]:
    """Mean and standard deviation of the quantity for each x, by the labels of the curves."""
    by = ["variant", other] if len(table[other].unique()) > 1 else ["variant"]
    scale = 100 if quantity.endswith("accuracy") else 1
    curves = {}
    for (variant, *value), rows in table.groupby(by, sort=False):
        label = ", ".join([variant, *(f"{_SWEPT[other][1]} {each:g}" for each in value)])
        values = scale * rows.set_index(x)[quantity]
        curves[label] = values.groupby(level=0).agg(
            mean=lambda some: some.mean(skipna=False), sd=lambda some: some.std(skipna=False)
        )
    return curves


def _mark_diverged(ax: Axes, places: Index, colour: str, above: int) -> int:
    """Crosses above the frame, where they do not pass for values, in a line for each curve.

    `above` is where that line may begin, in points; returns how many it takes.
    """
    from matplotlib.transforms import ScaledTranslation

    if places.empty:  # a line without points outside the frame would upset the layout
        return 0
    shift = ScaledTranslation(0, (above + 6) / 72, ax.figure.dpi_scale_trans)
    style = {"color": colour, "clip_on": False, "transform": ax.get_xaxis_transform() + shift}
    ax.plot(places, [1.0] * len(places), "x", markersize=5, **style)
    return 8


def _title(table: DataFrame, quantity: str) -> str:
    """The quantity, what the images are, and of how many runs a point is."""
    most = table.groupby(["variant", "batch_size", "base_lr"])["seed"].count().max()
    seeds = f"mean ± sd of {most} seeds" if most > 1 else "one seed"
    source = f", {table.attrs['source']}" if "source" in table.attrs else ""
    return f"{NAMES[quantity][0]}{source}, last epoch, {seeds}"


def save_sweep_plot(path: Path, table: DataFrame, *, seconds: float = 0) -> None:
    """Saves `plot_sweep`, unless the figure that is there is younger than so many seconds."""
    if not path.is_file() or time.time() - path.stat().st_mtime >= seconds:
        save_if_drawn(partial(plot_sweep, table), path)
