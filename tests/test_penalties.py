"""The L1 penalty against a sum in plain Python."""

import pytest
import torch
from torch import nn

from normlab import build_network, l1_penalty


def plain_sum(*weights: torch.Tensor) -> float:
    return sum(abs(value) for weight in weights for value in weight.flatten().tolist())


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution, a norm and a linear layer, with biases and some weights exactly 0."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    with torch.no_grad():
        network[0].weight[0, 0, 0] = 0.0
        network[1].weight.copy_(torch.tensor([2.0, -3.0]))
    return network


def test_penalty_is_the_sum_over_convolution_and_linear_weights(network):
    expected = plain_sum(network[0].weight, network[3].weight)
    assert l1_penalty(network).item() == pytest.approx(expected, rel=1e-12)
    assert l1_penalty(network).shape == ()


def test_gradient_is_the_sign_of_the_weights_alone(network):
    l1_penalty(network).backward()
    for layer in (network[0], network[3]):
        expected = [(value > 0) - (value < 0) for value in layer.weight.flatten().tolist()]
        assert layer.weight.grad.flatten().tolist() == expected
        assert layer.bias.grad is None
    assert network[1].weight.grad is None


@pytest.mark.parametrize(
    ("layers", "counted"),
    [((nn.Module,), [0, 1, 3]), ((nn.Linear,), [3]), ((nn.BatchNorm2d, nn.Conv2d), [0, 1])],
)
def test_layers_chooses_whose_weights_count(network, layers, counted):
    expected = plain_sum(*(network[index].weight for index in counted))
    assert l1_penalty(network, layers=layers).item() == pytest.approx(expected, rel=1e-12)


def test_shared_layers_and_shared_weights_count_once():
    first, second = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    second.weight = first.weight
    shared = nn.Sequential(first, first, second)
    assert l1_penalty(shared).item() == pytest.approx(plain_sum(first.weight), rel=1e-5)


def test_norm_does_not_change_the_penalty_of_a_network():
    norms = ("bn", "ln", "gn", "ln-elementwise", "none")
    penalties = {norm: l1_penalty(build_network("mnist-l1", norm, seed=0)).item() for norm in norms}
    assert len(set(penalties.values())) == 1


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (nn.Conv2d, nn.Linear)),
        (nn.Linear(2, 2), (nn.Conv2d,)),
        (nn.InstanceNorm2d(3), (nn.Module,)),  # its weight is None
    ],
)
def test_nothing_to_penalise_is_an_error(network, layers):
    with pytest.raises(ValueError, match=f"{type(network).__name__} has no weights of"):
        l1_penalty(network, layers=layers)


def test_over_all_every_trained_parameter_counts():
    network = build_network("mnist-l1", "bn", seed=0)
    network.get_parameter(next(iter(dict(network.named_parameters())))).requires_grad_(False)
    expected = sum(w.detach().abs().sum().item() for w in network.parameters() if w.requires_grad)
    assert l1_penalty(network, over="all").item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="unknown l1_over 'everything'"):
        l1_penalty(network, over="everything")
