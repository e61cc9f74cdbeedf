"""Quick dropout: its rate, its gradient, and that it leaves nothing behind."""

import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.engines.dropout import dropout, quick_dropout


@pytest.mark.parametrize("probability", [0.02, 0.05, 0.3, 0.5, 0.9])
def test_the_mask_drops_at_its_rate_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    count = 2**20
    x = dropout(torch.ones(count), probability)
    dropped = (x == 0).float().mean().item()
    error = math.sqrt(probability * (1 - probability) / count)
    assert dropped == pytest.approx(probability, abs=4 * error + 2**-16)
    assert x[x != 0].unique().item() == pytest.approx(1 / (1 - probability), rel=1e-4)


def test_the_masks_elements_are_independent():
    torch.manual_seed(0)
    count, p = 2**20, 0.25
    keep = (dropout(torch.ones(count), p) != 0).double()
    centred = (keep - keep.mean()) / keep.std()
    # Lags within one draw of 64 bits (1 to 3), across draws, and across the rows of an image.
    for lag in (1, 2, 3, 4, 5, 8, 32, 1024):
        correlation = (centred[:-lag] * centred[lag:]).mean().abs().item()
        assert correlation < 5 / math.sqrt(count), lag
    for lane in range(4):  # none of the four elements of a draw has another rate
        rate = 1 - keep[lane::4].mean().item()
        assert rate == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / (count / 4)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_dropout_is_its_mask(layout):
    torch.manual_seed(0)
    x = torch.rand(4, 6, 5, 5).contiguous(memory_format=layout).requires_grad_()
    y = dropout(x, 0.4)
    y.backward(torch.full_like(y, 2.0))
    kept = y != 0
    assert torch.allclose(x.grad, kept * 2 / 0.6, rtol=1e-4)
    assert torch.allclose(y, kept * x / 0.6, rtol=1e-4)
    assert 0.3 < 1 - kept.float().mean() < 0.5


class DroppingInPlace(nn.Module):
    """Uses the tensor that went into its dropout, and not what the dropout returned."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = 2 * x
        self.layer(y)
        return y


def test_dropout_in_place_changes_what_it_is_given():
    torch.manual_seed(0)
    x = torch.ones(64, 32, 4, 4, requires_grad=True)
    network = DroppingInPlace(nn.Dropout(0.4, inplace=True))
    with quick_dropout(network):
        y = network(x)
    y.sum().backward()
    assert 0.3 < (y == 0).float().mean() < 0.5
    assert torch.allclose(x.grad, y.detach(), rtol=1e-4)


@pytest.mark.parametrize("probability", [0.999995, 1.0])
def test_a_layer_that_drops_about_everything_is_torch_s(probability):
    layer = nn.Dropout(probability)
    with quick_dropout(layer):
        assert (layer(torch.ones(1000)) == 0).float().mean() > 0.99


@pytest.mark.parametrize("probability", [0.02, 0.05])
def test_in_half_precision_the_mean_stays_as_exactly(probability):
    x = torch.ones(2**20, dtype=torch.bfloat16)
    kept = dropout(x, probability)
    assert kept.dtype == torch.bfloat16
    whole = dropout(x.float(), probability)
    assert torch.equal(whole[whole != 0].bfloat16().unique(), kept[kept != 0].unique())


def test_dropout_is_put_back_after_training(few_digits):
    network = nl.build_network("mnist-l1", dropout=0.2, seed=0)
    nl.fit(network, few_digits, nl.Recipe(epochs=1), device="cpu", progress=False)
    assert all("forward" not in vars(layer) for layer in network.modules())
