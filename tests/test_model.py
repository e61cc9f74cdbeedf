"""The networks against the tables that the assignments printed, and what can be changed in them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from normlab import NETWORKS, build_network, make_norm
from normlab.support.summaries import count_parameters, multiply_adds

# A line for every convolution (C) and pooling (M 2×2, G global), with the shape that it leaves and
# what follows it: normalization (N), ReLU (R), dropout (D); each with its parameters, if any.
ROWS = {
    "mnist-l1": """
        10x26x26 C90 R N20 D
        20x24x24 C1800 R N40 D
        10x24x24 C200
        10x12x12 M
        20x10x10 C1800 R N40 D
        10x8x8 C1800 R N20 D
        10x6x6 C900 R N20 D
        10x6x6 C900 R N20 D
        10x1x1 G
        10x1x1 C100
    """,
    "mnist-eva6": """
        8x26x26 C72 R N16 D
        10x24x24 C720 R N20 D
        10x12x12 M
        12x10x10 C1080 R N24 D
        14x8x8 C1512 R N28 D
        16x8x8 C2016 R N32 D
        16x6x6 C2304 R N32 D
        16x1x1 G
        10x1x1 C160
    """,
    "cifar10-norms": """
        8x32x32 C216 N16 R D
        16x32x32 C1152 N32 R D
        8x32x32 C128
        8x16x16 M
        16x16x16 C1152 N32 R D
        32x16x16 C4608 N64 R D
        32x16x16 C9216 N64 R D
        8x16x16 C256
        8x8x8 M
        16x8x8 C1152 N32 R D
        32x8x8 C4608 N64 R D
        64x8x8 C18432 N128 R D
        64x1x1 G
        10x1x1 C640
    """,
    "cifar10-add": """
        16x32x32 C432 R N32
        32x32x32 C4608 R N64
        16x32x32 C512 R
        16x16x16 M
        16x16x16 C2304 R N32
        16x16x16 C2304 R N32
        32x16x16 C4608 R N64
        16x16x16 C512 R
        16x8x8 M
        16x8x8 C2304 R N32
        16x8x8 C2304 R N32
        16x8x8 C2304 R N32
        16x1x1 G
        10x1x1 C160
    """,
    # Its table shows no ReLU in the bottlenecks; here they come after the inner norms and the sum.
    "cifar10-skip": """
        8x32x32 C216 R N16 D
        16x32x32 C1152 R N32 D
        8x32x32 C128 R D
        8x16x16 M
        16x16x16 C1152 N32 R D
        24x16x16 C3456 N48 R D
        32x16x16 C6912 N64
        32x16x16 C256 N64 R D
        8x16x16 C256 R D
        8x8x8 M
        16x8x8 C1152 N32 R D
        32x8x8 C4608 N64 R D
        48x8x8 C13824 N96
        48x8x8 C384 N96 R D
        48x1x1 G
        10x1x1 C480
    """,
}
PARAMETERS = {
    "mnist-l1": {"bn": 7_750, "ln": 7_750, "gn": 7_750},
    "mnist-eva6": {"bn": 8_016, "gn": 8_016, "ln-elementwise": 37_592},
    "cifar10-norms": {"bn": 41_992, "gn": 41_992, "ln-elementwise": 146_008},
    "cifar10-add": {"bn": 22_672, "gn": 22_672, "ln": 22_672},
    "cifar10-skip": {"bn": 34_520, "gn": 34_520, "ln": 34_520},
}
LETTERS = {
    "Conv2d": "C",
    "BatchNorm2d": "N",
    "GroupNorm": "N",
    "LayerNorm": "N",
    "ReLU": "R",
    "Dropout": "D",
    "Dropout2d": "D",
    "MaxPool2d": "M",
    "AdaptiveAvgPool2d": "G",
}  # Identity, Flatten and the modules that hold others compute nothing that the tables list


def lines(rows: str) -> list[str]:
    return [line.strip() for line in rows.strip().splitlines()]


def executed(network: nn.Module, images: torch.Tensor) -> list[str]:
    """The layers in the order in which they run, written as in `ROWS`."""
    ran = []

    def record(layer, inputs, output):
        letter = LETTERS.get(type(layer).__name__)
        parameters = sum(weight.numel() for weight in layer.parameters())
        if letter and letter in "CMG":
            ran.append("x".join(map(str, output.shape[1:])))
        if letter:
            ran[-1] += f" {letter}{parameters or ''}"

    handle = register_module_forward_hook(record)
    try:
        network(images)
    finally:
        handle.remove()
    return ran


def images_for(network: nn.Module, count: int = 2, dtype=torch.float32) -> torch.Tensor:
    shape = (count, *network.description["input_shape"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def dropouts(network: nn.Module) -> list[nn.Module]:
    return [
        layer for layer in network.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)
    ]


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
@pytest.mark.parametrize("name", ROWS)
def test_layers_run_as_in_the_assignments_table(name, norm):
    network = build_network(name, norm, seed=0)
    assert executed(network, images_for(network)) == lines(ROWS[name])


def test_layers_of_the_elementwise_table_of_cifar10_norms():
    network = build_network("cifar10-norms", "ln-elementwise", seed=0)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.LayerNorm)]
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in norms]
    assert sizes == [16_384, 32_768, 8_192, 16_384, 16_384, 2_048, 4_096, 8_192]


@pytest.mark.parametrize(
    ("name", "norm", "expected"),
    [(name, norm, total) for name in PARAMETERS for norm, total in PARAMETERS[name].items()],
)
def test_total_of_parameters_is_the_assignments(name, norm, expected):
    assert count_parameters(build_network(name, norm, seed=0)) == expected


@pytest.mark.parametrize(("name", "millions"), [("mnist-l1", 1.573), ("cifar10-skip", 5.89)])
def test_multiply_adds_are_those_of_the_assignments_table(name, millions):
    # mnist-l1 printed them for 20 images: 31.46 million, norms included
    network = build_network(name, seed=0)
    counted = multiply_adds(network, NETWORKS[name].input_shape)
    assert counted / 1e6 == pytest.approx(millions, abs=0.005)
    assert all(layer.training and not layer._forward_hooks for layer in network.modules())


def test_without_its_skips_cifar10_skip_loses_two_convolutions_and_their_norms():
    network = build_network("cifar10-skip", skip=False, seed=0)
    # The two lines of the skips go; ReLU and dropout, which follow the sum, stay.
    expected = re.sub(r"\n +\S+ C(256|384) N(64|96)(?= R)", "", ROWS["cifar10-skip"])
    assert executed(network, images_for(network)) == lines(expected)
    assert count_parameters(network) == 33_720


def written_out(network: nn.Module, x: torch.Tensor, *, name: str, groups: int, skip: bool):
    """The two networks with skips as plain functions, in evaluation with group normalization."""
    weights = iter(network.parameters())

    def conv(x):
        weight = next(weights)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def norm(x):
        return F.group_norm(x, groups, next(weights), next(weights))

    def block(x):
        return norm(conv(x).relu())

    def bottleneck(x):
        body = norm(conv(norm(conv(norm(conv(x)).relu())).relu()))
        return (body + norm(conv(x)) if skip else body).relu()

    def add(x, body):
        return x + body if skip else body

    if name == "cifar10-add":
        x = F.max_pool2d(conv(block(block(x))).relu(), 2)
        x = F.max_pool2d(add(x, conv(block(block(block(x)))).relu()), 2)
        x = add(x, block(block(block(x))))
    else:
        x = F.max_pool2d(conv(block(block(x))).relu(), 2)
        x = F.max_pool2d(conv(bottleneck(x)).relu(), 2)
        x = bottleneck(x)
    logits = conv(x.mean(dim=(2, 3), keepdim=True)).flatten(1)
    assert next(weights, None) is None
    return logits


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["cifar10-add", "cifar10-skip"])
def test_skips_add_the_input_of_their_block(name, skip):
    network = build_network(name, "gn", groups=4, skip=skip, seed=0).double().eval()
    generator = torch.Generator().manual_seed(2)
    for weight in network.parameters():  # scales of 1 and shifts of 0 would hide a missing norm
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    x = images_for(network, dtype=torch.float64)
    expected = written_out(network, x, name=name, groups=4, skip=skip)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_start_the_same_for_every_norm(name):
    norms = ("bn", "ln", "gn", "ln-elementwise", "in", "none")
    networks = [build_network(name, norm, seed=5) for norm in norms]
    for same in zip(*map(convolutions, networks), strict=True):
        assert all(torch.equal(layer.weight, same[0].weight) for layer in same)


def test_seed_decides_the_initial_weights():
    first, again, other = (build_network("mnist-l1", seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(*map(convolutions, (first, again, other)), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert not torch.equal(a.weight, c.weight)


def test_convolutions_of_one_shape_start_differently():
    weights = [layer.weight for layer in convolutions(build_network("cifar10-add", seed=0))]
    alike = [weight.flatten() for weight in weights if weight.shape == (16, 16, 3, 3)]
    correlation = torch.corrcoef(torch.stack(alike)) - torch.eye(len(alike))
    assert len(alike) == 5
    assert correlation.abs().max() < 5 / alike[0].numel() ** 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_are_spread_as_torch_spreads_them(name):
    for layer in convolutions(build_network(name, seed=0)):
        # uniform in ±1/√fan-in, whose standard deviation is the bound over √3
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_seed_covers_a_norm_that_starts_at_random():
    class RandomScale(nn.Module):
        def __init__(self, channels, size):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(channels, 1, 1))

        def forward(self, x):
            return x * self.weight

    first = build_network("mnist-l1", RandomScale, seed=0)
    torch.rand(1)
    again = build_network("mnist-l1", RandomScale, seed=0)
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_building_with_a_seed_leaves_the_global_random_state():
    before = torch.get_rng_state()
    build_network("mnist-l1", seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_weights_come_from_the_global_random_state():
    def two_networks():
        torch.manual_seed(11)
        return [convolutions(build_network("mnist-l1"))[0].weight for _ in range(2)]

    first, second = two_networks()
    assert all(map(torch.equal, two_networks(), (first, second)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_is_logits(name):
    network = build_network(name, seed=0).eval()
    x = images_for(network, 4)
    logits = network(x)
    assert logits.shape == (4, 10)
    # Linear in the last convolution: neither a softmax nor its logarithm is.
    convolutions(network)[-1].weight.data *= -3
    torch.testing.assert_close(network(x), -3 * logits)


@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "ln-elementwise", "in", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_images_and_classes_work_and_every_weight_learns(name, norm):
    network = build_network(name, norm, input_shape=(2, 37, 22), classes=3, seed=0)
    logits = network(images_for(network, 3))
    assert logits.shape == (3, 3)
    logits.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("mnist-l1", 18),  # 18 → 16 → 14, halved 7 → 5 → 3 → 1
        ("mnist-eva6", 18),
        ("cifar10-norms", 4),  # halved twice
        ("cifar10-add", 4),
        ("cifar10-skip", 4),
    ],
)
def test_images_too_small_for_a_network_are_refused(name, smallest):
    network = build_network(name, "ln", input_shape=(1, smallest, 30), seed=0)
    assert network(images_for(network)).shape == (2, 10)
    for shape in [(1, smallest - 1, 30), (1, 30, smallest - 1), (1, 1, 1)]:
        with pytest.raises(ValueError, match=re.escape(f"{shape} is too small for {name}")):
            build_network(name, "ln", input_shape=shape)


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 1), (1, 28, 0), (1, 28.0, 28), 28, ()])
def test_what_is_no_shape_of_an_image_is_refused(shape):
    with pytest.raises((TypeError, ValueError), match="input_shape"):
        build_network("mnist-l1", input_shape=shape)


@pytest.mark.parametrize(
    ("name", "groups", "layer"),
    [("mnist-l1", 4, "10 channels: .* 1, 2, 5, 10"), ("cifar10-skip", 16, "8 channels: .* 4, 8")],
)
def test_groups_that_do_not_divide_the_channels_of_a_layer(name, groups, layer):
    with pytest.raises(ValueError, match=f"groups={groups} .*{layer}"):
        build_network(name, "gn", groups=groups)


def test_groups_are_the_assignments_unless_given():
    for given, expected in ((None, 5), (1, 1)):
        network = build_network("mnist-l1", "gn", groups=given, seed=0)
        norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
        assert {layer.num_groups for layer in norms} == {expected}


def test_function_in_place_of_a_name_makes_every_norm():
    asked = []

    def my_norm(channels, size):
        asked.append((channels, size))
        return make_norm("gn", channels, groups=5)

    network = build_network("mnist-l1", my_norm, seed=0)
    sides = [26, 24, 10, 8, 6, 6]
    assert asked == [(c, (s, s)) for c, s in zip([10, 20, 20, 10, 10, 10], sides, strict=True)]
    reference = build_network("mnist-l1", "gn", groups=5, seed=0)
    x = images_for(network)
    assert torch.equal(network.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("name", "layer", "probability"),
    [
        ("mnist-l1", nn.Dropout, 0.05),
        ("mnist-eva6", nn.Dropout2d, 0.02),
        ("cifar10-norms", nn.Dropout, 0.05),
        ("cifar10-add", nn.Dropout, 0.0),
        ("cifar10-skip", nn.Dropout2d, 0.05),
    ],
)
def test_dropout_is_of_the_assignments_kind_and_amount(name, layer, probability):
    count = ROWS[name].count(" D")
    found = dropouts(build_network(name, seed=0))
    assert [(type(drop), drop.p) for drop in found] == [(layer, probability)] * count
    assert {type(drop) for drop in dropouts(build_network(name, dropout=0.3))} == {layer}
    assert {drop.p for drop in dropouts(build_network(name, dropout=0.3))} == {0.3}
    assert dropouts(build_network(name, dropout=0)) == []


def test_dropout_layers_are_separate():
    first, *others = dropouts(build_network("cifar10-norms", seed=0))
    first.eval()
    fired = []
    first.register_forward_hook(lambda *_: fired.append("first"))
    for layer in others:
        assert layer.training
        layer(torch.ones(1))
    assert fired == []


@pytest.mark.parametrize("name", NETWORKS)
def test_description_builds_the_same_network_again(name):
    network = build_network(name, "group_norm", dropout=0.2, skip=False, classes=4, seed=0)
    again = build_network(**network.description, seed=0)
    assert repr(again) == repr(network)
    assert again.description == network.description
    assert all(map(torch.equal, again.parameters(), network.parameters()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "mnist_l1"}, ValueError, "unknown network .* did you mean 'mnist-l1'"),
        ({"name": None}, ValueError, "unknown network None"),
        ({"norm": "batchnrom"}, ValueError, "unknown norm .* did you mean 'bn'"),
        ({"norm": None}, TypeError, "norm must be a name or a function"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 2.5}, TypeError, "groups must be a whole number"),
        ({"dropout": 1}, ValueError, "dropout must be below 1"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"dropout": float("nan")}, ValueError, "dropout must be a finite number"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"classes": 0}, ValueError, "classes must be at least 1"),
        ({"classes": True}, TypeError, "classes must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 1.0}, TypeError, "seed must be a whole number"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        build_network(**{"name": "mnist-l1", **arguments})
