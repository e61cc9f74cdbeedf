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
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.text import Text

Arguments = ParamSpec("Arguments")

_OWN = re.compile(
    r"(axes|axes3d|errorbar|grid|image|legend|lines|markers|mathtext|patch|savefig|text|[xy]tick)\."
    r"|font\.(size|weight)|figure\.(autolayout|constrained|label|subplot|title)|_internal"
)
# A minus sign that the chosen font lacks is the reader's to switch off.
_KEPT = re.compile(r"color|dpi|unicode_minus")
LEGIBLE = 4.5  # the least contrast of small text, by WCAG 2


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
    """Makes a function that draws do so in `own_style`, with every text as it is written."""

    @functools.wraps(plot)
    def draw(*arguments: Arguments.args, **options: Arguments.kwargs) -> Figure:
        given = options.get("ax")
        before = {} if given is None else {text: text.get_text() for text in _texts(given.figure)}
        with own_style():
            figure = plot(*arguments, **options)
            for text in _texts(figure):
                if text.get_text() != before.get(text):  # others may be formulas of the caller's
                    text.set_parse_math(False)
        return figure

    return draw


def _texts(figure: Figure) -> list[Text]:
    """All texts but numbers at ticks, such as 10⁻³, which matplotlib writes as formulas.

    Looking for them makes the ticks, which otherwise appear when the figure is shown, in the
    colours and sizes of whatever style holds then.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    numbers: set[Artist] = set()
    for axis in figure.findobj(Axis):
        if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):
            numbers.update(set(axis.findobj(Text)) - {axis.label})
    return [text for text in figure.findobj(Text) if text not in numbers]


def new_axes(width: float, height: float) -> Axes:
    """The axes of a figure of their own; sizes in inches."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def add_legend(
    where: Axes | Figure, handles: Sequence[Artist], names: Sequence[str], **options: object
) -> Legend:
    """A legend of all names, those that matplotlib leaves out since they begin with `_` too."""
    legend = where.legend(handles, ["name"] * len(names), frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    return legend


def fitted(text: str, inches: float, *, size: float = 10) -> str:
    """The text in as many lines as it takes in letters of `size` points."""
    text = _printable(text)
    width = max(8, int(inches * 72 / (0.56 * size)))  # letters are about half as wide as high
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def shortened(name: str, most: int = 28) -> str:
    """The name, without its middle if it is longer than fits beside a curve or an axis."""
    name = _printable(name)
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"


def _printable(text: str) -> str:
    """The text with `?` for the bytes of a file's name that are no text, which no font has."""
    return str(text).encode(errors="replace").decode()


# --- colours that fit the background ----------------------------------------------------------


def ink() -> str:
    """The colour of text in the current style."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def paper() -> str:
    """The colour behind what is drawn in the current style."""
    from matplotlib import rcParams

    return rcParams["axes.facecolor"]


def is_dark() -> bool:
    """Whether the current style writes in light colours, so on a dark background."""
    return luminance(ink()) > 0.4


def luminance(colour: object) -> float:
    """Relative luminance of a colour, from 0 for black to 1 for white, by WCAG 2."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: object, other: object) -> float:
    """The ratio of two colours' luminances by WCAG 2: 1 for the same, 21 for black and white."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def legible(colour: str, background: object) -> tuple[float, ...]:
    """The colour, mixed with as much of the text's as small letters need on this background."""
    from matplotlib.colors import to_rgb

    mixed = to_rgb(colour)
    for share in range(1, 11):
        if contrast(mixed, background) >= LEGIBLE:
            break
        pairs = zip(to_rgb(colour), to_rgb(ink()), strict=True)
        mixed = tuple(one + share / 10 * (other - one) for one, other in pairs)
    return mixed
