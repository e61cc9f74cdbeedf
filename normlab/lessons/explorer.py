"""A form to try a normalization: its kind and the sizes by sliders, what it does as a picture."""

from __future__ import annotations

import io
import math
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normlab.lessons.diagrams import GAP, draw_cube, plot_shared
from normlab.lessons.example import example_batch
from normlab.norms import NORMS, NormKind, divisors, make_norm, norm_name
from normlab.support.checks import one_of, plain, warn, whole_number
from normlab.support.figures import drawn
from normlab.support.seeding import generator

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shape = tuple[int, int, int, int]

LIMITS: Shape = (4, 8, 3, 3)  # larger tables cannot be read
KINDS = tuple(name for name in NORMS if name != "none")


def explore_norm(
    kind: str = "gn",
    *,
    shape: Shape = (4, 4, 2, 2),
    groups: int = 2,
    form: bool | None = None,
) -> VBox | Figure:
    """A form with sliders for a normalization: the cube, the numbers and the counts follow.

    Args:
        kind: "bn", "ln", "gn", "ln-elementwise" or "in", where the form starts.
        shape: (N, C, H, W) of the batch, at most (4, 8, 3, 3).
        groups: of "gn"; must divide C.
        form: False draws one figure without sliders; by default that is done only where no
            notebook shows widgets: in a script, under nbclient or nbval, without ipywidgets.

    Returns the form or the figure; as the last line of a cell either shows itself.
    Raises `ValueError` for an unknown kind, sizes out of range, groups that do not divide C.
    """
    kind = one_of(norm_name(kind), KINDS, "norm to explore")
    shape, groups = plain(shape), plain(groups)
    _check_shape(shape)
    if "C/G" in NORMS[kind].averaged:
        make_norm(kind, shape[1], groups=groups)  # says which groups there are
    groups = max(count for count in divisors(shape[1]) if count <= max(groups, 1))
    wanted = _has_front_end() if form is None else form
    if wanted and find_spec("ipywidgets") is None:
        warn("the sliders of explore_norm need ipywidgets: pip install ipywidgets")
        wanted = False
    if wanted:
        return _Form(kind, shape, groups).box
    return _picture(kind, tuple(shape), groups)


def _check_shape(shape: Shape) -> None:
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        raise ValueError(f"shape must be (N, C, H, W), not {shape!r}")
    for name, side, most in zip("NCHW", shape, LIMITS, strict=True):
        if whole_number(side, name) > most:
            raise ValueError(f"{name} must be at most {most} here, not {side}")


