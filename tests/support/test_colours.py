"""Curves can be told apart, in grey too; letters in their colours can be read."""

import itertools

import numpy as np
import pytest
from matplotlib import rc_context

from normlab.support.colours import COLOURS, LINES, contrast, curve_styles, legible, luminance


def test_looks_differ_in_grey_too():
    looks = list(curve_styles([f"run {n}" for n in range(len(COLOURS))]).values())
    assert [look["linestyle"] for look in looks] == list(LINES)
    assert len({look["marker"] for look in looks}) == len(COLOURS)
    for one, other in itertools.combinations(looks, 2):
        assert one["color"] != other["color"]
        apart = abs(luminance(one["color"]) - luminance(other["color"]))
        assert one["linestyle"] != other["linestyle"] or apart > 0.1


@pytest.mark.parametrize("head", ["", "BN "])
def test_many_variants_stay_distinguishable(head):
    looks = curve_styles([f"{head}number {n}" for n in range(30)]).values()
    kinds = ("color", "marker", "linestyle")
    found = {tuple(look[kind] for kind in kinds) for look in looks}
    assert len(found) == (len(LINES) if head else 30)  # relatives differ in their lines alone


def test_relatives_share_a_colour_and_not_a_line():
    labels = ["BN", "GN", "BN + skip", "LN element-wise", "mine", "GN + skip", "mine too"]
    looks = curve_styles(labels)
    assert list(looks) == labels
    families = [["BN", "BN + skip"], ["GN", "GN + skip"], ["LN element-wise"], ["mine", "mine too"]]
    assert len({looks[label]["color"] for label in labels}) == len(families)
    for family in families:
        some = [looks[label] for label in family]
        assert len({(look["color"], look["marker"]) for look in some}) == 1
        assert len({look["linestyle"] for look in some}) == len(family)
        assert len({look["markerfacecolor"] for look in some}) == len(family)


def test_a_norm_looks_the_same_in_every_figure():
    few = curve_styles(["none, He", "BN", "GN"])
    more = curve_styles(["none", "none, He", "LN", "GN", "BN", "IN"])
    assert few == {label: more[label] for label in few}
    assert curve_styles(["BN + L1"]) == {"BN + L1": few["BN"]}
    assert list(curve_styles(["mine", "yours"]).values()) == [
        more["BN"],
        more["GN"],
    ]  # the first two


def test_the_two_kinds_of_ln_differ_in_colour_line_and_marker():
    labels = ["BN", "GN", "LN", "LN element-wise", "mine"]
    looks = curve_styles(labels)
    for kind in ("color", "linestyle", "marker"):
        assert len({look[kind] for look in looks.values()}) == len(labels)
    ln, elementwise = looks["LN"], looks["LN element-wise"]
    assert abs(luminance(ln["color"]) - luminance(elementwise["color"])) > 0.1
    assert curve_styles(labels[:2] + labels[3:4])["LN element-wise"] == elementwise
    skips = curve_styles(["LN element-wise", "LN element-wise + skip", "LN + L1"])
    assert skips["LN element-wise + skip"]["color"] == elementwise["color"]
    assert skips["LN + L1"]["color"] == ln["color"]


@pytest.mark.parametrize("paper", ["white", "black", "0.75", "#E5E5E5"])
def test_coloured_letters_can_be_read_on_any_paper(paper):
    ink = "white" if paper == "black" else "black"
    with rc_context({"text.color": ink}):
        for colour in COLOURS:
            assert contrast(legible(colour, paper), paper) >= 4.5
        assert np.array_equal(legible(ink, paper), [ink == "white"] * 3)
