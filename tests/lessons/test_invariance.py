"""Weights before a norm may be multiplied: against the formula and against plain autograd."""

import math

import pytest
import torch
from torch import nn

import normlab as nl

NORMS = ("bn", "gn", "ln", "in")


def block(norm: str, *, eps: float, relu: bool = False, bias: bool = False) -> nn.Sequential:
    """Convolution, perhaps a ReLU, norm, in float64."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 6, 3, bias=bias)
    layer = nl.make_norm(norm, 6, groups=3)
    if norm != "none":
        layer.eps = eps
    return nn.Sequential(convolution, *([nn.ReLU()] if relu else []), layer).double()


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("factor", "relu"), [(10.0, False), (0.5, True)])
@pytest.mark.parametrize("norm", NORMS)
def test_output_stays_and_the_gradient_shrinks_by_the_factor(norm, factor, relu):
    found = nl.rescale_weights(block(norm, eps=1e-18, relu=relu), images(), factor=factor)
    assert found.layer == "0"
    assert found.factor == factor
    assert found.output_change < 1e-9
    assert found.gradient_ratio == pytest.approx(1 / factor, rel=1e-6)
    assert found.gradient_cosine == pytest.approx(1, abs=1e-9)


ONE, GROUP, ALL = [0], range(2), range(6)  # of six filters in three groups


@pytest.mark.parametrize(
    ("norm", "filters", "stays"),
    [
        *(("bn", filters, True) for filters in (ONE, GROUP, ALL)),
        *(("in", filters, True) for filters in (ONE, GROUP, ALL)),
        *(("gn", filters, filters is not ONE) for filters in (ONE, GROUP, ALL)),
        *(("ln", filters, filters is ALL) for filters in (ONE, GROUP, ALL)),
        ("gn", [1, 2], False),  # two filters, but of two groups
        ("none", ONE, False),
    ],
)
def test_what_shares_a_standard_deviation_may_be_multiplied(norm, filters, stays):
    network = block(norm, eps=1e-18)
    longer = block(norm, eps=1e-18)
    with torch.no_grad():
        longer[0].weight[list(filters)] *= 10
        before, after = network(images()), longer(images())
    found = nl.rescale_weights(network, images(), filters=filters)
    change = ((after - before).abs().max() / before.abs().max()).item()
    assert found.output_change == pytest.approx(change, abs=1e-12)
    assert (found.output_change < 1e-9) == stays
    assert found.output_change < 1e-9 or found.output_change > 0.5
    if stays:
        assert found.gradient_ratio == pytest.approx(0.1, rel=1e-6)
        assert found.gradient_cosine == pytest.approx(1, abs=1e-9)


def test_without_filters_all_are_multiplied():
    network = block("gn", eps=1e-5)
    everything = nl.rescale_weights(network, images(), filters=range(6))
    assert nl.rescale_weights(network, images()) == everything


@pytest.mark.parametrize("norm", NORMS)
def test_plain_autograd_agrees(norm):
    network = block(norm, eps=1e-5)
    weighting = torch.randn(5, 6, 6, 6, dtype=torch.float64)
    gradients = []
    for scale in (1, 10):
        weight = (scale * network[0].weight).detach().requires_grad_()
        output = network[1](torch.conv2d(images(), weight))
        gradients += torch.autograd.grad((output * weighting).sum(), weight)
    by_hand = (gradients[1].norm() / gradients[0].norm()).item()
    found = nl.rescale_weights(network, images())
    # Another weighting of the outputs, so that they differ by what epsilon does.
    assert found.gradient_ratio == pytest.approx(by_hand, rel=1e-3)
    assert found.gradient_ratio == pytest.approx(0.1, rel=1e-2)
    assert 0 < found.output_change < 1e-2


def test_epsilon_lets_the_output_grow_as_the_docstring_says():
    network = block("bn", eps=0.5)
    with torch.no_grad():
        network[0].weight[1:] = network[0].weight[0]  # one variance for all channels
        variance = network[0](images())[:, 0].var(correction=0).item()
    grown = math.sqrt((variance + 0.5) / (variance + 0.5 / 100))
    assert nl.rescale_weights(network, images()).output_change == pytest.approx(grown - 1, rel=1e-9)


def test_without_a_norm_the_output_grows_and_the_gradient_stays():
    found = nl.rescale_weights(block("none", eps=0), images())
    assert found.output_change == pytest.approx(9)
    assert found.gradient_ratio == pytest.approx(1)


@pytest.mark.parametrize(("norm", "removed"), [("bn", True), ("in", True), ("gn", False)])
def test_only_means_of_single_channels_remove_a_bias(norm, removed):
    found = nl.rescale_weights(block(norm, eps=1e-18, bias=True), images())
    assert (found.output_change < 1e-9) == removed


@pytest.mark.parametrize("norm", NORMS)
def test_no_norm_removes_a_bias_behind_which_a_relu_stands(norm):
    network = block(norm, eps=1e-18, relu=True, bias=True)
    assert nl.rescale_weights(network, images()).output_change > 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_a_whole_network_with_dropout_is_tried_and_left_as_it_is(norm):
    network = nl.build_network("mnist-l1", norm, dropout=0.3, seed=0).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    some = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    found = nl.rescale_weights(network, some, layer="1.0")
    assert torch.equal(torch.get_rng_state(), state)
    assert found.layer == "1.0"
    assert found.output_change < 0.05  # the same dropout, and epsilon
    assert found.gradient_ratio == pytest.approx(0.1, rel=0.05)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "Linear has no convolution, whose weights"),
        (nn.Conv2d(2, 2, 1), {"layer": "3"}, "Conv2d has no layer '3' with a weight, whose"),
        (nn.Conv2d(2, 2, 1), {"factor": 0}, "factor must be greater than 0, not 0"),
        (nn.Conv2d(2, 2, 1), {"filters": [2]}, "numbers from 0 to 1, as layer '' has 2 of them"),
        (nn.Conv2d(2, 2, 1), {"filters": []}, r"numbers from 0 to 1.*, not \[\]"),
        (nn.Conv2d(2, 2, 1), {"filters": [-1]}, "a filter must be at least 0, not -1"),
    ],
)
def test_bad_input_gets_one_sentence(network, options, message):
    with pytest.raises(ValueError, match=message):
        nl.rescale_weights(network, torch.zeros(2, 2, 4, 4), **options)


def test_without_images_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="at least one image"):
        nl.rescale_weights(nn.Conv2d(2, 2, 1), torch.zeros(0, 2, 4, 4))


@pytest.mark.parametrize("filters", ["0", [0.5]])
def test_filters_are_whole_numbers(filters):
    with pytest.raises(TypeError, match=r"a filter must be a whole number, not ('0'|0\.5)"):
        nl.rescale_weights(nn.Conv2d(2, 2, 1), torch.zeros(2, 2, 4, 4), filters=filters)
