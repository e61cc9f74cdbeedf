"""The worked example: whole means, and a first number that each norm treats differently."""

import numpy as np
import pytest

import normlab as nl

AXES = {"bn": (0, 2, 3), "ln": (1, 2, 3), "in": (2, 3)}


def means(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "gn":
        return x.reshape(4, 2, 8).mean(-1)
    return x.mean(AXES[kind])


def test_the_numbers_are_small_and_whole():
    x = nl.example_batch().numpy()
    assert x.shape == (4, 4, 2, 2)
    assert x.dtype == np.float32
    assert set(np.unique(x)) == set(range(10))


@pytest.mark.parametrize("kind", ["bn", "ln", "gn", "in"])
def test_all_means_are_whole(kind):
    found = means(nl.example_batch().numpy(), kind)
    assert (found == found.round()).all()


@pytest.mark.parametrize(
    ("kind", "mean", "deviation"), [("in", 8, 1), ("gn", 7, 2), ("ln", 6, 3), ("bn", 5, 3)]
)
def test_the_first_number_meets_four_means_and_whole_deviations(kind, mean, deviation):
    x = nl.example_batch().numpy()
    sets = {"in": x[0, 0], "gn": x[0, :2], "ln": x[0], "bn": x[:, 0]}
    assert x[0, 0, 0, 0] == 7
    assert sets[kind].mean() == mean
    assert sets[kind].std() == deviation


def test_each_call_gives_numbers_of_its_own():
    nl.example_batch().zero_()
    assert nl.example_batch().sum() > 0
