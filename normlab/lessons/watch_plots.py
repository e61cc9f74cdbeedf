"""Pictures of what `watch` recorded: over the steps, and by depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from normlab.lessons.watching import CONVOLUTION, KINDS, NORM, PERCENTILES, QUANTITIES, Watch
from normlab.support.checks import one_of, whole_number
from normlab.support.colours import COLOURS, is_dark, text_colour
from normlab.support.figures import drawn, fitted
from normlab.support.type_hints import Axes, DataFrame, Figure

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
        quantity: one of `watching.QUANTITIES`.
        kind: of the layers, "convolution", "linear" or "norm".

    Raises `ValueError` for an unknown quantity or kind, and where there is nothing to draw.
    """
    from matplotlib import colormaps

    one_of(quantity, QUANTITIES, "quantity")
    plain = quantity.replace("_", " ")
    what, name, scale, logarithmic = _NAMES.get(quantity, (plain.capitalize(), plain, 1, False))
    what = what.replace("the activations", "the norms' outputs") if kind == NORM else what
    found = _tables(watches, kind, [quantity])
    tables = {label: scale * table[quantity] for label, table in found.items()}
    ends = (0.3, 1) if is_dark() else (0, 0.88)  # none is lost on the background
    depth = max(len(table.columns) for table in tables.values())
    shades = colormaps["viridis"](np.linspace(*ends, depth))
    figure, axes = _panels(1, list(tables), what if title is None else title)
    for ax, table in zip(axes[0], tables.values(), strict=True):
        marker = "o" if len(table) == 1 else None  # a single step has no line
        for layer, colour in zip(table, shades, strict=False):
            if table[layer].notna().any():
                look = {"color": colour, "linewidth": 1.4, "marker": marker}
                ax.plot(table.index, table[layer], label=layer, **look)
        ax.set_xlabel("training step")
    axes[0][0].set_ylabel(name)
    values = np.concatenate([table.to_numpy().ravel() for table in tables.values()])
    lowest, highest = np.nanmin(values), np.nanmax(values)
    if logarithmic and 0 < lowest * _DECADE <= highest:
        axes[0][0].set_yscale("log")  # of all panels
    _depth_bar(figure, axes, shades, kind)
    return figure


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
    quantities = [f"percentile_{share}" for share in PERCENTILES]
    tables = _tables(watches, kind, quantities)
    rows = min(times, *map(len, tables.values()))
    what = "Activations by depth: median, middle 50 % and 90 %"
    figure, axes = _panels(rows, list(tables), what if title is None else title)
    for column, table in zip(axes.T, tables.values(), strict=True):
        places = np.linspace(0, len(table) - 1, rows).round().astype(int)
        for ax, place in zip(column, places, strict=True):
            _draw_bands(ax, [table.iloc[place][quantity] for quantity in quantities])
            step = f"step {table.index[place]}"
            ax.text(0.02, 0.97, step, transform=ax.transAxes, va="top", fontsize=9)
        column[-1].set_xlabel(f"{kind}, in order")
    for row in axes:
        _compress(row)
    axes[rows // 2][0].set_ylabel("activation")
    return figure


def _tables(
    watches: Mapping[str, Watch | DataFrame], kind: str, quantities: list[str]
) -> dict[str, DataFrame]:
    """For each label a row for each step, and columns (quantity, layer), the layers as they run.

    A layer that has no such quantity has a column of NaN.
    """
    if not isinstance(watches, Mapping) or not watches:
        raise ValueError("a picture needs watches by label, such as {'BN': watch}")
    one_of(kind, KINDS, "kind of layer")
    tables = {}
    for label, each in watches.items():
        frame = each.frame() if isinstance(each, Watch) else each
        frame = frame[frame["kind"] == kind]
        columns = list(itertools.product(quantities, frame["layer"].unique()))
        table = frame.pivot_table(index="step", columns=["quantity", "layer"], values="value")
        for quantity in quantities:
            if quantity not in table:
                raise ValueError(f"{label}: no {quantity!r} of a {kind} layer was recorded")
        tables[label] = table.reindex(columns=columns).dropna(how="all")
    return tables


def _panels(rows: int, labels: list[str], title: str) -> tuple[Figure, np.ndarray]:
    """Axes of so many rows, with a column for each label."""
    from matplotlib import pyplot

    size = (1.2 + 3.4 * len(labels), 1.2 + (2.6 if rows == 1 else 1.7 * rows))
    options = {"figsize": size, "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(rows, len(labels), sharex=True, sharey="row", **options)
    figure.suptitle(fitted(title, size[0], size=11), fontsize=11)
    for ax, label in zip(axes[0], labels, strict=True):
        ax.set_title(fitted(label, 3.4, size=12))
    for ax in axes.flat:
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _depth_bar(figure: Figure, axes: np.ndarray, shades: np.ndarray, kind: str) -> None:
    """The key to the colours: the layers' numbers from the first to the last."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depth = len(shades)
    norm = BoundaryNorm(np.arange(depth + 1) + 0.5, depth)
    colours = ScalarMappable(norm, ListedColormap(shades))
    bar = figure.colorbar(colours, ax=list(axes.flat), ticks=range(1, depth + 1, -(-depth // 10)))
    bar.minorticks_off()  # there are ten numbers at most, each in the middle of its colour
    bar.set_label(f"number of the {kind} layer" if kind != CONVOLUTION else f"number of the {kind}")
    bar.ax.invert_yaxis()  # the first on top


def _draw_bands(ax: Axes, percentiles: list) -> None:
    """The `PERCENTILES` of each layer."""
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
    if max(widest) > _BESIDE * min(widest) > 0:
        edge = 10.0 ** round(math.log10(min(widest)))  # else its ticks would write over each other
        axes[0].set_yscale("symlog", linthresh=edge)  # of all panels of the row
        for ax in axes:
            for height in (-edge, edge):
                ax.axhline(height, color=text_colour(), linestyle=":", linewidth=0.6, alpha=0.5)
