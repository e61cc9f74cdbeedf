"""What is found by trial is what the table of norms says, for layers of one's own as well."""

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.norms import NORMS

SHAPE = (3, 4, 2, 2)


def expected(kind: str, groups: int) -> torch.Tensor:
    """The number of the mean that each element belongs to, from the table."""
    images, channels, height, width = SHAPE
    averaged = NORMS[kind].averaged
    image = torch.arange(images).view(-1, 1, 1, 1) * ("N" not in averaged)
    if "C/G" in averaged:
        channel = torch.arange(channels) // (channels // groups)
    else:
        channel = torch.arange(channels) * ("C" not in averaged)
    numbers = image * channels + channel.view(1, -1, 1, 1)
    return numbers.expand(images, channels, height, width)


def same_partition(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.flatten(), other.flatten()
    return torch.equal(one[:, None] == one, other[:, None] == other)


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "none"])
def test_each_norm_shares_what_the_table_says(kind):
    for groups in (1, 2, 4) if kind == "gn" else (1,):
        layer = nl.make_norm(kind, 4, groups=groups, size=(2, 2))
        found = nl.shared_statistics(layer, SHAPE)
        assert same_partition(found, expected(kind, groups))
        assert found.unique().tolist() == list(range(NORMS[kind].statistics(SHAPE, groups=groups)))


@pytest.mark.parametrize(
    ("layer", "training"),
    [(nn.Identity(), True), (nn.ReLU(), True), (nn.Dropout(0.5), True), (nn.BatchNorm2d(4), False)],
)
def test_without_shared_statistics_each_element_is_alone(layer, training):
    found = nl.shared_statistics(layer, SHAPE, training=training)
    assert torch.equal(found.flatten(), torch.arange(found.numel()))


class ChannelsOnly(nn.Module):
    """The layer normalization of ConvNeXt: each position over its channels."""

    def forward(self, x):
        return nn.functional.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)


class Ghost(nn.Module):
    """Batch normalization over two images at a time."""

    def forward(self, x):
        return torch.cat([nl.batch_norm(part) for part in x.split(2)])


def test_layers_of_ones_own():
    shape = (4, 3, 2, 2)
    n, c, h, w = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    found = nl.shared_statistics(ChannelsOnly(), shape)
    assert same_partition(found, n * 4 + h * 2 + w)
    assert same_partition(nl.shared_statistics(Ghost(), shape), n // 2 * 3 + c)


class RowsOnly(nn.Module):
    """Each row of pixels by itself, without an epsilon: two numbers always become ±const."""

    def forward(self, x):
        return (x - x.mean(3, keepdim=True)) / x.std(3, keepdim=True)


class CastsInside(nn.GroupNorm):
    """Half-precision networks normalise in float32, whatever they are given."""

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class PlainScale(nn.Module):
    """A scale that is no parameter does not follow the layer into float64."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4)

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.scale, None, True)


def test_sets_of_two_numbers_without_an_epsilon():
    shape = (4, 4, 2, 2)
    rows = torch.arange(32).view(4, 4, 2, 1).expand(shape)
    assert same_partition(nl.shared_statistics(RowsOnly(), shape), rows)


@pytest.mark.parametrize(
    ("layer", "kind"), [(CastsInside(2, 4), "gn"), (PlainScale(), "bn")], ids=["cast", "plain"]
)
def test_layers_that_take_no_float64(layer, kind):
    assert same_partition(nl.shared_statistics(layer, SHAPE), expected(kind, 2))


def test_a_layer_that_takes_no_such_input_is_named():
    with pytest.raises(ValueError, match=r"Linear takes no input of shape \(3, 4, 2, 2\): mat1"):
        nl.shared_statistics(nn.Linear(5, 5), SHAPE)


def test_the_learned_numbers_hide_nothing():
    """Scales of 0, with which some networks begin, and a shift beside which a scale is lost."""
    batch, group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    with torch.no_grad():
        batch.weight.zero_()
        group.weight[1:] = 0
    assert same_partition(nl.shared_statistics(batch, SHAPE), expected("bn", 1))
    assert same_partition(nl.shared_statistics(group, SHAPE), expected("gn", 2))
    with torch.no_grad():
        batch.weight.copy_(torch.tensor([1e-9, 1, 1, 1]))
        batch.bias[1] = 10
    assert same_partition(nl.shared_statistics(batch, SHAPE), expected("bn", 1))


def test_what_is_no_layer_or_no_shape_is_refused():
    with pytest.raises(TypeError, match="a layer must be a Module, not 'bn'"):
        nl.shared_statistics("bn", SHAPE)
    with pytest.raises(TypeError, match=r"shape must be a tuple, not 4"):
        nl.shared_statistics(nn.BatchNorm2d(4), 4)


def test_the_layer_and_the_random_state_are_left_as_they_were():
    layer = nn.BatchNorm2d(4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    nl.shared_statistics(layer, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert layer.weight.dtype == torch.float32


def test_a_layer_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"turns shape \(3, 4, 2, 2\) into \(3, 4, 1, 1\)"):
        nl.shared_statistics(nn.AvgPool2d(2), SHAPE)
