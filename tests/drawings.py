"""The drawings on the first screens of notebooks 3 to 5: what is asked there, without the answer.

    python -m tests.drawings

draws them anew into `notebooks/results`.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"
FILL = {"conv": "#e3e3e3", "norm": "#b5d5ee", "ReLU": "#fbdca6"}
LADDER = {  # the steps of notebook 3, from below
    "as submitted": "SGD, a constant rate, dropout",
    "one-cycle up to 0.05": "a rate that rises and falls",
    "no dropout, batches of 64": "instead of 128 images",
    "shifts and flips": "of the training images",
    "Muon": "instead of SGD",
    "centred": "the mean of every filter stays 0",
}
INK, FAINT = "#333333", "#888888"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page of so many inches, the units of its axes."""
    figure = Figure(figsize=(width, height), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def box(ax: Axes, x: float, y: float, label: str, *, width: float = 1.05, height: float) -> None:
    """A box around (x, y), coloured by what it does."""
    place, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.06"
    colour = FILL[label.split()[0]]
    ax.add_patch(FancyBboxPatch(place, width, height, boxstyle=shape, fc=colour, ec=INK, lw=1))
    ax.text(x, y, label, ha="center", va="center_baseline", size=11)


def arrow(ax: Axes, *way: tuple[float, float]) -> None:
    """Along corners, with its head at the last."""
    ax.plot(*zip(*way, strict=True), color=INK, lw=1.2, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", way[-1], way[-2], arrowprops=style)


def two_orders() -> Figure:
    """conv → ReLU → norm above conv → norm → ReLU; two lines cross where boxes change places."""
    figure, ax = canvas(6.5, 2.7)
    places, half = (1.05, 2.6, 4.15), 0.525
    rows = {
        1.9: ("In this network", ("conv 3×3", "ReLU", "norm"), 0.42),
        0.8: ("As batch norm was published", ("conv 3×3", "norm", "ReLU"), -0.55),
    }
    for y, (title, labels, away) in rows.items():
        ax.text(places[0] - half, y + away, title, size=11.5, weight="bold", color=INK)
        for x, label in zip(places, labels, strict=True):
            box(ax, x, y, label, height=0.5)
            arrow(ax, (x + half + 0.04, y), (x + 1.55 - half - 0.04, y))
        ax.text(places[2] + half + 0.53, y, "next conv", va="center_baseline", size=11)
    for one, other in (places[1:], places[:0:-1]):
        ax.plot((one, other), (1.62, 1.08), color=FAINT, lw=1.2, ls=(0, (4, 3)), zorder=0)
    return figure


def chain(ax: Axes, x: float, parts: Sequence[Sequence[str]], top: float) -> list[float]:
    """Touching boxes from the top down, an arrow between parts; returns the heights of the gaps."""
    height, gap, y, gaps = 0.27, 0.2, top, []
    for part in parts:
        arrow(ax, (x, y), (x, y - gap))
        gaps.append(y - gap / 2)
        y -= gap
        for label in part:
            box(ax, x, y - height / 2, label, height=height)
            y -= height
    return [*gaps, y]


def skip_block() -> Figure:
    """The block of notebook 5 without a skip, and with it, from the top down."""
    figure, ax = canvas(6.5, 4.35)
    conv = ("conv 3×3", "norm", "ReLU")
    for x, title in ((1.5, "without a skip"), (4.0, "with a skip")):
        ax.text(x, 4.15, title, ha="center", va="center", size=12, weight="bold", color=INK)
        ax.text(x, 3.86, "input", ha="center", va="center", size=11)
    *_, end = chain(ax, 1.5, (conv, conv, conv[:2]), 3.74)
    first, *_, end = chain(ax, 4.0, (conv, conv, conv[:2]), 3.74)
    plus, side = end - 0.3, 5.55
    arrow(ax, (1.5, end), (1.5, plus - 0.3))
    arrow(ax, (4.0, end), (4.0, plus + 0.11))
    ax.plot(4.0, plus, "o", ms=16, mfc="white", mec=INK)
    ax.text(4.0, plus - 0.005, "+", ha="center", va="center_baseline", size=14)
    arrow(ax, (4.0, first), (side, first), (side, 2.56))
    for y, label in ((2.425, "conv 1×1"), (2.155, "norm")):
        box(ax, side, y, label, height=0.27)
    arrow(ax, (side, 2.02), (side, plus), (4.11, plus))
    ax.text(side, first + 0.1, "the skip", ha="center", va="bottom", size=11)
    arrow(ax, (4.0, plus - 0.11), (4.0, plus - 0.3))
    for x in (1.5, 4.0):
        box(ax, x, plus - 0.435, "ReLU", height=0.27)
    return figure


def ladder() -> Figure:
    """The five steps of notebook 3 from the submission's training to the recipe, from below."""
    figure, ax = canvas(6.5, 3.1)
    left, right, apart = 0.3, 1.1, 0.5
    for x in (left, right):
        ax.plot((x, x), (0.1, 3.0), color=INK, lw=3, solid_capstyle="round")
    for y, (step, what) in zip((0.3 + apart * i for i in range(6)), LADDER.items(), strict=True):
        ax.plot((left, right), (y, y), color=INK, lw=3)
        ax.text(1.35, y, step, va="center_baseline", size=11.5, weight="bold", color=INK)
        ax.text(3.85, y, what, va="center_baseline", size=11)
        if y > 0.3:
            ax.text(0.7, y - apart / 2, "+ ?", ha="center", va="center_baseline", color="#0072B2")
    return figure


DRAWINGS = {"ladder.png": ladder, "two-orders.png": two_orders, "skip-block.png": skip_block}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        draw().savefig(RESULTS / name, metadata={"Software": None})
