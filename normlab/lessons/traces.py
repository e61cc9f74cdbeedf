"""Pictures of what `watch` recorded: over the steps, and by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from normlab.lessons.watching import CONVOLUTION, KINDS, NORM, WATCHED, Watch
from normlab.support.checks import one_of, whole_number
from normlab.support.colours import COLOURS, ink, is_dark
from normlab.support.figures import drawn, fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# The title of each quantity, what its axis says, its factor, and whether its sizes may differ so
# much that only a logarithmic axis shows them all.
_NAMES = {
    "mean": ("Mean of the activations", "mean", 1, False),
    "std": ("Standard deviation of the activations", "standard deviation", 1, True),
    "dead": ("Dead channels", "dead channels (%)", 100, False),
    "weight_norm": ("Euclidean norm of the weights", "‖w‖", 1, True),
    "gradient_norm": ("Euclidean norm of the gradient", "‖gradient‖", 1, True),
    "small_weights": ("Weights below 0.001", "small weights (%)", 100, False),
    "rate": ("Learning rate", "rate", 1, True),
    "effective_rate": ("Effective rate", "rate / ‖w‖²", 1, True),
    "running_mean": ("BN's running mean", "mean over channels", 1, False),
    "running_variance": ("BN's running variance", "mean over channels", 1, True),
}
_DECADE = 10  # the least ratio for which a logarithmic axis has ticks to read
_BESIDE = 8  # how many times as wide a panel's values may be as those of the one beside it


@drawn
def plot_watch(
    watches: Mapping[str, Watch | DataFrame],
    quantity: str = "std",
    *,
    kind: str = CONVOLUTION,
    title: str | None = None,
) -> Figure:
    """A quantity over the training steps: a panel for each watch, a line for each layer.

    The deeper a layer, the lighter its line. The panels share their axes, so that one network can
    be compared with another, with and without a normalization, say.

    Args:
        watches: what `watch` returned, or its `frame`, by label.
        quantity: one of `watching.WATCHED`.
        kind: of the layers, "convolution", "linear" or "norm".

    Raises `ValueError` for an unknown quantity or kind, and where there is nothing to draw.
    """
    one_of(quantity, WATCHED, "quantity")
    plain = quantity.replace("_", " ")
    what, name, scale, logarithmic = _NAMES.get(quantity, (plain.capitalize(), plain, 1, False))
    what = what.replace("the activations", "the norms' outputs") if kind == NORM else what
    frames = _frames(watches)
    tables = {
        label: scale * _table(label, frame, quantity, kind) for label, frame in frames.items()
    }
    order = {label: _order(frame, kind) for label, frame in frames.items()}
    depth = max(map(len, order.values()))
    figure, axes = _panels(1, len(tables))
    _head(figure, title if title is not None else what)
    for ax, (label, table) in zip(axes[0], tables.items(), strict=True):
        _draw_lines(ax, table, [_shades(depth)[order[label].index(layer)] for layer in table])
        ax.set_title(fitted(label, 3.4, size=12))
        ax.set_xlabel("training step")
    axes[0][0].set_ylabel(name)
    if logarithmic and _ratio(list(tables.values())) >= _DECADE:
        axes[0][0].set_yscale("log")  # of all panels
    _depth_bar(figure, axes, depth, kind)
    return figure


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(fitted(title, figure.get_figwidth(), size=11), fontsize=11)


def _ratio(tables: list[DataFrame]) -> float:
    """The largest value by the smallest; 0 where not all are positive."""
    values = np.concatenate([table.to_numpy().ravel() for table in tables])
    lowest, highest = np.nanmin(values), np.nanmax(values)
    return highest / lowest if lowest > 0 else 0.0


@drawn
def plot_activations(
    watches: Mapping[str, Watch | DataFrame],
    *,
    times: int = 3,
    kind: str = CONVOLUTION,
    title: str | None = None,
) -> Figure:
    """How the activations of each layer are distributed, for each watch and at several times.

    Each watch has a column, each time a row. In it, from left to right, the layers in the order in
    which they run: the median, and bands that hold the middle 50 % and 90 % of the values. A row
    shares its axis, so that activations that vanish with depth are seen to; where those of one
    panel are far wider than those of another, it is logarithmic beyond the dotted lines.

    Args:
        watches: what `watch` returned, or its `frame`, by label.
        times: how many of the recorded steps, spread from the first to the last.
        kind: of the layers, "convolution", "linear" or "norm".

    Raises `ValueError` for an unknown kind, and where there is nothing to draw.
    """
    whole_number(times, "times")
    bands = {
        label: [_table(label, frame, f"percentile_{share}", kind) for share in (5, 25, 50, 75, 95)]
        for label, frame in _frames(watches).items()
    }
    recorded = [len(tables[0]) for tables in bands.values()]
    rows = min(times, *recorded)
    figure, axes = _panels(rows, len(bands))
    what = "Activations by depth: median, middle 50 % and 90 %"
    _head(figure, title if title is not None else what)
    for column, (label, tables) in enumerate(bands.items()):
        for row in range(rows):
            place = round(row * (len(tables[0]) - 1) / max(rows - 1, 1))
            _draw_bands(axes[row][column], [table.iloc[place] for table in tables])
            _write_step(axes[row][column], tables[0].index[place])
        axes[0][column].set_title(fitted(label, 3.4, size=12))
        axes[-1][column].set_xlabel(f"{kind}, from the first to the last")
    for some in axes:
        _compress(some)
    axes[rows // 2][0].set_ylabel("activation")
    return figure


def _frames(watches: Mapping[str, Watch | DataFrame]) -> dict[str, DataFrame]:
    if not isinstance(watches, Mapping) or not watches:
        raise ValueError("a picture needs watches by label, such as {'BN': watch}")
    return {
        label: each.frame() if isinstance(each, Watch) else each for label, each in watches.items()
    }


def _order(frame: DataFrame, kind: str) -> list[str]:
    """The layers of a kind in the order in which they run."""
    return list(dict.fromkeys(frame["layer"][frame["kind"] == kind]))


def _table(label: str, frame: DataFrame, quantity: str, kind: str) -> DataFrame:
    """The quantity with a row for each step and a column for each layer, in their order."""
    one_of(kind, KINDS, "kind of layer")
    chosen = frame[(frame["quantity"] == quantity) & (frame["kind"] == kind)]
    if chosen.empty:
        raise ValueError(f"{label}: no {quantity!r} of a {kind} layer was recorded")
    table = chosen.pivot_table(index="step", columns="layer", values="value")
    return table[[layer for layer in _order(frame, kind) if layer in table]]


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    from matplotlib import pyplot

    size = (1.2 + 3.4 * columns, 1.2 + (2.6 if rows == 1 else 1.7 * rows))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    for ax in axes.flat:
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_lines(ax: Axes, table: DataFrame, colours: list) -> None:
    marker = "o" if len(table) == 1 else None  # a single step has no line
    for layer, colour in zip(table, colours, strict=True):
        look = {"color": colour, "linewidth": 1.4, "marker": marker}
        ax.plot(table.index, table[layer], label=layer, **look)


def _shades(depth: int) -> np.ndarray:
    """A colour for each layer, from dark to light, but none that is lost on the background."""
    from matplotlib import colormaps

    ends = (0.3, 1) if is_dark() else (0, 0.88)
    return colormaps["viridis"](np.linspace(*ends, depth))


def _depth_bar(figure: Figure, axes: np.ndarray, depth: int, kind: str) -> None:
    """The key to the colours: the layers' numbers from the first to the last."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    edges = np.arange(depth + 1) + 0.5
    colours = ScalarMappable(BoundaryNorm(edges, depth), ListedColormap(_shades(depth)))
    bar = figure.colorbar(colours, ax=list(axes.flat), ticks=sorted({1, (depth + 1) // 2, depth}))
    bar.set_label(f"number of the {kind} layer" if kind != CONVOLUTION else f"number of the {kind}")
    bar.ax.invert_yaxis()  # the first on top


def _draw_bands(ax: Axes, percentiles: list) -> None:
    """The 5th, 25th, 50th, 75th and 95th percentile of each layer, in this order."""
    from matplotlib.ticker import MaxNLocator

    places = np.arange(1, len(percentiles[0]) + 1)
    lowest, low, middle, high, highest = percentiles
    ax.fill_between(places, lowest, highest, color=COLOURS[0], alpha=0.18, linewidth=0)
    ax.fill_between(places, low, high, color=COLOURS[0], alpha=0.35, linewidth=0)
    ax.plot(places, middle, color=COLOURS[0], marker="o", markersize=3, linewidth=1.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _compress(axes: np.ndarray) -> None:
    """Makes a row's axis logarithmic far from 0 if the narrowest panel would be flat otherwise."""
    widest = [np.abs(ax.dataLim.intervaly).max() for ax in axes]
    edge = float(f"{min(widest):.0e}")  # a round number
    if edge and max(widest) > _BESIDE * edge:
        axes[0].set_yscale("symlog", linthresh=edge)  # of all panels of the row
        for ax in axes:
            for height in (-edge, edge):
                ax.axhline(height, color=ink(), linestyle=":", linewidth=0.6, alpha=0.5)


def _write_step(ax: Axes, step: int) -> None:
    ax.text(0.02, 0.97, f"step {step}", transform=ax.transAxes, va="top", fontsize=9)
