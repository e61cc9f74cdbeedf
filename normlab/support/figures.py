"""What all figures share: they look alike under every style sheet, and names in them are text.

A style sheet's colours are kept, so that figures fit the notebook that they are shown in. Its
sizes, grids and ways to show images are not: normlab's figures are laid out for matplotlib's own.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

import numpy as np

from normlab.support.checks import one_of, warn
from normlab.support.files import atomic_write, user_path
from normlab.support.type_hints import Axes, Figure

Arguments = ParamSpec("Arguments")

_OWN = re.compile(
    r"(axes|axes3d|errorbar|grid|image|legend|lines|markers|mathtext|patch|savefig|text|[xy]tick)\."
    r"|font\.(size|weight)|figure\.(autolayout|constrained|label|subplot|title)|_internal"
)
# A minus sign that the chosen font lacks is the reader's to switch off.
_KEPT = re.compile(r"color|dpi|unicode_minus")
MOST_INSIDE = 5  # names in a legend that leaves room for the curves


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's own settings where figures rely on them, with the colours of the style.

    No others are set back afterwards, as `rc_context` would: in a notebook the first figure
    switches on that figures are shown.
    """
    from matplotlib import rcParams, rcParamsDefault

    names = [name for name in rcParamsDefault if _OWN.match(name) and not _KEPT.search(name)]
    before = {name: rcParams[name] for name in names}
    rcParams.update({name: rcParamsDefault[name] for name in names})
    try:
        yield
    finally:
        rcParams.update(before)


def drawn(plot: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Makes a function that draws do so in `own_style`."""

    @functools.wraps(plot)
    def draw(*arguments: Arguments.args, **options: Arguments.kwargs) -> Figure:
        with own_style():
            figure = plot(*arguments, **options)
            figure.findobj()  # makes the ticks, else they come in the style of when it is shown
            return figure

    return draw


def new_axes(width: float, height: float, *, names: int = 0) -> Axes:
    """The axes of a figure of their own; inches, and room for a legend of so many names below."""
    from matplotlib import pyplot

    height += 0.2 * -(-names // 2) + 0.3 if names > MOST_INSIDE else 0
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def label_axes(
    ax: Axes, title: str, x: str, y: str, *, inches: float = 6.4, pad: float = 6
) -> None:
    """Title, names of the axes, a pale grid; the title in as many lines as that width takes."""
    ax.set_title(fitted(title, inches, size=12), pad=pad)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def place_legend(ax: Axes, inside: str, labels: Sequence[str], **key: object) -> None:
    """A legend at that place in the axes, or below them where it would cover the curves."""
    from matplotlib.transforms import ScaledTranslation

    place = {"loc": inside}
    if len(labels) > MOST_INSIDE:
        below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
        place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "ncols": 2}
    ax.legend(labels=labels, **key, **place, frameon=False)


def fitted(text: str, inches: float, *, size: float = 10) -> str:
    """The text in as many lines as it takes in letters of `size` points."""
    width = max(8, int(inches * 72 / (0.56 * size)))  # letters are about half as wide as high
    return "\n".join(textwrap.fill(line, width) for line in literal(text).splitlines())


def shortened(name: str, most: int = 28) -> str:
    """The name, without its middle if it is longer than fits beside a curve or an axis."""
    name = str(name)
    return literal(name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}")


def literal(text: str) -> str:
    """The text such that matplotlib draws it as it is written, and no formula between `$`.

    The bytes of a file's name that are no text, which no font has, become `?`.
    """
    return re.sub(r"(?<!\\)\$", r"\\$", str(text).encode(errors="replace").decode())


def mosaic(images: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Images (N, C, H, W) of bytes row by row, on a transparent ground: (height, width, 4)."""
    count, _, height, width = images.shape
    colours = np.broadcast_to(images, (count, 3, height, width))  # grey thrice is grey
    opaque = np.concatenate([colours, np.full_like(colours[:, :1], 255)], 1)
    apart = np.pad(opaque, ((0, 0), (0, 0), (0, gap), (0, gap)))
    rows = apart.reshape(-1, columns, *apart.shape[1:]).transpose(0, 3, 1, 4, 2)  # (R, H, …, W, 4)
    return rows.reshape(len(rows) * (height + gap), -1, 4)[:-gap, :-gap]


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
    with own_style(), atomic_write(path) as aside:
        figure.savefig(aside, dpi=dpi, format=form, facecolor=figure.get_facecolor())
    pyplot.close(figure)
    return path
