"""A form to try a normalization: its kind and the sizes by sliders, what it does as a picture."""

from __future__ import annotations

import io
import math
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normlab.lessons.by_hand import example_batch
from normlab.lessons.diagrams import GAP, draw_cube, plot_shared
from normlab.norms import NORMS, NormKind, make_norm, norm_name
from normlab.support.checks import check_groups, divisors, one_of, plain, warn, whole_number
from normlab.support.figures import drawn
from normlab.support.seeding import generator

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.figure import Figure

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
    shape, groups = plain(shape), plain(groups)
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        raise ValueError(f"shape must be (N, C, H, W), not {shape!r}")
    for name, side, most in zip("NCHW", shape, LIMITS, strict=True):
        if whole_number(side, name) > most:
            raise ValueError(f"{name} must be at most {most} here, not {side}")
    if "C/G" in NORMS[kind].averaged:
        check_groups(groups, shape[1])
    groups = max(count for count in divisors(shape[1]) if count <= max(groups, 1))
    wanted = _has_front_end() if form is None else form
    if wanted and find_spec("ipywidgets") is None:
        warn("the sliders of explore_norm need ipywidgets: pip install ipywidgets")
        wanted = False
    return _form(kind, shape, groups) if wanted else _picture(kind, tuple(shape), groups)


def explorable() -> list[str]:
    """The norms that average over something."""
    return [name for name, kind in NORMS.items() if kind.averaged]


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


def _form(kind: str, shape: Shape, groups: int) -> VBox:
    """The sliders, and the picture that follows them."""
    import ipywidgets as widgets

    names = ("images N", "channels C", "rows H", "columns W")
    sides = [
        widgets.IntSlider(side, 1, most, description=name, continuous_update=False)
        for name, side, most in zip(names, shape, LIMITS, strict=True)
    ]
    counts = widgets.SelectionSlider(
        options=divisors(shape[1]), value=groups, description="groups G"
    )
    kinds = [(NORMS[name].title.capitalize(), name) for name in explorable()]
    kinds = widgets.Dropdown(options=kinds, value=kind, layout=widgets.Layout(width="480px"))
    image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def draw(kind: str, n: int, c: int, h: int, w: int, groups: int) -> None:
        counts.disabled = "C/G" not in NORMS[kind].averaged
        figure, content = _picture(kind, (n, c, h, w), groups), io.BytesIO()
        options = {"format": "png", "dpi": 80, "bbox_inches": "tight"}
        figure.savefig(content, facecolor=figure.get_facecolor(), **options)
        image.value = content.getvalue()

    def offer_divisors(change: dict) -> None:
        kept = max(count for count in divisors(change["new"]) if count <= counts.value)
        counts.unobserve(form.update, "value")  # the channels' own change draws
        counts.options, counts.value = divisors(change["new"]), kept
        counts.observe(form.update, "value")

    sides[1].observe(offer_divisors, "value")
    named = dict(zip("nchw", sides, strict=True))
    form = widgets.interactive(draw, kind=kinds, **named, groups=counts)
    return widgets.VBox([form, image])


@drawn
def _picture(kind: str, shape: Shape, groups: int) -> Figure:
    """The cube, the numbers before and after, and the counts as the title."""
    from matplotlib import pyplot

    images, channels, height, width = shape
    across, down = 0.45 * channels * (width + GAP) + 0.9, 0.36 * images * (height + GAP) + 0.8
    wide = channels * width > 10  # then the tables stand one above the other
    figure, axes = pyplot.subplot_mosaic(
        [["cube", "before"], ["cube", "after"]] if wide else [["cube", "before", "after"]],
        figsize=(3.4 + across * (1 if wide else 2), max(3.2, down * (2 if wide else 1)) + 0.4),
        width_ratios=(3.4, across) if wide else (3.4, across, across),
        per_subplot_kw={"cube": {"projection": "3d"}},
        layout="constrained",
    )
    draw_cube(axes["cube"], NORMS[kind], (images, channels, height * width), groups)
    layer, x = make_norm(kind, channels, groups=groups, size=(height, width)), _numbers(shape)
    if numbers_a_mean(NORMS[kind], shape, groups) == 1 and NORMS[kind].moment == "mean":
        plot_shared(nn.Identity(), x, ax=axes["before"], title="before")  # BN of one number fails
        text = "Each number is its own mean,\nso x − mean is 0 everywhere."
        axes["after"].set_axis_off()
        axes["after"].text(0.5, 0.5, text, ha="center", va="center")
    else:
        plot_shared(layer, x, ax=axes["before"], title="before")
        with torch.no_grad():
            plot_shared(layer, layer(x), ax=axes["after"], title="after")
    figure.suptitle(counts_in_words(NORMS[kind], shape, groups), fontsize=11)
    pyplot.close(figure)  # it is returned: a notebook would show it a second time
    return figure


def _numbers(shape: Shape) -> Tensor:
    """Whole numbers from 0 to 9; where the worked example reaches they are its own."""
    x = torch.randint(0, 10, LIMITS, generator=generator(0, "explore")).float()
    x[:4, :4, :2, :2] = example_batch()
    return x[tuple(slice(side) for side in shape)]


def numbers_a_mean(kind: NormKind, shape: Shape, groups: int) -> int:
    """How many numbers of (N, C, H, W) share one mean."""
    return math.prod(shape) // kind.statistics(shape, groups=groups)


def counts_in_words(kind: NormKind, shape: Shape, groups: int) -> str:
    """How many means there are, of how many numbers, and how many numbers are learned."""
    own = kind.own_axes(shape, groups=groups)
    product = " · ".join(own)
    if len(own) > 1:
        product += " = " + " · ".join(map(str, own.values()))
    means = _several(kind.statistics(shape, groups=groups), kind.moment)
    each = _several(numbers_a_mean(kind, shape, groups), "number")
    learned = " · ".join((str(len(kind.learned)), *kind.learned_axes)).removeprefix("1 · ")
    return (
        f"{kind.title.split(',')[0].capitalize()}: {product} = {means} of {each}; "
        f"{learned} = {kind.parameters(shape)} learned numbers"
    )


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
