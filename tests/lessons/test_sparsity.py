"""Shares of small weights and of the penalty, against sums in plain Python."""

import pytest
import torch
from torch import nn

from normlab import penalty_share, small_weights
from tests.test_penalties import plain_sum


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution, a norm and a linear layer, with biases."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("below", [1e-3, 0.05, 10.0])
def test_small_weights_are_counted_over_all_layers_together(network, below):
    values = [*network[0].weight.flatten().tolist(), *network[3].weight.flatten().tolist()]
    expected = sum(abs(value) < below for value in values) / len(values)
    assert small_weights(network, below=below) == pytest.approx(expected, rel=1e-12)


def test_small_weights_are_those_below_a_thousandth(network):
    count = 2 * 9 + 3 * 8
    with torch.no_grad():
        network[3].weight.fill_(1.0)
        network[0].weight.fill_(-1.0)
        network[0].weight[0, 0] = torch.tensor([[0.0, -9e-4, 1.1e-3], [1, 1, 1], [1, 1, 1]])
    assert small_weights(network) == pytest.approx(2 / count)


def test_the_penalty_has_its_share_of_what_is_minimised(network):
    total = plain_sum(network[0].weight, network[3].weight)
    expected = 0.01 * total / (0.7 + 0.01 * total)
    assert penalty_share(network, 0.7, l1=0.01) == pytest.approx(expected, rel=1e-12)
    assert penalty_share(network, 0.7, l1=0) == 0
    assert penalty_share(network, 0, l1=0.01) == 1


@pytest.mark.parametrize(
    ("loss", "l1", "message"),
    [
        (0.5, -1e-5, "l1 must be at least 0, not -1e-05"),
        (-0.5, 1e-5, "loss must be at least 0, not -0.5"),
        (float("nan"), 1e-5, "loss must be a finite number, not nan"),
        (0.0, 0.0, "loss and penalty are both 0"),
    ],
)
def test_a_share_of_nothing_or_of_negative_parts_is_refused(network, loss, l1, message):
    with pytest.raises(ValueError, match=message):
        penalty_share(network, loss, l1=l1)


def test_small_weights_need_weights_and_a_threshold(network):
    with pytest.raises(ValueError, match="ReLU has no weights of ConvNd, Linear layers"):
        small_weights(nn.ReLU())
    with pytest.raises(ValueError, match="below must be greater than 0"):
        small_weights(network, below=0)
