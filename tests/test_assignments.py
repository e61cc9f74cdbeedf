"""The five assignments are what their tables say, and compare like with like."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.assignments import find_assignment
from normlab.runs.jobs import build_variant

# label, norm, groups of its norms, skip connections, L1 factor, parameters with ten classes
EXPECTED = {
    "mnist-l1": [
        ("BN + L1", "bn", None, True, 1e-5, 7_750),
        ("GN", "gn", 5, True, 0, 7_750),
        ("LN", "ln", 1, True, 0, 7_750),
    ],
    "mnist-eva6": [
        ("BN + L1", "bn", None, True, 1e-5, 8_016),
        ("GN", "gn", 2, True, 0, 8_016),
        ("LN", "ln", 1, True, 0, 8_016),
        ("LN element-wise", "ln-elementwise", None, True, 0, 37_592),
    ],
    "cifar10-norms": [
        ("BN", "bn", None, True, 0, 41_992),
        ("GN", "gn", 4, True, 0, 41_992),
        ("LN", "ln", 1, True, 0, 41_992),
        ("LN element-wise", "ln-elementwise", None, True, 0, 146_008),
    ],
    "cifar10-add": [
        ("BN", "bn", None, True, 0, 22_672),
        ("GN", "gn", 2, True, 0, 22_672),
        ("LN", "ln", 1, True, 0, 22_672),
    ],
    "cifar10-skip": [
        ("BN", "bn", None, False, 0, 33_720),
        ("GN", "gn", 4, False, 0, 33_720),
        ("LN", "ln", 1, False, 0, 33_720),
        ("BN + skip", "bn", None, True, 0, 34_520),
        ("GN + skip", "gn", 4, True, 0, 34_520),
        ("LN + skip", "ln", 1, True, 0, 34_520),
    ],
}
LAYERS = {
    "bn": nn.BatchNorm2d,
    "gn": nn.GroupNorm,
    "ln": nn.GroupNorm,
    "ln-elementwise": nn.LayerNorm,
}
CASES = [(name, *row) for name, rows in EXPECTED.items() for row in rows]


def make(assignment: nl.Assignment, variant: nl.Variant, seed: int = 0) -> nn.Module:
    shape = (1, 28, 28) if assignment.dataset == "mnist" else (3, 32, 32)
    data = SimpleNamespace(classes=range(10), input_shape=shape)
    return build_variant(assignment, variant, data, seed=seed)


def convolutions(network: nn.Module) -> list[torch.Tensor]:
    """Weights of the convolutions, but for those of the shortcuts, which not all variants have."""
    return [
        layer.weight
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and "shortcut" not in name
    ]


def test_there_are_five_assignments_and_their_variants():
    found = {
        name: [variant.label for variant in assignment.variants]
        for name, assignment in nl.ASSIGNMENTS.items()
    }
    assert found == {name: [row[0] for row in rows] for name, rows in EXPECTED.items()}
    assert all(assignment.name == name for name, assignment in nl.ASSIGNMENTS.items())


@pytest.mark.parametrize(("name", "label", "norm", "groups", "skip", "l1", "parameters"), CASES)
def test_a_variant_is_what_its_label_says(name, label, norm, groups, skip, l1, parameters):
    assignment = nl.ASSIGNMENTS[name]
    (variant,) = [one for one in assignment.variants if one.label == label]
    network = make(assignment, variant)
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    norms = [layer for layer in network.modules() if isinstance(layer, kinds)]
    assert {type(layer) for layer in norms} == {LAYERS[norm]}
    assert {getattr(layer, "num_groups", None) for layer in norms} == {groups}
    assert variant.skip == skip
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert assignment.recipe_for(variant, seed=0).l1 == l1
    assert name.startswith(assignment.dataset)


@pytest.mark.parametrize("assignment", nl.ASSIGNMENTS.values(), ids=lambda one: one.name)
def test_recipes_share_all_that_is_not_declared(assignment):
    shared = assignment.recipe.as_dict() | {"seed": 3, "epochs": 7}
    for variant in assignment.variants:
        recipe = assignment.recipe_for(variant, seed=3, epochs=7).as_dict()
        assert recipe == shared | variant.changes
        assert variant.changes.keys() <= {"l1"}
    assert assignment.recipe_for(assignment.variants[0], seed=0).epochs == 20


@pytest.mark.parametrize("assignment", nl.ASSIGNMENTS.values(), ids=lambda one: one.name)
def test_all_variants_of_a_seed_start_from_the_same_convolutions(assignment):
    first, *others = (convolutions(make(assignment, v, seed=2)) for v in assignment.variants)
    for other in others:
        assert len(other) == len(first)
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("BN + L1", "bn-l1"),
        ("LN element-wise", "ln-element-wise"),
        ("groups=4 (GN)", "groups-4-gn"),
    ],
)
def test_a_label_becomes_a_folder(label, folder):
    assert nl.Variant(label, "bn").folder == folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"network": None}, "needs either network=, a name, or build=, a function"),
        ({"build": nn.Sequential}, "needs either network=, a name, or build=, a function"),
        ({"variants": ()}, "has no variants to compare"),
        (
            {"variants": (nl.Variant("BN+L1", "bn"), nl.Variant("BN - L1", "bn"))},
            "two variants with the folder 'bn-l1'",
        ),
    ],
)
def test_an_assignment_that_cannot_work_is_refused(arguments, words):
    usual = {"network": "mnist-l1", "variants": (nl.Variant("BN", "bn"),)}
    with pytest.raises(ValueError, match=f"assignment 'mine'.*{words}"):
        nl.Assignment("mine", "My own", "digits", **(usual | arguments))


def test_a_network_of_ones_own_follows_from_the_seed(tiny, tiny_assignment):
    def weights(seed: int, place: int = 0) -> list[torch.Tensor]:
        torch.manual_seed(99 + place)  # whatever a student drew before must not matter
        state = torch.get_rng_state()
        variant = tiny_assignment.variants[place]
        network = build_variant(tiny_assignment, variant, tiny, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [w for name, w in network.named_parameters() if "norm" not in name]

    assert all(map(torch.equal, weights(0), weights(0)))
    assert all(map(torch.equal, weights(0), weights(0, place=1)))
    assert not torch.equal(weights(0)[0], weights(1)[0])


def test_an_assignment_is_found_by_name_or_is_ones_own(tiny_assignment):
    assert find_assignment("cifar10-add") is nl.ASSIGNMENTS["cifar10-add"]
    assert find_assignment(tiny_assignment) is tiny_assignment
    with pytest.raises(ValueError, match="did you mean 'mnist-l1'"):
        find_assignment("mnist-l2")


@pytest.mark.parametrize("name", nl.ASSIGNMENTS)
def test_the_submission_is_trained_in_its_own_manner(name):
    shipped = nl.ASSIGNMENTS[name]
    theirs = nl.as_submitted(shipped)
    assert theirs.name == f"{name}-as-submitted"
    labels = [v.label for v in shipped.variants if v.reported]
    if name == "mnist-eva6":  # its penalty was another one, and is left out
        labels[0] = "BN"
    assert [v.label for v in theirs.variants] == labels
    assert any("l1" in v.changes for v in theirs.variants) == (name == "mnist-l1")
    recipe = theirs.recipe
    assert (recipe.optimizer, recipe.lr, recipe.schedule) == ("sgd", 0.01, "constant")
    assert recipe.batch_size == (32 if name == "cifar10-add" else 128)
    assert theirs.dropout is None  # that of the network
    layers = make(theirs, theirs.variants[0]).modules()
    has_dropout = any(isinstance(layer, (nn.Dropout, nn.Dropout2d)) for layer in layers)
    assert has_dropout == (name != "cifar10-add")


def test_only_submissions_can_be_trained_as_submitted(tiny_assignment):
    with pytest.raises(ValueError, match="unknown submission 'tiny-norms'"):
        nl.as_submitted(tiny_assignment)


def test_a_norm_s_name_is_a_variant():
    usual = {"dataset": "digits", "network": "mnist-l1"}
    named = nl.Assignment(
        "mine", "My own", variants=("bn", "g", "layer", "ln-elementwise"), **usual
    )
    assert named.variants == (
        nl.Variant("BN", "bn"),
        nl.Variant("GN", "gn"),
        nl.Variant("LN", "ln"),
        nl.Variant("ln-elementwise", "ln-elementwise"),
    )
    mixed = nl.Assignment("mine", "My own", variants=["bn", nl.Variant("GN 5", "gn", 5)], **usual)
    assert [variant.label for variant in mixed.variants] == ["BN", "GN 5"]
    for alone in ("bn", nl.Variant("BN", "bn")):
        mine = nl.Assignment("mine", "My own", variants=alone, **usual)
        assert mine.variants == named.variants[:1]


def test_a_name_means_to_build_what_it_says(tiny, tiny_network):
    asked = []

    def build(norm):
        asked.append(norm)
        return tiny_network("bn")

    own = nl.Assignment("own", "Own", "tiny", ("my norm",), nl.Recipe(epochs=1), build=build)
    results = nl.run_assignment(own, data=tiny, device="cpu", progress=False)
    assert list(results) == ["my norm"]
    assert set(asked) == {"my norm"}


@pytest.mark.parametrize(
    ("variants", "error", "words"),
    [
        (("batchnrom",), ValueError, "unknown norm .* did you mean"),
        ((("bn", "gn"),), TypeError, "a variant must be a Variant, not .*or give 'gn'"),
        (None, TypeError, "a variant must be a Variant, not None"),
        (("bn", "b"), ValueError, "two variants with the folder 'bn'"),
    ],
)
def test_what_is_no_variant_is_named(variants, error, words):
    with pytest.raises(error, match=words):
        nl.Assignment("mine", "My own", "digits", variants, network="mnist-l1")
