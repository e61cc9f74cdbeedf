"""The normalizations written by hand against torch, and the batch that they are shown on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab as nl
from normlab import batch_norm, group_norm, instance_norm, layer_norm
from tests.test_norms import CASES, REAL_NORMS, TORCH, assert_close, numbers

BY_HAND = {
    "bn": lambda x, weight, bias, groups: batch_norm(x, weight, bias),
    "ln": lambda x, weight, bias, groups: layer_norm(x, weight, bias),
    "gn": lambda x, weight, bias, groups: group_norm(x, groups, weight, bias),
    "ln-elementwise": lambda x, weight, bias, groups: layer_norm(x, weight, bias),
    "in": lambda x, weight, bias, groups: instance_norm(x, weight, bias),
}


def forward_and_gradients(norm, *tensors):
    """The output, and the gradients of a random weighting of it with respect to `tensors`."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = norm(*leaves)
    gradients = torch.autograd.grad((output * numbers(*output.shape, seed=9)).sum(), leaves)
    return [output, *gradients]


@pytest.mark.parametrize("kind", REAL_NORMS)
def test_by_hand_equals_torch_forward_and_backward(kind):
    for groups, shape in CASES:
        affine = shape[1:] if kind == "ln-elementwise" else shape[1:2]
        tensors = numbers(*shape), numbers(*affine, seed=1), numbers(*affine, seed=2)
        by_hand, reference = (
            forward_and_gradients(lambda *given, norm=norm, g=groups: norm(*given, g), *tensors)
            for norm in (BY_HAND[kind], TORCH[kind])
        )
        assert_close(by_hand, reference)


@pytest.mark.parametrize("kind", REAL_NORMS)
def test_by_hand_without_scale_and_shift_equals_torch(kind):
    x = numbers(3, 4, 2, 5)
    assert_close(
        forward_and_gradients(lambda x: BY_HAND[kind](x, None, None, 2), x),
        forward_and_gradients(lambda x: TORCH[kind](x, None, None, 2), x),
    )


@pytest.mark.parametrize(("groups", "shape"), [*CASES, (1, (4, 3, 1, 1)), (1, (1, 3, 1, 1))])
def test_batch_norm_in_evaluation_equals_torch_and_keeps_the_statistics(groups, shape):
    channels = shape[1]
    mean, variance = numbers(channels, seed=3), numbers(channels, seed=4).abs() + 0.1
    kept = mean.clone(), variance.clone()
    tensors = numbers(*shape), numbers(channels, seed=1), numbers(channels, seed=2)

    def by_hand(x, weight, bias):
        statistics = {"running_mean": mean, "running_var": variance}
        return batch_norm(x, weight, bias, **statistics, training=False)

    def reference(x, weight, bias):
        return F.batch_norm(x, *kept, weight, bias, training=False)

    assert_close(
        forward_and_gradients(by_hand, *tensors), forward_and_gradients(reference, *tensors)
    )
    assert_close((mean, variance), kept)


@pytest.mark.parametrize(
    ("shape", "momentum"), [((4, 3, 2, 5), 0.1), ((1, 3, 1, 2), 0.7), ((2, 3, 1, 1), 1.0)]
)
def test_running_statistics_follow_torch_over_several_batches(shape, momentum):
    layer = nn.BatchNorm2d(shape[1], momentum=momentum).double()
    mean = torch.zeros(shape[1], dtype=torch.float64)
    variance = torch.ones(shape[1], dtype=torch.float64)
    for seed in range(4):
        x = numbers(*shape, seed=seed).requires_grad_()
        by_hand = batch_norm(x, running_mean=mean, running_var=variance, momentum=momentum)
        assert_close(by_hand, layer(x))
    assert_close((mean, variance), (layer.running_mean, layer.running_var))
    assert not mean.requires_grad
    assert not variance.requires_grad


def test_running_statistics_worked_out_on_paper():
    mean, variance = torch.zeros(1), torch.ones(1)
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    out = batch_norm(x, running_mean=mean, running_var=variance)
    # mean 2; the variance is 1 over n = 2 for the batch itself and 2 over n − 1 for what is kept
    assert mean.item() == pytest.approx(0.9 * 0 + 0.1 * 2)
    assert variance.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert out.flatten().tolist() == pytest.approx([-1, 1], abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 1, 1, 1)])
def test_one_value_a_channel_has_no_batch_statistics(shape):
    with pytest.raises(ValueError, match="one value a channel"):
        batch_norm(torch.rand(shape))


def test_evaluation_without_running_statistics_says_what_is_missing():
    with pytest.raises(ValueError, match="running_mean"):
        batch_norm(torch.rand(2, 3, 4, 4), training=False)


@pytest.mark.parametrize("kind", REAL_NORMS)
def test_by_hand_adds_torchs_epsilon(kind):
    x = numbers(2, 4, 3, 2, spread=1e-3)
    assert_close(BY_HAND[kind](x, None, None, 2), TORCH[kind](x, None, None, 2))


# --- the worked example --------------------------------------------------------------------------

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
