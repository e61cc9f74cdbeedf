"""Data sets by name: the bundled digits, those of torchvision, a folder of images."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import normlab as nl
from tests.datasets.made_up import write_folder, write_idx


def test_digits_are_scikit_learns_in_a_stratified_split(no_network):
    data = nl.load_dataset("digits", input_shape=(1, 8, 8))
    original = load_digits()
    assert (len(data.train_images), len(data.test_images)) == (1437, 360)
    assert data.classes == tuple("0123456789")

    def as_rows(images, labels):
        return sorted((int(y), *x.ravel().tolist()) for x, y in zip(images, labels, strict=True))

    ours = as_rows(
        torch.cat([data.train_images, data.test_images]).numpy(),
        torch.cat([data.train_labels, data.test_labels]),
    )
    assert ours == as_rows(np.rint(original.images * 255 / 16).astype(int), original.target)
    share = np.bincount(original.target) * 360 / 1797
    assert np.abs(data.test_labels.bincount().numpy() - share).max() < 1


@pytest.mark.process
def test_a_second_look_at_the_digits_does_not_import_scikit_learn():
    program = (
        "import sys, normlab as nl\n"
        "data = nl.load_dataset('digits')\n"
        "print('sklearn' in sys.modules, data.fingerprint)"
    )
    command = [sys.executable, "-c", program]
    (imported, first), (again, second) = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert (imported, again) == ("True", "False")
    assert first == second


def test_the_split_of_the_digits_never_changes(digits):
    # Accuracies of different versions can be compared only while the test images are the same.
    assert "".join(map(str, digits.test_labels[:20].tolist())) == "76377328932664581356"
    assert digits.fingerprint == nl.load_dataset("digits").fingerprint
    assert digits.input_shape == (1, 28, 28)
    assert digits.source == "scikit-learn digits"


def test_digits_are_enlarged_as_pillow_does_it():
    data = nl.load_dataset("digits", input_shape=(3, 32, 32))
    small = nl.load_dataset("digits", input_shape=(1, 8, 8))
    assert data.input_shape == (3, 32, 32)
    for image, original in zip(data.test_images[:20], small.test_images[:20], strict=True):
        enlarged = Image.fromarray(original[0].numpy()).resize((32, 32), Image.BILINEAR)
        for channel in image:
            assert np.abs(channel.numpy().astype(int) - np.asarray(enlarged)).max() <= 2


def test_images_are_converted_to_the_shape_asked_for(tmp_path):
    arrays = write_idx(tmp_path)
    data = nl.load_dataset("mnist", tmp_path, input_shape=(3, 14, 14))
    assert data.input_shape == (3, 14, 14)
    halved = Image.fromarray(arrays["train"][0][0]).resize((14, 14), Image.BILINEAR)
    for channel in data.train_images[0]:
        assert np.abs(channel.numpy().astype(int) - np.asarray(halved)).max() <= 2
    assert "3×14×14" in data.source


@pytest.mark.parametrize("wrong", [(2, 28, 28), (1, 0, 28), "28"])
def test_an_impossible_input_shape_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="input_shape"):
        nl.load_dataset("digits", input_shape=wrong)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("minst", ValueError, "did you mean 'mnist'"),
        ("no/such/folder", FileNotFoundError, "no/such/folder"),
        (Path("nowhere"), FileNotFoundError, "nowhere"),
    ],
)
def test_an_unknown_name_is_refused(name, error, message, no_network):
    with pytest.raises(error, match=message):
        nl.load_dataset(name)


def test_an_archive_is_to_be_unpacked(tmp_path):
    write_folder(tmp_path / "pets")
    archive = shutil.make_archive(tmp_path / "pets", "zip", tmp_path / "pets")
    with pytest.raises(ValueError, match=r"pets\.zip' is a file: unpack it"):
        nl.load_dataset(archive)


def test_no_source_holds_a_path(tmp_path):
    write_folder(tmp_path / "pets")
    write_idx(tmp_path)
    data = nl.load_dataset(tmp_path / "pets")
    for each in (
        data,
        data.subset(4),
        data.with_validation(0.4),
        nl.load_dataset(tmp_path / "pets", input_shape=(1, 4, 4)),
        nl.load_dataset("mnist", tmp_path, input_shape=(1, 14, 14)),
    ):
        assert "/" not in each.source
        assert str(tmp_path) not in repr(each)
