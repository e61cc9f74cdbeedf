"""What sets variants apart, in comparisons made unfair on purpose."""

import re
from dataclasses import replace

import pytest
from conftest import TinyNetwork

import normlab as nl


def outcome(tiny, tiny_assignment, *variants: nl.Variant, **changes) -> list[nl.Finding]:
    """What is found in a comparison of these variants, trained for an epoch."""
    assignment = replace(tiny_assignment, variants=variants, **changes)
    return nl.check_fair(nl.run_assignment(assignment, data=tiny, epochs=1, progress=False))


def test_norms_alone_are_fair(tiny, tiny_assignment):
    assert not outcome(tiny, tiny_assignment, nl.Variant("BN", "bn"), nl.Variant("GN", "gn"))


def test_a_declared_change_is_told_as_declared(tiny, tiny_assignment):
    penalised = nl.Variant("BN + L1", "bn", changes={"l1": 1e-4})
    (found,) = outcome(
        tiny, tiny_assignment, penalised, nl.Variant("GN", "gn"), nl.Variant("LN", "ln")
    )
    assert (found.what, found.declared) == ("l1", True)
    assert str(found) == "l1: declared: BN + L1 0.0001; GN 0; LN 0"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_variants_the_one_that_changes_it_declares_it(tiny, tiny_assignment, order):
    pair = (nl.Variant("BN + L1", "bn", changes={"l1": 1e-4}), nl.Variant("GN", "gn"))
    (found,) = outcome(tiny, tiny_assignment, *(pair[place] for place in order))
    assert (found.what, found.declared) == ("l1", True)


def test_a_precision_that_is_not_declared_is_told(tiny, tiny_assignment):
    half = nl.Variant("GN in half", "gn", changes={"dtype": "bfloat16"})
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN", "gn"), half)
    assignment = replace(tiny_assignment, variants=variants)
    results = nl.run_assignment(assignment, data=tiny, epochs=1, progress=False)
    (found,) = nl.check_fair(results)
    assert str(found) == "dtype: declared: BN float32; GN float32; GN in half bfloat16"
    results.runs["GN"] = results["GN in half"]
    (found,) = nl.check_fair(results)
    assert (found.what, found.declared) == ("dtype", False)


def test_other_images_are_seen(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN", "gn"))
    assignment = replace(tiny_assignment, variants=variants)
    results = nl.run_assignment(assignment, data=tiny, epochs=1, progress=False)
    inverted = replace(tiny, train_images=255 - tiny.train_images)
    results.runs["GN"] = nl.run_assignment(
        assignment, data=inverted, epochs=1, progress=False
    ).runs["GN"]
    (found,) = nl.check_fair(results)
    assert (found.what, found.declared) == ("images", False)


def test_more_parameters_are_told_as_not_declared(tiny, tiny_assignment):
    plain, large = nl.Variant("LN", "ln"), nl.Variant("LN element-wise", "ln-elementwise")
    (found,) = outcome(tiny, tiny_assignment, plain, large)
    assert str(found) == "parameters: NOT declared: LN 380; LN element-wise 2,668"


def test_runs_put_together_by_hand_are_seen_through(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN", "gn"), nl.Variant("LN", "ln"))
    assignment = replace(tiny_assignment, variants=variants)
    results = nl.run_assignment(assignment, data=tiny, epochs=1, progress=False)
    faster = replace(assignment, recipe=assignment.recipe.replace(lr=0.2))
    other = nl.run_assignment(faster, data=tiny, epochs=2, seeds=[3], progress=False)
    results.runs["GN"] = other["GN"]
    found = {each.what: each for each in nl.check_fair(results)}
    assert found.keys() == {"lr", "epochs", "images seen", "seeds", "initial filters"}
    assert not any(each.declared for each in found.values())
    assert found["images seen"].values == {"BN": 96, "GN": 192, "LN": 96}
    assert found["seeds"].values == {"BN": [0], "GN": [3], "LN": [0]}


def test_every_seed_is_looked_at(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN", "gn"))
    assignment = replace(tiny_assignment, variants=variants)
    results = nl.run_assignment(assignment, data=tiny, epochs=1, seeds=2, progress=False)
    faster = replace(assignment, recipe=assignment.recipe.replace(lr=0.2))
    other = nl.run_assignment(faster, data=tiny, epochs=1, seeds=[1], progress=False)
    results.runs["GN"] = (results["GN"][0], other["GN"][0])
    (found,) = nl.check_fair(results)
    rate = assignment.recipe.lr
    assert (found.what, found.declared) == ("lr", False)
    assert found.values == {"BN": rate, "GN": [rate, 0.2]}


def test_a_network_that_was_trained_before_is_told(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN", "gn"))
    assignment = replace(tiny_assignment, variants=variants)
    results = nl.run_assignment(assignment, data=tiny, epochs=1, progress=False)
    recipe = results["GN"][0].recipe
    results.runs["GN"] = (nl.fit(results["GN"][0].network, tiny, recipe, progress=False),)
    (found,) = nl.check_fair(results)
    assert (found.what, found.declared) == ("initial filters", False)
    assert found.values["GN"] == "not the assignment's"


def test_results_alone_are_checked():
    with pytest.raises(TypeError, match=r"results must be a Results, not \{\}: nl.run_assignment"):
        nl.check_fair({})
    with pytest.raises(TypeError, match=r"results must be a Mapping, not 0.9: nl.run_assignment"):
        nl.compare(0.9)


def test_limits_that_are_passed_are_named(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("LN", "ln-elementwise"))
    found = outcome(tiny, tiny_assignment, *variants, parameter_limit=1000, epoch_limit=1)
    assert str(found[-1]) == "parameters: over the limit of 1,000: LN 2,668"


@pytest.mark.parametrize(("name", "limit"), [("mnist-l1", None), ("cifar10-norms", 50_000)])
def test_the_assignments_know_their_limits(name, limit):
    assignment = nl.ASSIGNMENTS[name]
    assert (assignment.parameter_limit, assignment.epoch_limit) == (limit, 20)


def test_skips_are_declared_and_their_parameters_with_them(digits):
    skip = nl.ASSIGNMENTS["cifar10-skip"]
    chosen = (skip.variants[0], skip.variants[3])
    data = nl.load_dataset("digits", input_shape=(3, 32, 32)).subset(train=64, test=20)
    results = nl.run_assignment(replace(skip, variants=chosen), data=data, epochs=1, progress=False)
    found = {each.what: each.declared for each in nl.check_fair(results)}
    assert found == {"parameters": True, "skip": True}


def three_classes(norm):
    """What a student has who wrote a class for each norm."""
    kinds = {name: type(f"Net{name.upper()}", (TinyNetwork,), {}) for name in ("bn", "gn", "ln")}
    return kinds[norm](norm)


@pytest.mark.parametrize("declares", [(), ("class",)])
def test_a_class_for_each_norm_is_told_by_its_name_and_can_be_declared(
    tiny, tiny_assignment, declares
):
    others = (nl.Variant(norm.upper(), norm, declares=declares) for norm in ("gn", "ln"))
    (found,) = outcome(tiny, tiny_assignment, nl.Variant("BN", "bn"), *others, build=three_classes)
    assert (found.what, found.declared) == ("class", bool(declares))
    assert re.search(r"BN NetBN \([0-9a-f]{8}\); GN NetGN \([0-9a-f]{8}\); LN NetLN", str(found))
    assert len(max(str(found).split(), key=len)) < 20
