"""Figures come out right under every style sheet, and show names as they are written."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot, rc_context, rcParams, rcParamsDefault, style
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.image import imread
from matplotlib.text import Text
from mpl_toolkits.mplot3d.art3d import Text3D

import normlab as nl
from normlab.support.colours import contrast
from normlab.support.figures import fitted, literal, own_style, shortened
from tests.comparisons.test_comparison import difference
from tests.comparisons.test_sweep_plots import table_of
from tests.lessons.test_range_test import judged
from tests.lessons.test_watch_plots import made_up
from tests.test_plots import make_mistakes, run_with

# Each of them ended a figure, was read as a formula, or was missing from the legend.
NAMES = ("Ca$h", "$0-$10", "_hidden", r"$\nonsense{$", "a_b^c", "<b>|*x*", "\udcff")


def half_white(side: int = 6) -> torch.Tensor:
    """Images (9, 1, side, side): white above, black below."""
    images = torch.zeros(9, 1, side, side, dtype=torch.uint8)
    images[:, :, : side // 2] = 255
    return images


def samples(names: tuple[str, ...] = ("cat", "dog", "emu"), **options: object):
    images, labels = half_white(12).repeat(len(names), 1, 1, 1), torch.arange(9 * len(names))
    labels %= len(names)
    data = nl.Dataset("toy", images, labels, images, labels, tuple(names), "toy images")
    return nl.plot_samples(data, per_class=3, **options)


def mistakes(names: tuple[str, ...] = ("cat", "dog", "emu")):
    some = replace(make_mistakes(4), images=half_white()[:4], classes=tuple(names))
    return nl.plot_mistakes(some, title=names[0])


def runs(names: tuple[str, ...], quantity: str = "test_accuracy"):
    return {n: [run_with(**{quantity: [0.5, 0.9 - k / 50]})] * 2 for k, n in enumerate(names)}


def sweep(names: tuple[str, ...]):
    places = [(name, size, seed) for name in names for size in (2, 4, 8) for seed in (0, 1)]
    return nl.plot_sweep(table_of([(name, size, 0.1, seed, 0.5) for name, size, seed in places]))


def rates(names: tuple[str, ...]):
    lr = np.geomspace(1e-4, 10, 41)
    return nl.plot_rates(dict.fromkeys(names, judged(lr, np.geomspace(2, 1, 41))))


def confusion(names: tuple[str, ...]):
    return nl.plot_confusion(90 * torch.eye(len(names)).roll(1, 0).long(), names)


# With names wherever a user's own are drawn.
FIGURES = {
    "curves": lambda names: nl.plot_curves(runs(names), "test_accuracy", title=names[0]),
    "both": lambda names: nl.plot_loss_and_accuracy(runs(names)),
    "panels": lambda names: nl.plot_panels({name: runs(names) for name in names[:2]}),
    "confusion": confusion,
    "samples": samples,
    "mistakes": mistakes,
    "watch": lambda names: nl.plot_watch({name: made_up() for name in names[:2]}, "std"),
    "activations": lambda names: nl.plot_activations({names[0]: made_up()}, times=2),
    "sweep": sweep,
    "rates": rates,
    "compare": lambda names: nl.plot_compare(
        [replace(difference(mean, 0.006), first=names[0], second=names[1]) for mean in (0, -0.02)]
    ),
    "shared": lambda names: nl.plot_shared(
        nl.make_norm("bn", 4), nl.example_batch()[:2], title=names[0]
    ),
    "cubes": lambda names: nl.plot_norm_axes(("bn", "gn"), shape=(2, 2, 2)),
    "explorer": lambda names: nl.explore_norm("gn", form=False),
}


def pixels(figure, dpi: int = 60) -> np.ndarray:
    """The figure as it is shown, (height, width, 3), from 0 to 1."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def texts_of(figure) -> list[Text]:
    """What is to be read: not the ticks beyond the ends of an axis, nor what lies in a cube."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    found = [text for text in found if not isinstance(text, Text3D)]
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden = ticks if not axis.axes.axison else []
        hidden = hidden or [tick for tick in ticks if not low <= tick.get_loc() <= high]
        gone = {text for tick in hidden for text in (tick.label1, tick.label2)}
        found = [text for text in found if text not in gone]
    return found


def behind(text: Text, shown: np.ndarray) -> np.ndarray:
    """The commonest colour where a text stands."""
    box = Text.get_window_extent(text)
    height, width, _ = shown.shape
    rows = slice(max(0, int(height - box.y1) - 1), max(1, int(height - box.y0) + 2))
    columns = slice(max(0, int(box.x0) - 1), min(width, int(box.x1) + 2))
    around = shown[rows, columns].reshape(-1, 3).round(2)
    colours, counts = np.unique(around, axis=0, return_counts=True)
    return colours[counts.argmax()]


# --- styles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", style.available)
def test_a_style_brings_nothing_but_colours(name):
    with style.context(name), own_style():
        differing = {key for key in rcParams if rcParams[key] != rcParamsDefault[key]}
    # Beside colours there are fonts, sizes that every figure sets, and kinds that nothing draws.
    others = r"color|dpi|figsize|unicode_minus|simplify|chunksize"
    others += r"|^(animation|backend|boxplot|date|font|hatch|hist|keymap|scatter|svg)"
    assert {key for key in differing if not re.search(others, key)} == set()


def assert_legible(kind: str, name: str) -> None:
    with style.context(name):
        figure = FIGURES[kind](("cat", "dog", "emu"))
        shown = pixels(figure)
    for text in texts_of(figure):
        on = behind(text, shown)
        assert contrast(text.get_color(), on) > 3, (kind, text.get_text(), on)


@pytest.mark.parametrize("name", style.available)
def test_curves_can_be_read_under_every_style(name):
    assert_legible("curves", name)


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("name", ["default", "dark_background"])
def test_every_figure_can_be_read_under_a_light_and_a_dark_style(kind, name):
    assert_legible(kind, name)


@pytest.mark.parametrize("name", ["dark_background", "ggplot", {"image.origin": "lower"}])
def test_images_stand_upright_and_nothing_is_drawn_over_them(name):
    with style.context(name):
        figures = [samples(), mistakes(), confusion(("cat", "dog", "emu"))]
        shown = [pixels(figure) for figure in figures]
    for figure, picture in zip(figures[:2], shown[:2], strict=True):
        (box, *_), height = [ax.images[0].get_window_extent() for ax in figure.axes], len(picture)
        column = picture[:, int(box.x0) + 4]  # in the first image
        top = column[int(height - box.y1) + 2 :]
        assert (top[:3] == 1).all()
        assert (column[int(height - box.y0) - 4 : int(height - box.y0) - 1] == 0).all()
    ax = figures[2].axes[0]
    right, wrong = (ax.transData.transform(place) for place in ((0.3, 0.3), (0.3, 2.3)))
    x, y = right.astype(int)
    assert wrong[1] < y  # the first class on top
    diagonal, colours = shown[2][-y, x], shown[2][-int(wrong[1]) : -int(wrong[1]) + 5, x]
    assert contrast(diagonal, "white") < 1.2
    assert len(np.unique(colours, axis=0)) == 1  # no grid


def test_a_saved_figure_has_the_background_it_was_drawn_for(tmp_path):
    with style.context("dark_background"):
        figure = nl.plot_curves(runs(("GN",)))
    nl.save_figure(figure, tmp_path / "dark.png")
    with rc_context({"savefig.facecolor": "black", "savefig.transparent": True}):
        nl.save_figure(nl.plot_curves(runs(("GN",))), tmp_path / "light.png")
    corners = [imread(tmp_path / f"{name}.png")[0, 0] for name in ("dark", "light")]
    np.testing.assert_array_equal(corners, [(0, 0, 0, 1), (1, 1, 1, 1)])


def test_sizes_are_the_same_under_every_style():
    plain = nl.plot_curves(runs(("GN", "LN")), "test_accuracy")
    with style.context("seaborn-v0_8-poster"):
        large = nl.plot_curves(runs(("GN", "LN")), "test_accuracy")
    sizes = [[text.get_fontsize() for text in texts_of(figure)] for figure in (plain, large)]
    assert sizes[0] == sizes[1]


def test_settings_are_as_before_whatever_happens():
    with rc_context({"axes.grid": True, "font.size": 30}):
        with pytest.raises(ValueError, match="no runs to plot"):
            nl.plot_curves({})
        nl.plot_curves(runs(("GN",)))
        assert (pyplot.rcParams["axes.grid"], pyplot.rcParams["font.size"]) == (True, 30)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIGURES)
def test_names_are_drawn_as_they_are_written(kind):
    figure = FIGURES[kind](NAMES)
    pixels(figure)  # a formula that cannot be read ends here
    texts = [text.get_text() for text in texts_of(figure)]
    assert not [text for text in texts if is_math_text(text) and "mathdefault" not in text]
    if kind not in ("cubes", "explorer"):
        assert any(literal(NAMES[0]) in text for text in texts)


@pytest.mark.parametrize("kind", ["curves", "both", "panels", "sweep", "rates"])
def test_the_legend_names_every_curve(kind):
    figure = FIGURES[kind](NAMES)
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()] + figure.legends
    for legend in legends:
        texts = [text.get_text().partition(": ")[0] for text in legend.get_texts()]
        assert texts == list(map(literal, NAMES))
        assert len(legend.legend_handles) == len(NAMES)
    assert legends


def test_numbers_at_logarithmic_ticks_stay_powers():
    (ax,) = rates(("BN",)).axes
    (label, *_) = ax.get_xticklabels()
    assert "mathdefault" in label.get_text()
    assert label.get_parse_math()


def test_formulas_of_the_callers_own_stay_formulas():
    figure, axes = pyplot.subplots(1, 2)
    own = [axes[0].set_title(r"$\mu$"), axes[1].set_xlabel(r"$\sigma$"), figure.suptitle("$x$")]
    nl.plot_curves(runs(("$a$",)), ax=axes[0], title="$a$")
    # The first has another text now.
    assert [is_math_text(text.get_text()) for text in own] == [False, True, True]


def test_what_is_literal_stays_so():
    assert literal(r"\udcff" + "\udcff") == r"\udcff?"  # bytes that are no text
    assert literal(literal("$0-$10")) == literal("$0-$10")
    assert not is_math_text(literal(r"a\$b$c$"))


# --- room -------------------------------------------------------------------------------------


def test_long_names_stay_within_the_figure():
    names = [f"number {n} of the longest names that anybody has ever given" for n in range(3)]
    for kind in ("curves", "both", "confusion", "samples", "mistakes", "sweep", "rates"):
        figure = FIGURES[kind](tuple(names))
        pixels(figure)
        for text in texts_of(figure):
            box = Text.get_window_extent(text)
            assert -1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, (kind, text.get_text())
            assert -1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1, (kind, text.get_text())


def test_a_shortened_name_keeps_both_ends():
    assert shortened("as it is") == "as it is"
    assert shortened("x" * 40 + " number 7") == "x" * 17 + "…" + "x number 7"
    assert fitted("some words\nof a title", 0.8, size=10) == "some words\nof a title"
    assert fitted("some words of a title", 0.8, size=10) == "some words\nof a title"
