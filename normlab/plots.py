"""Pictures of histories and confusions, from plain data: nothing here trains or predicts.

Every function draws into `ax` where it takes one, or makes a figure of its own, and returns the
figure. None calls `show`: a notebook shows its figures by itself, a script saves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from normlab.history import QUANTITIES, History, Run, runs_of
from normlab.support.checks import check_instance, one_of
from normlab.support.colours import curve_styles
from normlab.support.curves import legend_key, set_scales, two_columns, write_ends
from normlab.support.figures import drawn, fitted, label_axes, new_axes, place_legend, shortened
from normlab.support.type_hints import Axes, Figure, Line2D, Tensor

Runs = Mapping[str, Run | History | Sequence[Run] | Sequence[History]]
"""What to compare: a run, or several that differ in their seed, for each label; `Results` too.

A `History`, or what `History.of` takes, is as good as a run."""
Panel = tuple[dict[str, list[Run]], str, str]  # the runs of each label, a quantity, a title

NAMES = {
    "train_loss": ("Training loss", "cross-entropy (nats per image)"),
    "train_accuracy": ("Training accuracy", "accuracy (%)"),
    "test_loss": ("Test loss", "cross-entropy (nats per image)"),
    "test_accuracy": ("Test accuracy", "accuracy (%)"),
    "penalty": ("L1 penalty", "penalty (nats)"),
    "lr": ("Learning rate", "rate of the epoch's last step"),
    "seconds": ("Time of an epoch", "wall time (s)"),
}


@drawn
def plot_curves(
    runs: Runs, quantity: str = "test_loss", *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """One curve for each label over the epochs, its last value written at its end.

    Several runs of a label become their mean with a band of one standard deviation. Losses have a
    logarithmic axis, so that the late epochs can be told apart.

    Raises `ValueError` for an unknown quantity or no runs.
    """
    groups = _grouped(runs, quantity)
    title = title if title is not None else _title(quantity, groups)
    ax = ax if ax is not None else new_axes(6.4, 4.2, names=len(groups))
    _draw([ax], [(groups, quantity, title)])
    if key := legend_key(ax, groups):
        # A place that is free by what such curves do: matplotlib's search for one is slow.
        place_legend(ax, "lower right" if quantity.endswith("accuracy") else "upper right", **key)
    return ax.figure


@drawn
def plot_loss_and_accuracy(runs: Runs, *, training: bool = False) -> Figure:
    """Test loss and test accuracy side by side; with `training`, those of training above them.

    Training and test have the same axes, so that the distance between them can be read off.
    """
    groups = _grouped(runs)
    parts = ("train", "test") if training else ("test",)
    quantities = [f"{part}_{kind}" for part in parts for kind in ("loss", "accuracy")]
    panels = [(_grouped(runs, name), name, _title(name, groups)) for name in quantities]
    return _draw_side_by_side(panels, sharey="col")


@drawn
def plot_panels(panels: Mapping[str, Runs], quantity: str = "test_accuracy") -> Figure:
    """A panel of curves for each key, two beside each other, all with the same axes.

    The panels have the same labels, which the legend below them names once.

    Raises `ValueError` for an unknown quantity, no panels, no runs, or other labels in one panel.
    """
    if len({tuple(runs) for runs in panels.values()}) != 1:
        raise ValueError("there are no panels to plot, or not all have the same labels")
    groups = [_grouped(runs, quantity) for runs in panels.values()]
    filled = [(some, quantity, title) for title, some in zip(panels, groups, strict=True)]
    figure = _draw_side_by_side(filled, sharex=True, sharey=True)
    figure.suptitle(fitted(_title(quantity, *groups), figure.get_figwidth(), size=12))
    return figure


def _grouped(runs: Runs, quantity: str = "test_loss") -> dict[str, list[Run]]:
    """The runs of each label. Raises `ValueError` for an unknown quantity or no runs."""
    one_of(quantity, QUANTITIES, "quantity")
    check_instance(runs, Mapping, "what to plot", "give each a label, as in {'BN': run}")
    groups = {label: runs_of(some) for label, some in runs.items()}
    empty = [label for label, some in groups.items() if not some]
    if empty or not groups:
        raise ValueError(f"there are no runs to plot{' of ' if empty else ''}{', '.join(empty)}")
    for label, some in groups.items():
        if any(run.history and np.isnan(run.history[0][quantity]) for run in some):
            raise ValueError(f"the history of {label!r} holds no {quantity}")
    return groups


def _title(quantity: str, *groups: dict[str, list[Run]]) -> str:
    """The quantity's name and what the images are."""
    name = NAMES[quantity][0]
    runs = [run for each in groups for some in each.values() for run in some]
    if all("validation_images" in run.identity["data"] for run in runs):
        name = name.replace("Test", "Validation")
    sources = {run.provenance["data_source"] for run in runs} - {""}
    return ", ".join([name, *sorted(sources)])


