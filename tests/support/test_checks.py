"""What a user passes in works at every entry point, or ends in one sentence at every one."""

import threading

import numpy as np
import pandas
import pytest
import torch
import torch.nn.utils.prune
from matplotlib import pyplot
from torch import nn

import normlab as nl
from normlab.support.checks import as_list, image_shape, number, whole_number

# --- numbers ---------------------------------------------------------------------------------

THREES = [3, np.uint8(3), np.array(3), torch.tensor(3)]
HALVES = [0.5, np.float32(0.5), torch.tensor(0.5).half()]


@pytest.mark.parametrize("value", THREES)
def test_a_whole_number_of_any_library_is_one(value):
    assert whole_number(value, "it") == 3
    assert type(whole_number(value, "it")) is int


@pytest.mark.parametrize("value", HALVES)
def test_a_number_of_any_library_is_one(value):
    assert number(value, "it") == 0.5
    assert type(number(value, "it")) is float


@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True), np.array([1, 2]), "1"])
def test_what_is_no_number_is_none_in_any_library(value):
    with pytest.raises(TypeError, match="it must be a whole number, not"):
        whole_number(value, "it")
    with pytest.raises(TypeError, match="it must be a number, not"):
        number(value, "it")


SEVERAL = [
    [1, 2, 4],
    (1, 2, 4),
    np.array([1, 2, 4]),
    torch.tensor([1, 2, 4]),
    pandas.Series([1, 2, 4]),
    [np.int64(1), torch.tensor(2), 4],
    (2**power for power in range(3)),
    {1: "a", 2: "b", 4: "c"}.keys(),
]


@pytest.mark.parametrize("values", SEVERAL, ids=lambda values: type(values).__name__)
def test_several_values_are_a_list_of_plain_ones(values):
    found = as_list(values)
    assert found == [1, 2, 4]
    assert {type(value) for value in found} == {int}


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), np.array(0.5)])
def test_a_single_value_is_several(value):
    assert as_list(value) == [0.5]


def test_a_name_is_no_list_of_letters():
    assert as_list("bn") == ["bn"]


@pytest.mark.parametrize("of", [tuple, list, np.array, torch.tensor, pandas.Series, torch.Size])
def test_a_shape_may_be_held_by_anything(of):
    shape = image_shape(of([1, 28, 20]))
    assert shape == (1, 28, 20)
    assert {type(side) for side in shape} == {int}


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_a_shape_is_taken_everywhere(of):
    built = nl.build_network("mnist-l1", input_shape=of([1, 28, 20]))
    assert built.description["input_shape"] == (1, 28, 20)
    assert nl.summary(built, of([1, 28, 20])) == 7_750
    assert nl.load_dataset("digits", input_shape=of([1, 28, 20])).input_shape == (1, 28, 20)
    assert nl.make_norm("ln-elementwise", 8, size=of([3, 2])).normalized_shape == (8, 3, 2)
    two = of([2])[0]  # in a library's own type
    nl.explore_norm(shape=of([2, 4, 2, 2]), groups=two, form=False)
    nl.plot_norm_axes(["gn"], shape=of([2, 4, 3]), groups=two)
    pyplot.close("all")


# --- layers whose weights are not plain parameters -------------------------------------------


def network(first=None):
    """Two convolutions and a head for 12×12 images of four classes."""
    first = nn.Conv2d(1, 8, 3, bias=False) if first is None else first
    layers = [first, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 4))


class Keeper(nn.Module):
    """Keeps its activations, as for a picture of them, in three ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)
        self.seen, self.named = [], {}

    def forward(self, x):
        self.last = torch.relu(self.conv(x))
        self.seen, self.named = [self.last], {"relu": (self.last, 1)}
        return self.head(self.last.mean((2, 3)))


def keeper():
    """One that holds activations of a forward pass with gradients."""
    made = Keeper()
    made(torch.rand(2, 1, 12, 12)).sum().backward()
    return made


def convolution():
    return nn.Conv2d(1, 8, 3, bias=False)


class Guarded(nn.Sequential):
    """Holds what Python cannot copy, as an open file is, or a logger's lock."""

    def __init__(self):
        super().__init__(*network())
        self.lock = threading.Lock()


