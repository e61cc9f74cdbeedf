"""Muon against torch's own and singular values; gradient centralization by a projection."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab as nl
from normlab.optimizers import PLAIN_FACTOR, Muon, centralize_gradients, filters, orthogonalized
from normlab.penalties import l1_penalty
from normlab.support import filter_banks


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 5)).double()


def muon_for(network: nn.Module, **settings) -> Muon:
    orthogonal, *plain = network.parameters()
    return Muon([orthogonal], plain, **settings)


def give_gradients(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (8,), generator=generator)
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()


@pytest.mark.parametrize("shape", [(8, 72), (16, 16), (64, 9), (1, 12)])
def test_orthogonalized_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalized(matrix) @ v.T
    assert torch.allclose(inner, inner.diag().diag(), atol=1e-10)
    assert inner.diag().min() > 0.5
    assert inner.diag().max() < 1.25


def test_orthogonalized_of_nothing_is_nothing():
    assert not orthogonalized(torch.zeros(3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare")
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_muon_takes_the_steps_of_torchs_own(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [Muon([mine], [], **settings), torch.optim.Muon([theirs], **settings)]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.02 * moved  # torch's iterates in bfloat16


def test_muon_steps_by_nesterov_where_it_does_not_orthogonalise():
    network, reference = small_network(), small_network()
    muon = muon_for(network, lr=0.02, momentum=0.8, weight_decay=0.3)
    plain = [reference[1].weight, reference[1].bias, reference[4].weight, reference[4].bias]
    sgd = torch.optim.SGD(plain, lr=PLAIN_FACTOR * 0.02, momentum=0.8, nesterov=True)
    for step in range(3):
        give_gradients(network, step)
        for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        muon.step()
        sgd.step()
    for layer in (1, 4):
        assert torch.allclose(network[layer].weight, reference[layer].weight, atol=1e-12)
        assert torch.allclose(network[layer].bias, reference[layer].bias, atol=1e-12)


def test_a_rate_may_be_a_tensor_and_the_layout_any():
    networks = [small_network(), small_network().to(memory_format=torch.channels_last)]
    for network, rate in zip(
        networks, (0.02, torch.tensor(0.02, dtype=torch.float64)), strict=True
    ):
        optimizer = muon_for(network, lr=rate, weight_decay=0.1)
        for step in range(3):
            give_gradients(network, step)
            optimizer.step()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln-elementwise"])
def test_filters_are_the_convolutions_but_that_of_the_logits(norm):
    network = nl.build_network("cifar10-norms", norm, seed=0)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert list(map(id, filters(network))) == [id(layer.weight) for layer in convolutions[:-1]]


def test_shared_filters_count_once_and_transposed_ones_not():
    shared = nn.Conv2d(4, 4, 3)
    layers = [nn.Conv2d(1, 4, 3), shared, shared, nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 2)]
    twin = nn.Conv2d(4, 4, 3)
    twin.weight = shared.weight
    found = filters(nn.Sequential(*layers[:3], twin, *layers[3:]))
    assert list(map(id, found)) == [id(layers[0].weight), id(shared.weight)]


def test_frozen_filters_are_left_out():
    network = small_network()
    assert [id(weight) for weight in filters(network)] == [id(network[0].weight)]
    network[0].requires_grad_(False)
    assert filters(network) == []


def test_scales_of_an_elementwise_layer_norm_keep_their_mean():
    network = nl.build_network("mnist-eva6", "ln-elementwise", dropout=0.0, seed=0)
    recipe = nl.Recipe(optimizer="muon", lr=0.01, centred=True)
    optimizer = nl.recipes.make_optimizer(network, recipe)
    F.cross_entropy(network(torch.rand(4, 1, 28, 28)), torch.arange(4)).backward()
    optimizer.step()
    scales = [layer.weight for layer in network.modules() if isinstance(layer, nn.LayerNorm)]
    assert scales
    assert all(scale.mean() > 0.9 for scale in scales)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_centred_filters_have_no_mean_and_others_are_left(optimizer):
    network = small_network()
    recipe = nl.Recipe(optimizer=optimizer, lr=0.01, weight_decay=0.01, centred=True)
    stepper = nl.recipes.make_optimizer(network, recipe)
    for step in range(3):
        give_gradients(network, step)
        stepper.step()
    assert network[0].weight.mean(dim=(1, 2, 3)).abs().max() < 1e-15
    assert network[4].weight.mean(dim=1).abs().min() > 1e-6


def test_centred_sgd_is_sgd_projected_on_filters_without_mean():
    network, reference = small_network(), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    centralize_gradients(optimizer, filters(network))
    inner = 2 * 3 * 3
    projection = torch.eye(inner).double() - 1 / inner  # takes the mean off a filter of 18 weights
    speed = torch.zeros(6, inner).double()
    for step in range(3):
        give_gradients(network, step)
        weight = reference[0].weight.detach().flatten(1)
        gradient = network[0].weight.grad.flatten(1)
        speed = 0.9 * speed + gradient @ projection + 0.01 * weight
        optimizer.step()
        with torch.no_grad():
            reference[0].weight.copy_(((weight - 0.1 * speed) @ projection).view(6, 2, 3, 3))
    assert torch.allclose(network[0].weight, reference[0].weight, atol=1e-12)


@pytest.fixture
def in_one_batch(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(filter_banks, "ONE_BY_ONE", ())


def three_steps(optimizer: str, layout: torch.memory_format) -> nn.Module:
    """Banks that are wide and tall, of one input channel, of 1×1 and of a linear layer."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 12, 3), nn.Conv2d(12, 20, 1), nn.ReLU(), nn.Conv2d(20, 4, 3)]
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 40), nn.Linear(40, 5))
    network = network.double().to(memory_format=layout)
    recipe = nl.Recipe(optimizer=optimizer, lr=0.02, weight_decay=0.1, centred=True, momentum=0.9)
    stepper = nl.recipes.make_optimizer(network, recipe)
    images = torch.randn(8, 1, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    for _ in range(3):
        network.zero_grad()
        (F.cross_entropy(network(images), torch.arange(8) % 5) + l1_penalty(network)).backward()
        stepper.step()
    return network


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_filters_in_one_batch_move_as_one_by_one(optimizer, layout, request):
    one_by_one = three_steps(optimizer, layout)
    request.getfixturevalue("in_one_batch")
    together = three_steps(optimizer, layout)
    for one, other in zip(one_by_one.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.stride() == other.stride()
