"""The form follows its sliders; without a front end it is one figure."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

import normlab as nl
import normlab.lessons.explorer
from normlab.lessons.explorer import LIMITS, _numbers, counts_in_words, explorable
from normlab.norms import NORMS


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bn", "Batch normalization: C = 6 means of 60 numbers; 2 · C = 12 learned numbers"),
        ("ln", "Layer normalization: N = 3 means of 120 numbers; 2 · C = 12 learned numbers"),
        ("gn", "Group normalization: N · G = 3 · 2 = 6 means of 60 numbers; 2 · C = 12 learned"),
        ("in", "Instance normalization: N · C = 3 · 6 = 18 means of 20 numbers; 2 · C = 12 learn"),
        ("ln-elementwise", "N = 3 means of 120 numbers; 2 · C · H · W = 240 learned numbers"),
    ],
)
def test_the_counts_in_words(kind, text):
    assert text in counts_in_words(NORMS[kind], (3, 6, 5, 4), 2)


def test_one_mean_is_written_in_the_singular():
    assert "C = 1 mean of 1 number;" in counts_in_words(NORMS["bn"], (1, 1, 1, 1), 1)


@pytest.mark.parametrize(
    ("kind", "groups"), [*((kind, 2) for kind in explorable()), ("gn", 1), ("gn", 4)]
)
def test_the_counts_are_those_of_the_layer(kind, groups):
    shape = (3, 4, 2, 2)
    layer = nl.make_norm(kind, 4, groups=groups, size=(2, 2))
    shared = nl.shared_statistics(layer, shape)
    learned = sum(parameter.numel() for parameter in layer.parameters())
    sizes = np.bincount(shared.flatten())
    text = counts_in_words(NORMS[kind], shape, groups)
    assert {f"of {size} numbers" in text for size in sizes} == {True}
    assert f"= {len(sizes)} mean" in text
    assert f"= {learned} learned numbers" in text


def test_the_numbers_are_those_of_the_example_wherever_it_reaches():
    x = _numbers(LIMITS)
    assert (x[:4, :4, :2, :2] == nl.example_batch()).all()
    assert set(x.flatten().tolist()) == set(range(10))
    assert (_numbers((2, 8, 3, 1)) == x[:2, :, :, :1]).all()


# --- the figure -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", explorable())
def test_without_a_front_end_it_is_a_figure_of_cube_and_tables(kind):
    figure = nl.explore_norm(kind, shape=(2, 4, 2, 1), groups=4)
    assert isinstance(figure, Figure)
    assert pyplot.get_fignums() == []  # a notebook shows what is returned, once
    _, before, after = figure.axes
    assert len(before.patches) == len(after.patches) == 16
    assert figure.get_suptitle() == counts_in_words(NORMS[kind], (2, 4, 2, 1), 4)


def test_the_table_after_holds_what_torch_computes():
    figure = nl.explore_norm("gn", groups=2)
    expected = nl.group_norm(nl.example_batch(), 2).flatten()
    written = [text.get_text().replace("−", "-") for text in figure.axes[2].texts]
    assert [float(text) for text in written] == pytest.approx(expected.tolist(), abs=0.0051)


@pytest.mark.parametrize("kind", ["bn", "in", "gn"])
def test_a_number_that_is_its_own_mean_becomes_0(kind):
    # batch and instance normalization of torch refuse such an input in training
    _, before, after = nl.explore_norm(kind, shape=(1, 2, 1, 1)).axes
    assert [text.get_text() for text in after.texts] == ["0", "0"]
    assert len({patch.get_facecolor() for patch in before.patches}) == 2


@pytest.mark.parametrize("shape", [(4, 4, 2, 2), LIMITS])
def test_the_tables_stand_one_above_the_other_and_their_letters_can_be_read(shape):
    figure = nl.explore_norm(shape=shape)
    _, before, after = figure.axes
    assert before.get_position().y0 > after.get_position().y1
    if shape != LIMITS:  # on a page that shows 520 pixels
        points = min(text.get_fontsize() for text in after.texts)
        assert points / 72 * 520 / figure.get_figwidth() > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "unknown norm to explore 'none': it must be one of bn, ln, gn"),
        ({"kind": "grup"}, "unknown norm 'grup'.*did you mean 'gn'"),
        ({"shape": (4, 4, 2)}, r"shape must be \(N, C, H, W\), not \(4, 4, 2\)"),
        ({"shape": (4, 9, 2, 2)}, r"at most \(4, 8, 3, 3\) here, not \(4, 9, 2, 2\)"),
        ({"shape": (0, 4, 2, 2)}, "each number of shape must be at least 1, not 0"),
        ({"groups": 3}, "groups=3 does not divide 4 channels: it must be one of 1, 2, 4"),
    ],
)
def test_bad_combinations_get_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        nl.explore_norm(**options)


def test_groups_matter_to_gn_only():
    assert isinstance(nl.explore_norm("bn", shape=(2, 3, 1, 2), groups=2), Figure)


# --- the form ---------------------------------------------------------------------------------


def controls_of(widget) -> dict:
    """The form's controls by their labels."""
    found = {widget.description: widget} if getattr(widget, "description", "") else {}
    for child in getattr(widget, "children", ()):
        found |= controls_of(child)
    return found