WORKING = {
    "stored activations": keeper,
    "weight_norm": lambda: network(nn.utils.parametrizations.weight_norm(convolution())),
    "spectral_norm": lambda: network(nn.utils.parametrizations.spectral_norm(convolution())),
    "old weight_norm": lambda: network(nn.utils.weight_norm(convolution())),
    "pruned": lambda: network(nn.utils.prune.l1_unstructured(convolution(), "weight", 0.3)),
}
RECIPE = nl.Recipe(epochs=1, batch_size=16)
SILENT = {"device": "cpu", "progress": False}


def assignment(make, recipe=RECIPE):
    variants = (nl.Variant("BN", "bn"),)
    return nl.Assignment("own", "Own", "tiny", variants, recipe, build=lambda norm: make())


def an_epoch(network, tiny):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return nl.train_epoch(network, tiny.loader(batch_size=32), optimizer, l1=1e-4)


ENTRIES = {
    "fit": lambda make, tiny: nl.fit(make(), tiny, RECIPE, **SILENT),
    "fit with l1": lambda make, tiny: nl.fit(make(), tiny, RECIPE.replace(l1=1e-4), **SILENT),
    "run_assignment": lambda make, tiny: nl.run_assignment(assignment(make), data=tiny, **SILENT),
    "run_sweep": lambda make, tiny: nl.run_sweep(assignment(make), data=tiny, **SILENT),
    "summary": lambda make, tiny: nl.summary(make(), tiny.input_shape),
    "find_rate": lambda make, tiny: nl.find_rate(make(), tiny, RECIPE, steps=20, device="cpu"),
    "l1_penalty": lambda make, tiny: nl.l1_penalty(make()),
    "predict": lambda make, tiny: nl.predict(make(), tiny),
}
USES = ENTRIES | {
    "train_epoch": lambda make, tiny: an_epoch(make(), tiny),
    "test_epoch": lambda make, tiny: nl.test_epoch(make(), tiny.loader(False)),
    "find_mistakes": lambda make, tiny: nl.find_mistakes(make(), tiny),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:the loss never fell")
@pytest.mark.parametrize("entry", USES)
@pytest.mark.parametrize("kind", WORKING)
def test_unusual_layers_work_everywhere(kind, entry, tiny):
    USES[entry](WORKING[kind], tiny)


@pytest.mark.parametrize("entry", [*USES, "resumed"])
def test_what_cannot_be_copied_is_trained_all_the_same(entry, tiny, tmp_path):
    copies = ("summary", "find_rate")
    if entry in copies:
        with pytest.raises(TypeError, match=r"^Guarded cannot be copied \(.*lock.*\): keep what"):
            USES[entry](Guarded, tiny)
    elif entry == "resumed":
        for _ in range(2):
            nl.run_assignment(assignment(Guarded), data=tiny, directory=tmp_path, **SILENT)
    else:
        USES[entry](Guarded, tiny)


class Late(nn.Module):
    """Makes its last layer when it sees how large the images have become."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), None

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        self.head = self.head or nn.Linear(x.shape[1], 4)
        return self.head(x)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e not in ("summary", "l1_penalty")])
def test_a_layer_that_is_made_by_the_first_images_is_named_everywhere(entry, tiny):
    with pytest.raises(ValueError, match=r"^Late makes 'head\.weight' only when it first sees"):
        ENTRIES[entry](Late, tiny)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_assignments_and_sweeps_need_no_gradients_switched_on(tiny, off):
    with off():
        results = nl.run_assignment(assignment(network), data=tiny, **SILENT)
        table = nl.run_sweep(assignment(network), data=tiny, **SILENT)
    expected = nl.run_assignment(assignment(network), data=tiny, **SILENT)["BN"][0]
    assert results["BN"][0].last["train_loss"] == expected.last["train_loss"]
    assert table["train_loss"].tolist() == [expected.last["train_loss"]]


def lazy():
    return network(nn.LazyConv2d(8, 3))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_lazy_layer_is_named_everywhere(entry, tiny):
    with pytest.raises(ValueError, match=r"layer '0' \(LazyConv2d\) .* no weights yet: call the"):
        ENTRIES[entry](lazy, tiny)


def test_a_lazy_network_that_has_seen_images_is_like_any_other(tiny):
    def make():
        made = lazy()
        made(torch.zeros(2, 1, 12, 12))
        return made

    for enter in ENTRIES.values():
        enter(make, tiny)


COMPUTED = [kind for kind in WORKING if kind != "stored activations"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"centred": True}])
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_no_optimiser_can_hold_is_named_before_anything_is_trained(
    kind, changes, tiny, tmp_path
):
    recipe, make = RECIPE.replace(**changes), WORKING[kind]
    for enter in (
        lambda: nl.fit(make(), tiny, recipe, directory=tmp_path / "run", **SILENT),
        lambda: nl.run_assignment(
            assignment(make, recipe), data=tiny, directory=tmp_path / "all", **SILENT
        ),
        lambda: nl.run_sweep(
            assignment(make, recipe), data=tiny, directory=tmp_path / "sweep", **SILENT
        ),
        lambda: nl.find_rate(make(), tiny, recipe, device="cpu"),
    ):
        with pytest.raises(ValueError, match=r"weight of layer '0' \(.*Conv2d\) is computed from"):
            enter()
    assert not any(tmp_path.iterdir())


def test_a_parametrized_weight_counts_once_in_the_penalty():
    made = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)) for _ in "abcde"))
    expected = sum(layer.weight.abs().sum().item() for layer in made)
    penalty = nl.l1_penalty(made)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    assert all(weight.grad is not None for weight in made[4].parametrizations.weight.parameters())


def test_the_check_of_a_penalty_leaves_a_spectral_norm_as_it_is(tiny):
    made = WORKING["spectral_norm"]()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    nl.runs.jobs.check_trainable(made, tiny, RECIPE.replace(l1=1e-4))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


# --- batches and outputs ---------------------------------------------------------------------


class Returns(nn.Module):
    """Gives logits (B, 4), or what `change` makes of them."""

    def __init__(self, change):
        super().__init__()
        self.body, self.change = network(), change

    def forward(self, x):
        return self.change(self.body(x))


class Cut(nn.Module):
    """Ends as many students' networks do, in `view(-1, 4)`, after a pool that leaves 2×2."""

    def __init__(self):
        super().__init__()
        self.conv, self.gap = nn.Conv2d(1, 4, 5), nn.AvgPool2d(4)

    def forward(self, x):  # (B, 1, 12, 12), (B, 4, 8, 8), (B, 4, 2, 2), (4 · B, 4)
        return self.gap(self.conv(x)).view(-1, 4)


CUT = (
    r"not \((8|64|128|160), 4\) for B = \d+: after layer 'gap' \(AvgPool2d\), which "
    r"leaves \(\d+, 4, 2, 2\)"
)
OUTPUTS = {
    "tuple": (lambda: Returns(lambda y: (y, y)), TypeError, "tensor of logits, not a tuple"),
    "dict": (lambda: Returns(lambda y: {"y": y}), TypeError, "tensor of logits, not a dict"),
    "nothing": (lambda: Returns(lambda y: None), TypeError, "tensor of logits, not a NoneType"),
    "map": (lambda: Returns(lambda y: y[:, :, None]), ValueError, r"not \(\d+, 4, 1\) for B = "),
    "cut up": (Cut, ValueError, CUT),
}


@pytest.mark.parametrize("entry", [use for use in USES if use not in ("summary", "l1_penalty")])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_is_no_logits_is_one_sentence_everywhere(kind, entry, tiny):
    make, error, message = OUTPUTS[kind]
    with pytest.raises(error, match=message):
        USES[entry](make, tiny)
