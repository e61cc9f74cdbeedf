"""`make_norm` and the table of norms, against torch."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab import NORMS, group_norm, make_norm
from normlab.norms import is_norm

REAL_NORMS = ("bn", "ln", "gn", "ln-elementwise", "in")

TORCH = {
    "bn": lambda x, weight, bias, groups: F.batch_norm(x, None, None, weight, bias, training=True),
    "ln": lambda x, weight, bias, groups: F.group_norm(x, 1, weight, bias),
    "gn": lambda x, weight, bias, groups: F.group_norm(x, groups, weight, bias),
    "ln-elementwise": lambda x, weight, bias, groups: F.layer_norm(x, x.shape[1:], weight, bias),
    "in": lambda x, weight, bias, groups: F.instance_norm(x, weight=weight, bias=bias),
}


def drawn_cases(count: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Groups and shapes (N, C, H, W) with at least two positions, a third of batch size 1."""
    draw = random.Random(20)
    cases = []
    for index in range(count):
        groups = draw.randint(1, 4)
        batch = 1 if index % 3 == 0 else draw.randint(2, 6)
        shape = (batch, groups * draw.randint(1, 4), draw.randint(1, 6), draw.randint(2, 7))
        cases.append((groups, shape))
    return cases


CASES = drawn_cases(6)


def numbers(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Random float64 whose mean is far from 0, so that forgetting the mean shows."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64) + 3


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("groups", "shape"), CASES, ids=str)
@pytest.mark.parametrize("kind", REAL_NORMS)
def test_make_norm_is_the_layer_of_its_name(kind, groups, shape):
    layer = make_norm(kind, shape[1], groups=groups, size=shape[2:]).double()
    assert_close(layer(numbers(*shape)), TORCH[kind](numbers(*shape), None, None, groups))


def test_no_norm_hands_its_input_on():
    x = numbers(2, 3, 4, 4)
    assert torch.equal(make_norm("none", 3)(x), x)


ALIASES = {
    "bn": "BN b B batch BatchNorm BatchNorm2d batchnorm2d batch_norm batch-normalization",
    "ln": "LN l L layer LayerNorm layer_norm",
    "gn": "GN g G group GroupNorm group_norm group-norm",
    "ln-elementwise": "LN-Elementwise ln_elementwise layer_norm_elementwise",
    "in": "IN i instance InstanceNorm2d instance_norm",
    "none": "NONE None no identity",
}


@pytest.mark.parametrize("kind", NORMS)
def test_other_names_of_a_norm_make_the_same_layer(kind):
    layer = make_norm(kind, 8, groups=2, size=(3, 3))
    for alias in ALIASES[kind].split():
        assert repr(make_norm(alias, 8, groups=2, size=(3, 3))) == repr(layer), alias


@pytest.mark.parametrize("kind", REAL_NORMS)
def test_every_norm_adds_the_same_epsilon(kind):
    # ±d has mean 0 and variance d² over whatever a norm averages, and d² is about epsilon
    d = 3e-3
    x = torch.tensor([d, -d], dtype=torch.float64).repeat(2, 4, 3, 2)
    layer = make_norm(kind, 4, groups=2, size=(3, 4)).double()
    assert_close(layer(x), x / (d**2 + 1e-5) ** 0.5)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 3), (3, 6, 1, 2)])
def test_table_counts_the_parameters_of_the_layers(kind, shape):
    layer = make_norm(kind, shape[1], groups=2, size=shape[2:])
    assert NORMS[kind].parameters(shape) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", REAL_NORMS)
def test_table_counts_the_means_of_the_layers(kind, groups):
    shape = (2, 4, 2, 3)
    layer = make_norm(kind, 4, groups=groups, size=(2, 3)).double()
    jacobian = torch.autograd.functional.jacobian(layer, numbers(*shape)).reshape(48, 48)
    # An output depends on those inputs alone with which it shares a mean.
    sets_with_one_mean = (jacobian.abs() > 1e-12).unique(dim=0)
    assert NORMS[kind].statistics(shape, groups=groups) == len(sets_with_one_mean)


def test_no_norm_has_no_means():
    assert NORMS["none"].statistics((2, 4, 2, 3), groups=2) == 0


@pytest.mark.parametrize("kind", NORMS)
def test_table_says_which_norms_look_at_the_other_images(kind):
    layer = make_norm(kind, 4, groups=2, size=(2, 3)).double()
    x, y = numbers(2, 4, 2, 3), numbers(2, 4, 2, 3)
    y[1] *= 2
    depends = not torch.equal(layer(x)[0], layer(y)[0])
    assert ("N" in NORMS[kind].averaged) == depends


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("batchnrom", "bn"), ("layernrm", "ln"), ("group-nom", "gn"), ("instnce_norm", "in")],
)
def test_unknown_norm_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown norm '{typed}'.* bn, ln, gn") as raised:
        make_norm(typed, 8)
    suggested = str(raised.value).rpartition("did you mean ")[2].strip("'?")
    assert repr(make_norm(suggested, 8, groups=2)) == repr(make_norm(meant, 8, groups=2))


# A number of groups inside the name must not be dropped in silence.
@pytest.mark.parametrize("typed", ["", "xyz", "gn4", "group8"])
def test_what_is_no_name_of_a_norm_is_refused(typed):
    with pytest.raises(ValueError, match="unknown norm"):
        make_norm(typed, 8, groups=2)


@pytest.mark.parametrize("kind", [None, 3, nn.BatchNorm2d])
def test_norm_that_is_no_text_is_refused(kind):
    with pytest.raises(TypeError, match="by its name"):
        make_norm(kind, 8)


@pytest.mark.parametrize(
    "split",
    [
        lambda groups: make_norm("gn", 12, groups=groups),
        lambda groups: group_norm(torch.rand(2, 12, 3, 3), groups),
    ],
    ids=["make_norm", "group_norm"],
)
def test_groups_that_do_not_divide_name_those_that_do(split):
    with pytest.raises(ValueError, match=r"groups=5 .* 12 channels: .* 1, 2, 3, 4, 6, 12$"):
        split(5)


@pytest.mark.parametrize(
    ("groups", "error"),
    [(None, ValueError), (0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_bad_number_of_groups_is_refused(groups, error):
    with pytest.raises(error, match="groups"):
        make_norm("gn", 8, groups=groups)


@pytest.mark.parametrize("size", [None, 28, (28,)])
def test_elementwise_needs_both_sides(size):
    with pytest.raises((TypeError, ValueError), match="size"):
        make_norm("ln-elementwise", 8, size=size)


@pytest.mark.parametrize(("channels", "error"), [(0, ValueError), (8.0, TypeError)])
def test_bad_number_of_channels_is_refused(channels, error):
    with pytest.raises(error, match="channels"):
        make_norm("bn", channels)


def test_what_has_norm_in_its_name_is_none_if_it_normalizes_weights_or_holds_layers():
    class BN(nn.BatchNorm1d):
        """As the network of one's own may call it."""

    weights = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)).parametrizations.weight[0]
    block = nn.Sequential()
    block.add_module("norm", nn.BatchNorm2d(4))
    found = [is_norm(layer) for layer in (BN(4), nn.RMSNorm(4), weights, block, nn.Conv2d(1, 4, 3))]
    assert found == [True, True, False, False, False]