@pytest.fixture
def form(monkeypatch):
    """The form's controls, and what its pictures show, which here are quick ones."""
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    drawn = []

    def draw(*what):
        drawn.append(what)
        figure = Figure()
        figure.add_subplot().set_title(str(what))
        return figure

    monkeypatch.setattr(normlab.lessons.explorer, "_picture", draw)
    box = nl.explore_norm("gn", form=True)
    return SimpleNamespace(controls=controls_of(box), drawn=drawn, image=box.children[-1])


def test_the_form_has_a_control_for_everything_and_a_picture():
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    box = nl.explore_norm("gn", form=True)
    labels = {"kind", "images N", "channels C", "rows H", "columns W", "groups G"}
    assert set(controls_of(box)) == labels
    assert Image.open(io.BytesIO(box.children[-1].value)).width > 500
    assert pyplot.get_fignums() == []


def test_the_picture_follows_every_control(form):
    for name, value in (("kind", "bn"), ("images N", 2), ("rows H", 1), ("columns W", 3)):
        before = form.image.value
        form.controls[name].value = value
        assert form.image.value != before
    assert form.drawn[-1] == ("bn", (2, 4, 1, 3), 2)
    assert len(form.drawn) == 5  # one for each change


def test_the_groups_are_those_that_divide_the_channels(form):
    channels, groups = form.controls["channels C"], form.controls["groups G"]
    groups.value = 4
    for count, kept in ((6, 3), (5, 1), (8, 1)):
        channels.value = count
        assert groups.value == kept
        assert form.drawn[-1] == ("gn", (4, count, 2, 2), kept)
    groups.value = 7
    assert groups.value == 4
    assert form.drawn[-1] == ("gn", (4, 8, 2, 2), 4)
    assert len(form.drawn) == 6  # one for each change


def test_groups_are_for_gn_only(form):
    assert not form.controls["groups G"].disabled
    form.controls["kind"].value = "ln"
    assert form.controls["groups G"].disabled


def test_the_sliders_end_where_tables_can_be_read(form):
    names = ("images N", "channels C", "rows H", "columns W")
    assert tuple(form.controls[name].max for name in names) == LIMITS
    assert {form.controls[name].min for name in names} == {1}


# --- where there is a front end ---------------------------------------------------------------


@pytest.mark.parametrize(("answers", "is_form"), [(True, True), (False, False)])
def test_a_notebook_gets_the_form_only_where_somebody_looks(answers, is_form, monkeypatch):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    parent = {"content": {"allow_stdin": answers}}
    shell = SimpleNamespace(get_parent=lambda: parent, kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(nl.explore_norm(), Figure) is not is_form


def test_a_terminal_is_no_notebook(monkeypatch):
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(nl.explore_norm(), Figure)


def test_without_ipywidgets_it_says_so_and_draws(monkeypatch):
    monkeypatch.setattr(normlab.lessons.explorer, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="need ipywidgets: pip install ipywidgets"):
        figure = nl.explore_norm(form=True)
    assert isinstance(figure, Figure)


def test_a_form_that_is_not_wanted_is_not_drawn():
    assert isinstance(nl.explore_norm(form=False), Figure)
