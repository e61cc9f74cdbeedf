"""Samples of a data set: the images of their class, before and after augmentation."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import normlab as nl


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def shown(figure, columns: int, side: int = 28) -> np.ndarray:
    """The pixels of all images (N, H, W) of a figure, row by row."""
    (picture,) = figure.axes[0].images
    pixels, step = np.asarray(picture.get_array()), side + 2
    rows = range(0, len(pixels), step)
    corners = [(row, step * column) for row in rows for column in range(columns)]
    images = np.stack([pixels[y : y + side, x : x + side] for y, x in corners])
    assert (images[..., 3] == 255).all()
    assert pixels[..., 3].sum() == images[..., 3].sum()  # between them nothing is drawn
    return images[..., 0]


def test_each_row_shows_training_images_of_its_class(digits):
    figure = nl.plot_samples(digits, per_class=5)
    pixels = shown(figure, 5)
    assert len(pixels) == 10 * 5
    everything = digits.train_images.squeeze(1).numpy()
    for place, image in enumerate(pixels):
        (found,) = np.nonzero((everything == image).all((1, 2)))
        assert place // 5 in digits.train_labels[found].tolist()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == list(digits.classes)
    assert figure.get_suptitle() == "scikit-learn digits, training images"


def test_augmentation_changes_the_same_images(digits):
    before = shown(nl.plot_samples(digits, per_class=3, seed=4), 3)
    after = shown(nl.plot_samples(digits, ("flip:1",), per_class=3, seed=4), 3)
    assert (before[:, :, ::-1] == after).all()
    turned = nl.plot_samples(digits, ("rotate:20", "shift:2"), per_class=3, seed=4)
    assert not (before == shown(turned, 3)).all()
    assert " ".join(turned.get_suptitle().split()).endswith("augmented by rotate:20, shift:2")


def test_too_few_images_of_a_class_are_told(digits):
    with pytest.raises(ValueError, match=r"per_class=500: one class has 1\d\d training images"):
        nl.plot_samples(digits, per_class=500)


@pytest.mark.parametrize("per_class", [1, 3, 8])
def test_the_title_is_not_cut(digits, per_class):
    figure = nl.plot_samples(digits, ("rotate:20", "shift:2", "flip:0.5"), per_class=per_class)
    figure.canvas.draw()
    (title,) = figure.texts
    box, images = title.get_window_extent(), figure.axes[0].images[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert images.y1 <= box.y0 < box.y1 <= figure.bbox.y1


def test_a_hundred_classes_are_one_picture():
    """Hundreds of axes would take half a minute."""
    images = torch.arange(200 * 3 * 8 * 8).view(200, 3, 8, 8).byte()
    labels = torch.arange(200) % 100
    names = tuple(f"class {n}" for n in range(100))
    data = nl.Dataset("many", images, labels, images, labels, names, "many classes")
    figure = nl.plot_samples(data, per_class=2)
    assert len(figure.axes) == len(figure.axes[0].images) == 1
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    rows = [pixels[9 * row : 9 * row + 8, :8, :3].transpose(2, 0, 1) for row in range(100)]
    for label, row in enumerate(rows):
        assert any((row == image).all() for image in images[labels == label].numpy())
