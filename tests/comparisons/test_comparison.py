"""Differences against the tests of scipy, McNemar's test against sums of binomials."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import normlab as nl


def accuracies(*spreads: float, seeds: int = 5, means: tuple[float, ...] = ()) -> dict:
    """For each variant accuracies of so many seeds, exactly with this mean and spread."""
    rng, shapes = np.random.default_rng(3), {}
    for place, spread in enumerate(spreads):
        by_seed = rng.normal(size=seeds)
        by_seed = (by_seed - by_seed.mean()) / by_seed.std(ddof=1)
        mean = means[place] if means else 0.8 + place / 100
        shapes["ABCDEF"[place]] = mean + spread * by_seed
    return shapes


def test_accuracies_alone_are_compared_by_tukey_s_range():
    groups = accuracies(0.01, 0.012, 0.009, 0.011)
    expected = stats.tukey_hsd(*groups.values())
    ends = expected.confidence_interval(0.95)
    differences = nl.compare(groups)
    places = combinations(range(4), 2)
    for (one, other), each in zip(places, differences, strict=True):
        assert (each.method, each.pairs, each.images, each.mcnemar) == ("Tukey–Kramer", 6, 0, None)
        assert each.p == pytest.approx(expected.pvalue[one, other], abs=1e-6)
        margin = (ends.high - ends.low)[one, other] / 2
        assert each.interval.margin == pytest.approx(margin, rel=1e-5)
    assert str(differences[0]).endswith("Tukey–Kramer, 6 pairs; seeds alone)")


def test_unequal_numbers_of_seeds_are_compared_by_kramer_s_way():
    groups = accuracies(0.01, 0.012, 0.009)
    groups["A"] = groups["A"][:3]
    expected = stats.tukey_hsd(*groups.values())
    assert [each.p for each in nl.compare(groups)] == pytest.approx(
        [expected.pvalue[pair] for pair in ((0, 1), (0, 2), (1, 2))], abs=1e-6
    )
    assert [each.seeds for each in nl.compare(groups)] == [3, 3, 5]


def test_where_one_spread_is_much_larger_the_wider_interval_counts():
    """As with GN in cifar10-add: 0.89 points against 0.20 and 0.29."""
    differences = nl.compare(accuracies(0.002, 0.0089, 0.0029, seeds=3))
    assert [each.method for each in differences] == ["Games–Howell", "Tukey–Kramer", "Games–Howell"]
    shares = np.array([0.002, 0.0089]) ** 2 / 3
    freedom = shares.sum() ** 2 / (shares**2 / 2).sum()
    rounded = math.floor(10 * freedom) / 10  # as in tables
    limit = stats.studentized_range.ppf(0.95, 3, rounded) / math.sqrt(2)
    assert differences[0].interval.margin == pytest.approx(limit * math.sqrt(shares.sum()))
    pooled = math.sqrt((0.002**2 + 0.0089**2 + 0.0029**2) / 3 * 2 / 3)
    limit = stats.studentized_range.ppf(0.95, 3, 6) / math.sqrt(2)
    assert differences[1].interval.margin == pytest.approx(limit * pooled)


def test_a_few_chosen_pairs_have_narrower_intervals():
    groups = accuracies(*[0.01, 0.012, 0.009, 0.011, 0.01, 0.01])
    all_pairs = {(each.first, each.second): each for each in nl.compare(groups)}
    (alone,) = nl.compare(groups, pairs=[("A", "C")])
    assert (alone.method, alone.pairs) == ("Bonferroni", 1)
    spread = math.sqrt(np.mean([np.var(each, ddof=1) for each in groups.values()]))
    assert alone.interval.margin == pytest.approx(stats.t.ppf(0.975, 24) * spread * (2 / 5) ** 0.5)
    for each in nl.compare(groups, pairs=[("A", other) for other in "BCDEF"]):
        assert alone.interval.margin < each.interval.margin
        assert each.interval.margin < all_pairs["A", each.second].interval.margin
    with pytest.raises(ValueError, match="unknown variant 'Z'"):
        nl.compare(groups, pairs=[("A", "Z")])


def test_two_variants_are_compared_by_student_s_t():
    groups = accuracies(0.01, 0.012)
    (difference,) = nl.compare(groups)
    assert difference.method == "Student's t"
    assert difference.p == pytest.approx(stats.ttest_ind(*groups.values()).pvalue, abs=1e-6)
    (difference,) = nl.compare(accuracies(0.01, 0.1))
    assert difference.method == "Welch's t"


def test_main_effects_are_those_of_a_two_way_analysis_of_variance():
    """Two ways of three norms, five seeds each, all sums of squares by hand."""
    groups = accuracies(*[0.01, 0.012, 0.009, 0.011, 0.01, 0.01])
    levels = {"skip": ["D", "E", "F"], "no skip": ["A", "B", "C"]}
    (effect,) = nl.main_effects(groups, levels)
    table = np.array(list(groups.values())).reshape(2, 3, 5)
    within = ((table - table.mean(2, keepdims=True)) ** 2).sum() / 24
    means = table.mean(2)
    assert effect.interval.mean == pytest.approx(means[1].mean() - means[0].mean())
    between = 15 * ((means.mean(1) - means.mean()) ** 2).sum()
    assert effect.p == pytest.approx(stats.f.sf(between / within, 1, 24), rel=1e-3)
    rest = means - means.mean(1, keepdims=True) - means.mean(0) + means.mean()
    f = 5 * (rest**2).sum() / 2 / within
    assert effect.interaction == pytest.approx(stats.f.sf(f, 2, 24), rel=1e-6)
    assert f"interaction: p = {effect.interaction:.3f}" in str(effect)


def test_main_effects_of_three_levels_are_a_family():
    groups = accuracies(*[0.01, 0.012, 0.009, 0.011, 0.01, 0.01])
    effects = nl.main_effects(groups, {"x": ["A", "B"], "y": ["C", "D"], "z": ["E", "F"]})
    assert [(each.first, each.second, each.pairs) for each in effects] == [
        ("x", "y", 3),
        ("x", "z", 3),
        ("y", "z", 3),
    ]
    spread = math.sqrt(np.mean([np.var(each, ddof=1) for each in groups.values()]))
    limit = stats.studentized_range.ppf(0.95, 3, 24) / math.sqrt(2)
    for each in effects:
        assert each.interval.margin == pytest.approx(limit * spread / math.sqrt(5))


def test_the_kept_skips_are_worth_half_a_point():
    kept = Path(__file__).parents[2] / "notebooks" / "results" / "cifar10-skip" / "results.json"
    effect = json.loads(kept.read_text())["main_effects"][0]
    assert (effect["first"], effect["second"]) == ("BN + skip, GN + skip, LN + skip", "BN, GN, LN")
    assert round(100 * effect["mean"], 2) == 0.50
    assert effect["margin"] < effect["mean"]
    assert effect["p"] < 0.01 < 0.2 < effect["interaction"]


@pytest.fixture(scope="module")
def results(tiny_assignment, tiny) -> nl.Results:
    """Three small networks with two seeds each."""
    return nl.run_assignment(tiny_assignment, data=tiny, seeds=2, progress=False)


def test_compare_takes_all_pairs(results, tiny):
    differences = nl.compare(results)
    pairs = [(each.first, each.second) for each in differences]
    assert pairs == [("BN + L1", "GN"), ("BN + L1", "LN"), ("GN", "LN")]
    for each in differences:
        one, other = (results[label] for label in (each.first, each.second))
        gaps = [
            a.last["test_accuracy"] - b.last["test_accuracy"]
            for a, b in zip(one, other, strict=True)
        ]
        assert each.interval.mean == pytest.approx(np.mean(gaps))
        right = [(run.predicted == tiny.test_labels).numpy() for run in (one[0], other[0])]
        assert each.mcnemar == pytest.approx(nl.mcnemar(*right))
        assert (each.seeds, each.images) == (2, len(tiny.test_labels))


def test_one_seed_or_one_variant_is_nothing_to_compare(results):
    alone = replace(results, runs={label: runs[:1] for label, runs in results.runs.items()})
    with pytest.raises(
        ValueError, match=r"BN \+ L1 has one seed, which cannot tell a difference from chance"
    ):
        nl.compare(alone)
    with pytest.raises(ValueError, match="at least two variants"):
        nl.compare(replace(results, runs={"GN": results["GN"]}))


def test_variants_tested_on_other_images_are_nothing_to_compare(results, tiny, tiny_assignment):
    other = nl.run_assignment(
        tiny_assignment, data=tiny.subset(test=20), epochs=1, seeds=2, progress=False
    )
    mixed = replace(results, runs=results.runs | {"GN": other["GN"]})
    with pytest.raises(ValueError, match="GN, seed 0, was trained and tested on other images"):
        nl.compare(mixed)


def test_several_results_are_taken_together(results, tiny):
    levels = {"BN + L1": ["BN + L1"], "LN": ["LN"]}
    (effect,) = nl.main_effects([results, results], levels)
    (once,) = nl.main_effects(results, levels)
    assert effect.interval.mean == pytest.approx(once.interval.mean)
    assert (effect.seeds, effect.images, effect.source) == (
        2,
        len(tiny.test_labels),
        "made-up patterns",
    )
    assert once.interaction is None
    assert effect.interaction == pytest.approx(1.0)
    assert once.interval.mean == pytest.approx(nl.compare(results)[1].interval.mean)


def test_levels_that_are_not_there_end_in_a_sentence(results):
    with pytest.raises(ValueError, match="none of the results has all of GN, XN"):
        nl.main_effects([results, results], {"GN": ["GN"], "LN": ["XN"]})
    with pytest.raises(ValueError, match="as many variants for each level, at least one, not 2, 1"):
        nl.main_effects(results, {"BN": ["BN + L1", "GN"], "LN": ["LN"]})
    with pytest.raises(ValueError, match="at least one, not 0, 0"):
        nl.main_effects(results, {"BN": [], "LN": []})


def test_several_results_are_of_the_same_images(results, tiny_assignment, tiny):
    data = replace(tiny, test_images=tiny.test_images.flip(0))
    other = nl.run_assignment(tiny_assignment, data=data, epochs=1, seeds=2, progress=False)
    with pytest.raises(ValueError, match="no common test set"):
        nl.main_effects([results, other], {"GN": ["GN"], "LN": ["LN"]})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"A": [0.9, 0.8], "B": [90.0, 80.0]}, "B must hold fractions from 0 to 1"),
        ({"A": [0.9, 0.8], "B": [0.9, math.nan]}, "B must hold fractions from 0 to 1"),
        ({"A": [0.9, 0.8], "B": [0.9]}, "B has one seed"),
        ({"A": [0.9, 0.8], "B": 0.9}, "B must be a table"),
        ({"A": [0.9, 0.8], "B": ["0.9", "0.8"]}, "B must be a table"),
        ({"A": [0.9, 0.8], "B": [[True, False]] * 2}, "not tested on the same images"),
        ({"A": [[True] * 3] * 2, "B": [[True] * 4] * 2}, "not tested on the same images"),
        ({"A": [[True]] * 2, "B": [[False]] * 2}, "at least two images"),
        ({}, "at least two variants"),
    ],
)
def test_what_cannot_be_compared_is_said(groups, message):
    with pytest.raises(ValueError, match=message):
        nl.compare(groups)


def difference(mean: float, margin: float, *, p: float = 0.2) -> nl.Difference:
    within = nl.Interval(mean, margin, margin / stats.t.ppf(0.975, 6), 6)
    about = {"source": "toy images", "method": "Tukey–Kramer", "pairs": 3, "p": p}
    return nl.Difference("GN", "LN", within, 3, 10_000, 0.5, **about)


def test_a_difference_says_itself_in_a_sentence():
    unclear = difference(0.004, 0.006)
    assert str(unclear) == (
        "GN − LN = +0.40 ± 0.60 points over 3 seeds: not significantly different; 3 seeds would "
        f"show a difference of {100 * unclear.interval.detectable:.2f} points with 80 % "
        "probability (p = 0.200; Tukey–Kramer, 3 pairs)"
    )
    assert str(difference(-0.02, 0.006, p=1e-5)).endswith(
        "-2.00 ± 0.60 points over 3 seeds: significantly different "
        "(p < 0.001; Tukey–Kramer, 3 pairs)"
    )


def test_a_plus_in_a_label_is_not_read_as_one_of_the_difference():
    with_skip = replace(difference(0.004, 0.006), second="GN + skip")
    assert with_skip.pair == "GN − (GN + skip)"


def test_the_picture_shows_each_interval_in_points():
    figure = nl.plot_compare([difference(0.004, 0.006), difference(-0.02, 0.006)])
    ax = figure.axes[0]
    ends = [line.get_segments()[0][:, 0] for line in ax.collections]
    np.testing.assert_allclose(ends, [(-0.2, 1.0), (-2.6, -1.4)], atol=1e-9)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["GN − LN", "GN − LN"]
    assert ax.get_title() == "Differences over 3 seeds, toy images"
    groups = nl.plot_compare(nl.compare({"A": [0.9, 0.91, 0.92], "B": [0.8, 0.81, 0.82]}))
    assert groups.axes[0].get_title() == "Differences over 3 seeds"
    with pytest.raises(ValueError, match="no differences"):
        nl.plot_compare([])


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 1), (5, 5), (0, 0), (0, 6), (40, 25)])
def test_mcnemar_is_the_sum_of_binomial_probabilities(only_first, only_second):
    both = 50
    first = np.array([True] * (both + only_first) + [False] * only_second)
    second = np.array([True] * both + [False] * only_first + [True] * only_second)
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert nl.mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_wants_to_know_what_is_right_rather_than_the_classes():
    labels, predicted = np.array([1, 2, 0, 3]), np.array([1, 0, 2, 3])
    with pytest.raises(TypeError, match="whether each image is right: run"):
        nl.mcnemar(predicted, labels)
    with pytest.raises(TypeError, match="whether each image is right"):
        nl.mcnemar(predicted == labels, predicted)
    assert nl.mcnemar(predicted == labels, [True, False, True, True]) == 1.0


def test_mcnemar_wants_the_same_images():
    with pytest.raises(ValueError, match="tested on 3 and 4 images"):
        nl.mcnemar([True] * 3, [False] * 4)