def _draw_side_by_side(panels: Sequence[Panel], **shared: object) -> Figure:
    """Panels with the same labels in two columns, and below them one legend."""
    figure, axes = two_columns(len(panels), len(panels[0][0]), **shared)
    _draw(axes, panels)
    if key := legend_key(axes[0], panels[0][0]):
        place = {"loc": "outside lower center", "ncols": 2 * min(len(panels), 2)}
        figure.legend(**key, **place, frameon=False)
    return figure


def _draw(axes: Iterable[Axes], panels: Sequence[Panel]) -> None:
    """Fills axes, which may share their limits."""
    filled = list(zip(axes, panels, strict=True))
    lines = [_draw_curves(ax, groups, quantity) for ax, (groups, quantity, _) in filled]
    for ax, (_, quantity, title) in filled:
        # Values at the ends of the curves stand beside the axes, which are so much narrower.
        label_axes(ax, title, "epoch", NAMES[quantity][1], inches=4.2)
        set_scales(ax, quantity)
    for (ax, (_, quantity, _)), some in zip(filled, lines, strict=True):  # no limit moves any more
        if quantity != "lr":  # which is a setting, and ends near 0
            write_ends(ax, some, quantity)


def _draw_curves(ax: Axes, groups: dict[str, list[Run]], quantity: str) -> list[Line2D]:
    """The mean over runs at each epoch for each label, and the bands; returns the lines."""
    scale = 100 if quantity.endswith("accuracy") else 1
    styles, lines = curve_styles(groups), []
    for label, some in groups.items():
        length = min(len(run.history) for run in some)
        values = np.array([[row[quantity] for row in run.history[:length]] for run in some]) * scale
        epochs, mean, style = np.arange(1, length + 1), values.mean(0), styles[label]
        lines += ax.plot(epochs, mean, **style, markersize=3.5, linewidth=1.6, label=label)
        if len(some) > 1:
            low, high = mean - values.std(0, ddof=1), mean + values.std(0, ddof=1)
            ax.fill_between(epochs, low, high, color=style["color"], alpha=0.18, linewidth=0)
    return lines


@drawn
def plot_confusion(
    matrix: Tensor, classes: Sequence[str], *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Counts (classes, classes) as a table: row the true class, column the predicted one.

    The colours show the share of a true class's images; the right ones, on the diagonal, are left
    uncoloured so that the mistakes stand out.
    """
    from matplotlib import colormaps

    counts, names = np.asarray(matrix), [shortened(name) for name in classes]
    if counts.shape != (len(names), len(names)):
        raise ValueError(
            f"the confusion matrix is of shape {counts.shape}, which does not fit "
            f"{len(names)} classes"
        )
    beside = 1 + 0.075 * max(8, *map(len, names))  # inches for names
    side = max((0.52 if len(names) <= 30 else 0.4) * len(names), 2.8)
    ax = ax if ax is not None else new_axes(side + beside, side + beside)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    np.fill_diagonal(share, 0)
    # One or two mistakes stay pale, and all are pale enough for black numbers. matplotlib would
    # colour each of a large table's millions of pixels instead.
    share *= 0.75 / max(share.max(), 0.01)
    ax.imshow(colormaps["Oranges"](share, bytes=True), interpolation="nearest")
    turned = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 2 else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set_yticks(range(len(names)), names)
    heading = title if title is not None else "Test images by true and predicted class"
    ax.set(title=fitted(heading, side, size=12), xlabel="predicted class", ylabel="true class")
    ax.grid(False)
    look = {"color": "black", "fontsize": 8, "ha": "center", "va": "center"}
    for row, column in np.argwhere(counts):
        weight = "bold" if row == column else "normal"
        text = ax.text(column, row, f"{counts[row, column]}", fontweight=weight, **look)
        text.set_in_layout(False)  # the axes hold it anyway; to measure thousands takes long
    return ax.figure
