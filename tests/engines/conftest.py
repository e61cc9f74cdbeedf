"""What the tests of the engines share."""

import pytest
import torch

import normlab as nl
from normlab.engines import choice


@pytest.fixture
def few_digits(digits):
    """90 images: batches of 32 end with a short one."""
    return digits.subset(train=90, test=40)


@pytest.fixture
def fit_with(monkeypatch):
    """`fit` on the CPU with an engine of a kind, whatever it is made for.

    Without a GPU the graph's step is called instead of replayed: its bookkeeping (places, learning
    rates, sums, short batches, what the warm-ups leave behind) is the same.
    """

    def fit(kind, data, recipe, *, network=None, **options):
        monkeypatch.setattr(choice, "_fastest", lambda *_: (kind, "a test"))
        network = network or nl.build_network("mnist-l1", dropout=0.0, seed=1)
        run = nl.fit(network, data, recipe, device="cpu", progress=False, **options)
        assert run.config["from"]["engine"] == kind.name
        return run

    return fit


@pytest.fixture
def assert_close():
    """`assert_close(run, other, tolerance)`: histories, weights and running statistics agree."""

    def compare(one, other, tolerance):
        for mine, theirs in zip(one.history, other.history, strict=True):
            for key in ("train_loss", "test_loss", "penalty", "lr"):
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-15), key
            for key in ("train_accuracy", "test_accuracy"):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-9)
        mine, theirs = map(_numbers, (one.network, other.network))
        assert (mine - theirs).norm() < tolerance * theirs.norm()

    return compare


def _numbers(network):
    """Without BN's count of batches, which would outweigh them."""
    state = network.state_dict().values()
    return torch.cat([value.flatten() for value in state if value.is_floating_point()])