def _has_front_end() -> bool:
    """Whether a person looks at the notebook that runs this.

    Programs that run a notebook, such as nbclient, say that they answer no questions.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not hasattr(shell, "get_parent"):  # no notebook's kernel
        return False
    asked = shell.get_parent().get("content", {})
    return "google.colab" in sys.modules or bool(asked.get("allow_stdin"))


class _Form:
    """The sliders, and the picture that follows them."""

    def __init__(self, kind: str, shape: Shape, groups: int) -> None:
        import ipywidgets as widgets

        kinds = [(NORMS[name].title.capitalize(), name) for name in KINDS]
        wide = widgets.Layout(width="480px")
        self.kind = widgets.Dropdown(options=kinds, value=kind, description="kind", layout=wide)
        names = ("images N", "channels C", "rows H", "columns W")
        self.sides = [
            widgets.IntSlider(side, 1, most, description=name, continuous_update=False)
            for name, side, most in zip(names, shape, LIMITS, strict=True)
        ]
        self.groups = widgets.SelectionSlider(
            options=divisors(shape[1]), value=groups, description="groups G"
        )
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        rows = [self.kind, widgets.HBox(self.sides[:2]), widgets.HBox(self.sides[2:]), self.groups]
        self.box = widgets.VBox([*rows, self.image])
        self.drawn: tuple | None = None
        for control in (self.kind, *self.sides, self.groups):
            control.observe(self.follow, "value")
        self.draw()

    def follow(self, change: dict) -> None:
        """Offers the groups that divide the channels, then draws."""
        if change["owner"] is self.sides[1]:
            allowed = divisors(change["new"])
            kept = max(count for count in allowed if count <= self.groups.value)
            with self.groups.hold_sync():
                self.groups.unobserve(self.follow, "value")
                self.groups.options = allowed
                self.groups.value = kept
                self.groups.observe(self.follow, "value")
        self.draw()

    def draw(self) -> None:
        shape = tuple(side.value for side in self.sides)
        self.groups.disabled = "C/G" not in NORMS[self.kind.value].averaged
        figure = _picture(self.kind.value, shape, self.groups.value)
        content = io.BytesIO()
        options = {"format": "png", "dpi": 80, "bbox_inches": "tight"}
        figure.savefig(content, facecolor=figure.get_facecolor(), **options)
        self.image.value = content.getvalue()


@drawn
def _picture(kind: str, shape: Shape, groups: int) -> Figure:
    """The cube, the numbers before and after, and the counts as the title."""
    from matplotlib import pyplot

    images, channels, height, width = shape
    each = numbers_a_mean(NORMS[kind], shape, groups)
    layer = make_norm(kind, channels, groups=groups, size=(height, width))
    x = _numbers(shape)
    figure, axes = _axes(shape)
    draw_cube(axes["cube"], NORMS[kind], (images, channels, height * width), groups)
    plot_shared(layer if each > 1 else nn.Identity(), x, ax=axes["before"], title="before")
    if each > 1:
        with torch.no_grad():
            plot_shared(layer, layer(x), ax=axes["after"], title="after")
    else:
        _say(axes["after"], "Each number is its own mean,\nso x − mean is 0 everywhere.")
    figure.suptitle(counts(NORMS[kind], shape, groups), fontsize=11)
    pyplot.close(figure)  # it is returned: a notebook would show it a second time
    return figure


def _axes(shape: Shape) -> tuple[Figure, dict[str, Axes]]:
    """Cube and tables side by side; wide tables stand one above the other."""
    from matplotlib import pyplot

    images, channels, height, width = shape
    across, down = 0.45 * channels * (width + GAP) + 0.9, 0.36 * images * (height + GAP) + 0.8
    wide = channels * width > 10
    figure, axes = pyplot.subplot_mosaic(
        [["cube", "before"], ["cube", "after"]] if wide else [["cube", "before", "after"]],
        figsize=(3.4 + across * (1 if wide else 2), max(3.2, down * (2 if wide else 1)) + 0.4),
        width_ratios=(3.4, across) if wide else (3.4, across, across),
        per_subplot_kw={"cube": {"projection": "3d"}},
        layout="constrained",
    )
    return figure, axes


def _say(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center")


def _numbers(shape: Shape) -> Tensor:
    """Whole numbers from 0 to 9; where the worked example reaches they are its own."""
    x = torch.randint(0, 10, LIMITS, generator=generator(0, "explore")).float()
    x[:4, :4, :2, :2] = example_batch()
    return x[tuple(slice(side) for side in shape)]


def numbers_a_mean(kind: NormKind, shape: Shape, groups: int) -> int:
    """How many numbers of (N, C, H, W) share one mean."""
    return math.prod(shape) // kind.statistics(shape, groups=groups)


def counts(kind: NormKind, shape: Shape, groups: int) -> str:
    """The counts of means and of learned numbers in words."""
    sizes = {"N": shape[0], "C": shape[1], "G": groups}
    names = [] if "N" in kind.averaged else ["N"]
    names += ["G"] if "C/G" in kind.averaged else [] if "C" in kind.averaged else ["C"]
    product = " · ".join(names)
    if len(names) > 1:
        product += " = " + " · ".join(str(sizes[name]) for name in names)
    means, each = kind.statistics(shape, groups=groups), numbers_a_mean(kind, shape, groups)
    learned = "2 · C · H · W" if kind.name == "ln-elementwise" else "2 · C"
    return (
        f"{kind.title.split(',')[0].capitalize()}: {product} = {_several(means, 'mean')} "
        f"of {_several(each, 'number')}; {learned} = {kind.parameters(shape)} learned numbers"
    )


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
