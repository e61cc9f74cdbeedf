"""Pictures of what normalizations average over: from the table of norms, and found by trial."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from normlab.lessons.sharing import shared_statistics
from normlab.norms import NORMS, NormKind, norm_name
from normlab.support.checks import check_groups, plain, sizes
from normlab.support.figures import drawn, literal, new_axes
from normlab.support.type_hints import Axes, Figure

SHARED, OTHER = "#0072B2", "#E8E8E8"

# Okabe & Ito's colours, which colour-blind readers can tell apart, and how much of each is left
# when it is mixed with white: black numbers must stay readable on all of them.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#8A8A8A", "#D55E00", "#7A5BC4")
STRENGTHS = (0.4, 0.85, 0.15, 0.6)

GAP = 0.3  # between two channels or two images of a table, in cells
MOST_CELLS = 1024  # of a table that can still be read


@drawn
def plot_norm_axes(
    kinds: Sequence[str] = ("bn", "ln", "in", "gn"),
    *,
    shape: tuple[int, int, int] = (5, 6, 5),
    groups: int = 2,
) -> Figure:
    """A cube of images, channels and positions for each norm; coloured is what shares one mean.

    Args:
        kinds: names of `NORMS`.
        shape: (N, C, H·W) of the cubes.
        groups: of "gn"; must divide C.

    After figure 2 of Wu & He, "Group Normalization", 2018.
    Raises `ValueError` for no kinds, a shape that is not three sizes of at least 1, and groups that
    do not divide C.
    """
    from matplotlib import pyplot

    shape, groups = sizes(shape, "N, C, H·W", "shape"), plain(groups)
    if not kinds:
        raise ValueError("there are no kinds of norms to draw")
    check_groups(groups, shape[1])
    columns = min(2, len(kinds))  # more beside each other could not be read on a phone
    rows = -(-len(kinds) // columns)
    figure = pyplot.figure(figsize=(2.9 * columns, 2.9 * rows))
    for place, name in enumerate(kinds, start=1):
        ax = figure.add_subplot(rows, columns, place, projection="3d")
        draw_cube(ax, NORMS[norm_name(name)], shape, groups)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - 0.08 / rows, wspace=0)
    return figure


def draw_cube(ax: Axes, kind: NormKind, shape: tuple[int, int, int], groups: int) -> None:
    """Images go back, channels to the right, positions up; the first image lies in front."""
    shared = np.zeros(shape, dtype=bool)
    shared[_first_set(kind, shape, groups)] = True
    cube = shared.transpose(1, 0, 2)[:, :, ::-1]  # x is C, y is N, z is H·W from the top
    colours = np.where(cube, SHARED, OTHER)
    ax.voxels(np.ones(cube.shape, dtype=bool), facecolors=colours, edgecolor="white", linewidth=0.4)
    ax.set_box_aspect(cube.shape, zoom=1.0)
    ax.view_init(elev=22, azim=-52)
    ax.set_axis_off()
    images, channels, height = shape
    ax.text(channels / 2, -0.6, -0.6, "C", ha="center", va="center")
    ax.text(channels + 0.6, images / 2, -0.6, "N", ha="center", va="center")
    ax.text(-0.3, -0.3, height / 2, "H, W", ha="right", va="center")
    ax.set_title(heading(kind, groups), fontsize=10)


def heading(kind: NormKind, groups: int = 1) -> str:
    """The title without what follows the comma, and how many groups there are."""
    split = f", {groups} group{'s' * (groups > 1)}" if "C/G" in kind.averaged else ""
    return kind.title.split(",")[0].capitalize() + split


def _first_set(kind: NormKind, shape: tuple[int, int, int], groups: int) -> tuple[slice, ...]:
    """The part of the cube that shares statistics with the first element."""
    sides = [side if axis in kind.averaged else 1 for axis, side in zip("NCH", shape, strict=True)]
    if "C/G" in kind.averaged:
        sides[1] = shape[1] // groups
    return tuple(map(slice, sides))


def tints(count: int) -> list[str]:
    """Light colours "#rrggbb" for `count` sets; after 32 they start again."""
    from matplotlib.colors import to_hex, to_rgb

    mixed = [1 - strength * (1 - np.array(to_rgb(hue))) for strength in STRENGTHS for hue in HUES]
    return [to_hex(mixed[number % len(mixed)]) for number in range(count)]


@drawn
def plot_shared(
    layer: nn.Module | None, values: Tensor, *, ax: Axes | None = None, title: str = ""
) -> Figure:
    """A batch as a table of numbers; cells that share statistics in `layer` share a colour.

    Images are rows, channels columns, and each pixel is a cell. The colours come from
    `shared_statistics`, that is from trying the layer out, so that layers of one's own work too.

    Args:
        layer: maps (N, C, H, W) to the same shape, in training mode for the trial; with None
            nothing is coloured.
        values: (N, C, H, W), the numbers to write: the input, or `layer(input)`.
        ax: where to draw; without it a new figure is made.

    Raises `ValueError` unless `values` has four axes and at most 1,024 numbers.
    """
    if values.dim() != 4 or values.numel() > MOST_CELLS:
        shape = tuple(values.shape)
        raise ValueError(f"a table needs (N, C, H, W), {MOST_CELLS:,} numbers at most, not {shape}")
    colours = np.full(values.shape, OTHER)
    if layer is not None:
        sets = shared_statistics(layer, tuple(values.shape)).numpy()
        colours = np.array(tints(sets.max() + 1))[sets]
    across, down = table_size(values.shape)
    ax = ax if ax is not None else new_axes(across + 0.9, down + 0.7)
    values = values.detach().numpy()
    form = ".0f" if (values == values.round()).all() else ".2f"
    for place in np.ndindex(values.shape):
        _draw_cell(ax, place, values.shape, f"{values[place]:{form}}", colours[place])
    _label_table(ax, values.shape)
    ax.set_title(literal(title), fontsize=10, pad=8)
    return ax.figure


def table_size(shape: tuple[int, ...]) -> tuple[float, float]:
    """Width and height in inches of the cells of (N, C, H, W)."""
    images, channels, height, width = shape
    return 0.45 * channels * (width + GAP), 0.36 * images * (height + GAP)


def _draw_cell(ax: Axes, place: tuple, shape: tuple, text: str, colour: str) -> None:
    """The number at a place of (N, C, H, W)."""
    from matplotlib.patches import Rectangle

    (image, channel, row, column), (*_, height, width) = place, shape
    x, y = channel * (width + GAP) + column, image * (height + GAP) + row
    text = text.replace("-0.00", "0.00").replace("-", "−")
    look = {"fontsize": 10 if len(text) < 3 else 8, "ha": "center", "va": "center"}
    number = ax.text(x + 0.5, y + 0.5, text, color="black", **look)  # cells are light in any style
    cell = Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8)
    for artist in (ax.add_patch(cell), number):
        artist.set_in_layout(False)  # the axes hold it anyway; to measure hundreds takes seconds


def _label_table(ax: Axes, shape: tuple[int, ...]) -> None:
    images, channels, height, width = shape
    across = np.arange(channels) * (width + GAP) + width / 2
    down = np.arange(images) * (height + GAP) + height / 2
    ax.set_xticks(across, [f"channel {c + 1}" for c in range(channels)], fontsize=8)
    ax.set_yticks(down, [f"image {n + 1}" for n in range(images)], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xlim(0, channels * (width + GAP) - GAP)
    ax.set_ylim(images * (height + GAP) - GAP, 0)
    ax.set_aspect(0.8)
