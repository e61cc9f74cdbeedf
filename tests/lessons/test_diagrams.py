"""The coloured part of each cube, and the colours of a table, are what shares a mean by trial."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import normlab as nl
from normlab.lessons.diagrams import _first_set, tints
from normlab.norms import NORMS


@pytest.mark.parametrize(
    ("kind", "groups"),
    [*((kind, 1) for kind in ("bn", "ln", "in", "ln-elementwise")), ("gn", 2), ("gn", 4)],
)
def test_the_coloured_part_is_what_a_layer_shares(kind, groups):
    images, channels, positions = shape = (3, 4, 2)
    layer = nl.make_norm(kind, channels, groups=groups, size=(1, positions))
    numbers = nl.shared_statistics(layer, (images, channels, 1, positions)).view(shape)
    coloured = np.zeros(shape, dtype=bool)
    coloured[_first_set(NORMS[kind], shape, groups)] = True
    assert (coloured == (numbers == numbers[0, 0, 0]).numpy()).all()


def test_there_is_a_cube_for_each_kind_with_its_colours():
    figure = nl.plot_norm_axes(("BatchNorm", "gn"), shape=(2, 4, 3), groups=2)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["Batch normalization", "Group normalization, 2 groups"]
    for ax, coloured in zip(figure.axes, (2 * 3, 2 * 3), strict=True):
        assert {text.get_text() for text in ax.texts} == {"C", "N", "H, W"}
        assert len(ax.collections) >= coloured
    pyplot.close(figure)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="groups=4 does not divide 6 channels"):
        nl.plot_norm_axes(groups=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shape": (0, 4, 4)}, "each number of shape must be at least 1"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"shape": (4, 4)}, r"shape must be \(N, C, H·W\), not \(4, 4\)"),
        ({"kinds": ()}, "there are no kinds of norms"),
    ],
)
def test_a_cube_of_nothing_is_one_sentence(options, says):
    with pytest.raises(ValueError, match=says):
        nl.plot_norm_axes(**options)


# --- the coloured table -----------------------------------------------------------------------


def cells(ax) -> dict[tuple[float, float], tuple[str, tuple]]:
    """Text and colour of each cell, by the place of its middle."""
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    middles = {
        (patch.get_x() + 0.5, patch.get_y() + 0.5): patch.get_facecolor() for patch in ax.patches
    }
    assert texts.keys() == middles.keys()
    return {place: (texts[place], middles[place]) for place in sorted(texts)}


def by_reading_order(ax) -> tuple[list[str], list[tuple]]:
    """Texts and colours by rows from the top, from left to right."""
    found = sorted(cells(ax).items(), key=lambda item: item[0][::-1])
    return [text for _, (text, _) in found], [colour for _, (_, colour) in found]


@pytest.mark.parametrize(("kind", "groups"), [("bn", 1), ("ln", 1), ("in", 1), ("gn", 2)])
def test_cells_of_one_colour_are_those_that_share_a_mean(kind, groups):
    layer, x = nl.make_norm(kind, 4, groups=groups), nl.example_batch()
    figure = nl.plot_shared(layer, x, title="a table")
    texts, colours = by_reading_order(figure.axes[0])
    rows = x.numpy().transpose(0, 2, 1, 3).ravel()  # images, rows, channels, columns
    assert texts == [f"{number:.0f}" for number in rows]
    n, c, _, _ = np.indices(x.shape)
    sets = {"bn": c, "ln": n, "in": 4 * n + c, "gn": 2 * n + c // 2}[kind]
    sets = sets.transpose(0, 2, 1, 3).ravel()
    assert figure.axes[0].get_title() == "a table"
    for one in range(64):
        for other in range(64):
            assert (colours[one] == colours[other]) == (sets[one] == sets[other])
    pyplot.close(figure)


def test_results_are_written_with_two_decimals_and_a_true_minus():
    x = torch.tensor([0.0, 3.0, -1e-6, -1.2345]).view(1, 1, 2, 2)
    figure, ax = pyplot.subplots()
    assert nl.plot_shared(nl.make_norm("in", 1), x, ax=ax) is figure
    assert by_reading_order(ax)[0] == ["0.00", "3.00", "0.00", "−1.23"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["channel 1"]
    pyplot.close(figure)


def test_without_a_layer_nothing_is_coloured():
    figure = nl.plot_shared(None, nl.example_batch())
    assert len(set(by_reading_order(figure.axes[0])[1])) == 1
    pyplot.close(figure)


@pytest.mark.filterwarnings("error")
def test_what_a_layer_has_computed_can_be_written():
    layer = nl.make_norm("bn", 4)
    pyplot.close(nl.plot_shared(layer, layer(nl.example_batch())))


def test_as_many_sets_as_the_sliders_allow_have_light_colours_of_their_own():
    colours = tints(32)
    assert len(set(colours)) == 32
    assert tints(33)[32] == colours[0]
    for colour in colours:
        red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)
        ]
        luminance = np.dot((0.2126, 0.7152, 0.0722), linear)
        assert (luminance + 0.05) / 0.05 >= 4.5, colour  # WCAG AA for black text


@pytest.mark.parametrize("shape", [(4, 4), (8, 16, 4, 4)])
def test_what_is_no_table_is_refused(shape):
    with pytest.raises(ValueError, match=r"a table needs \(N, C, H, W\), 1,024 numbers at most"):
        nl.plot_shared(torch.nn.Identity(), torch.zeros(shape))
