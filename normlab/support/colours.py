"""How curves look: colours that fit the background and each other, lines and markers."""

from collections.abc import Callable, Iterable
from itertools import count

import numpy as np

# Okabe & Ito's colours, which colour-blind readers can tell apart, and with each a line style and
# a marker, which survive grey print; the last one is grey, which can be seen on black as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# These have the first colours, in this order, in every figure.
NORMS = ("BN", "GN", "LN", "IN", "none", "LN element-wise")
LEGIBLE = 4.5  # the least contrast of small text, by WCAG 2


def curve_styles(labels: Iterable[str]) -> dict[str, dict]:
    """Colour, line and marker of each label; a norm has the same ones in every figure.

    "BN + skip" has the colour and the marker of "BN", but another line; LN's two kinds are two
    norms. Where no two labels share a colour, each has a line of its own, which tells them apart
    in grey print.
    """
    labels, families = list(labels), {}
    for label in labels:
        families.setdefault(_head(label, NORMS, max) or _head(label, labels, min), []).append(label)
    taken = {NORMS.index(head) for head in families if head in NORMS}
    first = len(NORMS) - 1 if taken else 0  # the last one's colour is lent where it is not there
    free = (place for place in count(first) if place not in taken)
    alone, styles = len(families) == len(labels), {}
    for head, family in families.items():
        place = NORMS.index(head) if head in NORMS else next(free)
        for member, label in enumerate(family):
            styles[label] = _style(place, place if alone else member, hollow=member > 0)
    return {label: styles[label] for label in labels}


def _head(label: str, heads: Iterable[str], which: Callable) -> str | None:
    """Of the heads that the label begins with, as "BN + L1" with "BN", that of `which` length."""
    fitting = [head for head in heads if f"{label} ".startswith(f"{head} ")]
    return which(fitting, key=len, default=None)


def _style(place: int, line: int, *, hollow: bool) -> dict:
    """How a curve looks: an eighth has the first one's colour, but not its line and marker."""
    turn, colour = divmod(place, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": LINES[(line + turn) % len(LINES)],
        "marker": MARKERS[(colour + turn) % len(MARKERS)],
        "markerfacecolor": background() if hollow or turn else COLOURS[colour],
    }


def text_colour() -> str:
    """The colour of text in the current style."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def background() -> str:
    """The colour behind what is drawn in the current style."""
    from matplotlib import rcParams

    return rcParams["axes.facecolor"]


def is_dark() -> bool:
    """Whether the current style writes in light colours, so on a dark background."""
    return luminance(text_colour()) > 0.4


def luminance(colour: object) -> float:
    """Relative luminance of a colour, from 0 for black to 1 for white, by WCAG 2."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: object, other: object) -> float:
    """The ratio of two colours' luminances by WCAG 2: 1 for the same, 21 for black and white."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def legible(colour: str, background: object) -> np.ndarray:
    """The colour, mixed with as much of the text's as small letters need on this background."""
    from matplotlib.colors import to_rgb

    mixes = np.linspace(to_rgb(colour), to_rgb(text_colour()), 11)
    return next((mixed for mixed in mixes if contrast(mixed, background) >= LEGIBLE), mixes[-1])
