"""A form to try a normalization: its kind and the sizes by sliders, what it does as a picture."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normlab.lessons.by_hand import example_batch
from normlab.lessons.diagrams import draw_cube, plot_shared, table_size
from normlab.norms import NORMS, NormKind, make_norm, norm_name
from normlab.support.checks import check_groups, divisors, one_of, plain, sizes, warn
from normlab.support.figures import drawn
from normlab.support.progress import notebook_shell
from normlab.support.seeding import generator
from normlab.support.type_hints import Figure

if TYPE_CHECKING:
    from ipywidgets import VBox

Shape = tuple[int, int, int, int]

LIMITS: Shape = (4, 8, 3, 3)  # larger tables cannot be read


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
    kind = one_of(norm_name(kind), explorable(), "norm to explore")
    shape, groups = sizes(shape, "N, C, H, W", "shape"), plain(groups)
    if any(side > most for side, most in zip(shape, LIMITS, strict=True)):
        raise ValueError(f"shape must be at most {LIMITS} here, not {shape}")
    if "C/G" in NORMS[kind].averaged:
        check_groups(groups, shape[1])
    wanted = _has_reader() if form is None else form
    if wanted and find_spec("ipywidgets") is None:
        warn("the sliders of explore_norm need ipywidgets: pip install ipywidgets")
        wanted = False
    return (_form if wanted else _picture)(kind, shape, groups)


def explorable() -> list[str]:
    """The norms that average over something."""
    return [name for name, kind in NORMS.items() if kind.averaged]


def _has_reader() -> bool:
    """Whether a person looks at the notebook that runs this.

    Programs that run a notebook, such as nbclient, say that they answer no questions.
    """
    shell = notebook_shell()
    asked = shell.get_parent().get("content", {}) if shell else {}
    return bool(asked.get("allow_stdin")) or (shell and "google.colab" in sys.modules)


def _form(kind: str, shape: Shape, groups: int) -> VBox:
    """The sliders, and the picture that follows them."""
    from IPython.core.pylabtools import print_figure
    from ipywidgets import Dropdown, Image, IntSlider, VBox, interactive

    names = ("images N", "channels C", "rows H", "columns W", "groups G")
    sliders = {
        name: IntSlider(value, 1, most, continuous_update=False)
        for name, value, most in zip(names, (*shape, groups), (*LIMITS, LIMITS[1]), strict=True)
    }
    image = Image(layout={"max_width": "100%"})  # Jupyter loses what `interactive` shows at first

    def draw(kind: str, **numbers: int) -> None:
        *shape, groups = numbers.values()
        fitting = max(count for count in divisors(shape[1]) if count <= groups)
        sliders["groups G"].disabled = "C/G" not in NORMS[kind].averaged
        sliders["groups G"].value = fitting  # where it is another one, that change draws
        if fitting == groups:
            image.value = print_figure(_picture(kind, tuple(shape), groups), dpi=80)

    kinds = [(NORMS[name].title.capitalize(), name) for name in explorable()]
    chooser = Dropdown(options=kinds, value=kind, layout={"width": "480px"})
    return VBox([interactive(draw, kind=chooser, **sliders), image])


@drawn
def _picture(kind: str, shape: Shape, groups: int) -> Figure:
    """The cube, the numbers before and after, and the counts as the title."""
    from matplotlib import pyplot

    images, channels, height, width = shape
    across, down = table_size(shape)
    widths = (2, across + 0.9)  # so narrow that a page of 520 pixels shows readable numbers
    figure, axes = pyplot.subplot_mosaic(
        [["cube", "before"], ["cube", "after"]],
        figsize=(sum(widths), max(1.6, down + 0.7) * 2 + 0.4),
        width_ratios=widths,
        per_subplot_kw={"cube": {"projection": "3d"}},
        layout="constrained",
    )
    draw_cube(axes["cube"], NORMS[kind], (images, channels, height * width), groups)
    layer, x = make_norm(kind, channels, groups=groups, size=(height, width)), _numbers(shape)
    alone = NORMS[kind].statistics(shape, groups=groups) == math.prod(shape)
    if alone and NORMS[kind].moment == "mean":
        layer, y = nn.Identity(), torch.zeros(shape)  # x − mean; torch refuses to compute it
    else:
        y = layer(x).detach()
    plot_shared(layer, x, ax=axes["before"], title="before")
    plot_shared(layer, y, ax=axes["after"], title="after")
    figure.suptitle(counts_in_words(NORMS[kind], shape, groups), fontsize=11)
    pyplot.close(figure)  # it is returned: a notebook would show it a second time
    return figure


def _numbers(shape: Shape) -> Tensor:
    """Whole numbers from 0 to 9; where the worked example reaches they are its own."""
    x = torch.randint(0, 10, LIMITS, generator=generator(0, "explore")).float()
    x[:4, :4, :2, :2] = example_batch()
    return x[tuple(map(slice, shape))]


def counts_in_words(kind: NormKind, shape: Shape, groups: int) -> str:
    """How many means there are, of how many numbers, and how many numbers are learned."""
    own = kind.own_axes(shape, groups=groups)
    product = " · ".join(own)
    if len(own) > 1:
        product += " = " + " · ".join(map(str, own.values()))
    count = kind.statistics(shape, groups=groups)
    each = math.prod(shape) // count
    learned = " · ".join((str(len(kind.learned)), *kind.learned_axes)).removeprefix("1 · ")
    return (
        f"{kind.title.split(',')[0].capitalize()}: {product} = {count} {kind.moment}"
        f"{'s' * (count > 1)} of {each} number{'s' * (each > 1)}; "
        f"{learned} = {kind.parameters(shape)} learned numbers"
    )
