"""The coloured part of each cube is what shares a mean with the first element, by trial."""

import numpy as np
import pytest
from matplotlib import pyplot

import normlab as nl
from normlab.diagrams import _first_mean
from normlab.norms import NORMS


@pytest.mark.parametrize("kind", ["bn", "ln", "in", "gn", "ln-elementwise"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_coloured_part_is_what_a_layer_shares(kind, groups):
    images, channels, positions = shape = (3, 4, 2)
    layer = nl.make_norm(kind, channels, groups=groups, size=(1, positions))
    numbers = nl.shared_statistics(layer, (images, channels, 1, positions)).view(shape)
    coloured = np.zeros(shape, dtype=bool)
    coloured[_first_mean(NORMS[kind], shape, groups)] = True
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
