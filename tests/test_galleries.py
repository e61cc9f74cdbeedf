"""Samples of a data set: the images of their class, before and after augmentation."""

import numpy as np
import pytest
from matplotlib import pyplot

import normlab as nl


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def shown(figure) -> np.ndarray:
    """The pixels of all images of a figure, row by row."""
    return np.stack([np.asarray(ax.images[0].get_array()) for ax in figure.axes])


def test_each_row_shows_training_images_of_its_class(digits):
    figure = nl.plot_samples(digits, per_class=5)
    pixels = shown(figure).squeeze()
    assert len(pixels) == 10 * 5
    everything = digits.train_images.squeeze(1).numpy()
    for place, image in enumerate(pixels):
        (found,) = np.nonzero((everything == image).all((1, 2)))
        assert place // 5 in digits.train_labels[found].tolist()
    names = [ax.get_ylabel() for ax in figure.axes[::5]]
    assert names == list(digits.classes)
    assert figure.get_suptitle() == "scikit-learn digits, training images"


def test_augmentation_changes_the_same_images(digits):
    before = shown(nl.plot_samples(digits, per_class=3, seed=4))
    after = shown(nl.plot_samples(digits, ("flip:1",), per_class=3, seed=4))
    assert (before[:, :, ::-1] == after).all()
    turned = nl.plot_samples(digits, ("rotate:20", "shift:2"), per_class=3, seed=4)
    assert not (before == shown(turned)).all()
    assert turned.get_suptitle().endswith("augmented by rotate:20, shift:2")


def test_too_few_images_of_a_class_are_told(digits):
    with pytest.raises(ValueError, match=r"per_class=500: one class has 1\d\d training images"):
        nl.plot_samples(digits, per_class=500)
