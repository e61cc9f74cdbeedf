"""The picture of what each normalization averages over, from the table of norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from normlab.norms import NORMS, NormKind, norm_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARED, OTHER = "#0072B2", "#E8E8E8"


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
    """
    from matplotlib import pyplot

    if shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide {shape[1]} channels")
    size = (2.9 * len(kinds), 2.9)
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=size, subplot_kw={"projection": "3d"}, squeeze=False
    )
    for ax, name in zip(axes[0], kinds, strict=True):
        _draw_cube(ax, NORMS[norm_name(name)], shape, groups)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.92, wspace=0)
    return figure


def _draw_cube(ax: Axes, kind: NormKind, shape: tuple[int, int, int], groups: int) -> None:
    """Images go back, channels to the right, positions up; the first image lies in front."""
    shared = np.zeros(shape, dtype=bool)
    shared[_first_mean(kind, shape, groups)] = True
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
    title = kind.title.split(",")[0].capitalize()
    ax.set_title(f"{title}, {groups} groups" if "C/G" in kind.averaged else title, fontsize=10)


def _first_mean(kind: NormKind, shape: tuple[int, int, int], groups: int) -> tuple[slice, ...]:
    """The part of the cube that shares a mean with the first element."""
    images = slice(None) if "N" in kind.averaged else slice(1)
    channels = slice(None) if "C" in kind.averaged else slice(1)
    if "C/G" in kind.averaged:
        channels = slice(shape[1] // groups)
    positions = slice(None) if "H" in kind.averaged else slice(1)
    return images, channels, positions
