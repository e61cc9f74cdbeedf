"""Intervals against simulation and Student's t, McNemar's test against sums of binomials."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import normlab as nl
from normlab.comparison import Chance, interval, mcnemar


def simulated(
    rng: np.random.Generator,
    seeds: int,
    *,
    ease: tuple[float, float] = (1.5, 1.5),
    suits: float = 0.5,
    luck: float = 0.05,
) -> np.ndarray:
    """A table of two arms of networks on 1,000 images; by default as CIFAR-10 gives them.

    About 80 % are right, two seeds of one variant disagree on an image in eight, and each variant
    has images of its own that suit it.
    """
    images = 1000
    easy = rng.normal(*ease, images)
    arms = []
    for _ in range(2):
        suited = easy + rng.normal(0, suits, images)
        lucky = rng.normal(0, luck, (seeds, 1))
        arms.append(suited + lucky + rng.normal(0, 0.7, (seeds, images)) > 0)
    return arms[0].astype(float) - arms[1]


@pytest.mark.parametrize("shape", [(1, 50), (3, 1), (50,)])
def test_too_small_a_table_has_no_interval(shape):
    with pytest.raises(ValueError, match="at least 2 seeds by 2 images"):
        nl.interval(np.zeros(shape))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_without_a_difference_few_intervals_exclude_zero(seeds):
    rng = np.random.default_rng(seeds)
    excluded = [interval(simulated(rng, seeds)).excludes_zero for _ in range(2000)]
    assert 0.03 <= np.mean(excluded) <= 0.07


@pytest.mark.parametrize(
    "world",
    [{"ease": (5.5, 2.1)}, {"luck": 0.0}, {"suits": 0.0}, {"suits": 0.0, "luck": 0.0}],
    ids=["almost all right", "seeds alike", "images alike", "nothing but noise"],
)
def test_in_other_worlds_no_more_exclude_zero(world):
    rng = np.random.default_rng(0)
    excluded = [interval(simulated(rng, 3, **world)).excludes_zero for _ in range(1000)]
    assert np.mean(excluded) <= 0.06  # the 5 % that are promised, and chance


@pytest.mark.parametrize(("seeds", "most"), [(2, 0.06), (3, 0.095)])
@pytest.mark.parametrize("luck", [0.05, 0.1, 0.2])
def test_where_the_luck_of_the_seeds_decides_no_more_exclude_zero_than_is_said(seeds, most, luck):
    rng = np.random.default_rng(0)
    excluded = [interval(simulated(rng, seeds, luck=luck)).excludes_zero for _ in range(1000)]
    assert np.mean(excluded) <= most


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_large_difference_is_mostly_found(seeds):
    """An interval so wide that it never excludes 0 would pass the tests above."""
    rng = np.random.default_rng(seeds)
    found = []
    for _ in range(300):
        table = simulated(rng, seeds)
        table[:, :80] += 1  # eight points more for the first arm
        found.append(interval(table).excludes_zero)
    assert np.mean(found) > 0.9


def test_a_table_without_numbers_has_no_interval():
    with pytest.raises(ValueError, match="finite numbers"):
        nl.interval(np.full((3, 50), np.nan))


def test_seeds_that_agree_by_chance_leave_the_noise_of_their_images():
    rng = np.random.default_rng(0)
    table = np.zeros((3, 10_000))
    for row in table:  # each seed has the same mean, 0, from images of its own
        row[rng.permutation(10_000)[:300]] = np.repeat([1, -1], 150)
    error = math.sqrt(300 / 10_000 / 10_000 / 3)
    assert interval(table).margin == pytest.approx(1.96 * error, rel=0.05)


def test_where_the_seeds_decide_it_is_student_s_t():
    rng = np.random.default_rng(0)
    by_seed = rng.normal(0.02, 0.01, 5)
    table = by_seed[:, None] + np.zeros((5, 400))
    t = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    found = interval(table)
    assert found.mean == pytest.approx(by_seed.mean())
    assert found.margin == pytest.approx((t.high - t.low) / 2)


def test_where_the_images_decide_it_is_their_standard_error():
    rng = np.random.default_rng(0)
    by_image = rng.integers(-1, 2, 5000).astype(float)
    table = np.tile(by_image, (4, 1))
    error = by_image.std(ddof=1) / math.sqrt(5000)
    assert interval(table).margin == pytest.approx(1.96 * error, rel=1e-3)


@pytest.mark.parametrize(("points", "least", "most"), [(0.2, 26, 28), (0.5, 6, 7)])
def test_seeds_needed_agree_with_the_power_of_a_paired_t_test(points, least, most):
    # Two arms whose seeds have a standard deviation of 0.25 points each.
    deviates = np.array([-1.0, 0.0, 1.0]) * 0.0025 * math.sqrt(2)
    table = (points / 100 + deviates)[:, None] + np.zeros((3, 100))
    found = interval(table)
    assert least <= found.needed <= most
    effect = points / 100 / deviates.std(ddof=1)
    for seeds, enough in ((found.needed, True), (found.needed - 1, False)):
        limit = stats.t.ppf(0.975, seeds - 1)
        power = stats.nct.sf(limit, seeds - 1, effect * math.sqrt(seeds))
        assert (power >= 0.8) == enough


def test_two_seeds_add_the_margins_of_seeds_and_images():
    chance = Chance(of_a_seed=2 * 0.003**2, of_images=0.004**2, of_cells=0.0, images=1000)
    by_seeds, by_images = stats.t.ppf(0.975, 1) * 0.003, stats.norm.ppf(0.975) * 0.004
    assert chance.margin(2) == pytest.approx(math.hypot(by_seeds, by_images))
    assert chance.power(0.03, 2) < 0.5 < chance.power(0.03, 5)


def test_no_number_of_seeds_makes_up_for_few_images():
    by_image = np.zeros(100)
    by_image[:11] = [1] * 6 + [-1] * 5
    assert interval(np.tile(by_image, (3, 1))).needed is None


@pytest.fixture(scope="module")
def results(tiny_assignment, tiny) -> nl.Results:
    """Three small networks with two seeds each."""
    return nl.run_assignment(tiny_assignment, data=tiny, seeds=2, progress=False)


def test_compare_takes_all_pairs_by_their_seeds(results, tiny):
    found = nl.compare(results)
    pairs = [(each.first, each.second) for each in found]
    assert pairs == [("BN + L1", "GN"), ("BN + L1", "LN"), ("GN", "LN")]
    for each in found:
        one, other = (results[label] for label in (each.first, each.second))
        gaps = [
            a.last["test_accuracy"] - b.last["test_accuracy"]
            for a, b in zip(one, other, strict=True)
        ]
        assert each.interval.mean == pytest.approx(np.mean(gaps))
        right = [(run.predicted == tiny.test_labels).numpy() for run in (one[0], other[0])]
        assert each.mcnemar == pytest.approx(mcnemar(*right))
        assert (each.seeds, each.images) == (2, len(tiny.test_labels))


def test_one_seed_or_one_variant_is_nothing_to_compare(results):
    alone = replace(results, runs={label: runs[:1] for label, runs in results.runs.items()})
    with pytest.raises(ValueError, match="have one seed in common"):
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


def difference(mean: float, margin: float, *, images: float = 0.0) -> nl.Difference:
    chance = Chance(of_a_seed=0.005**2, of_images=images, of_cells=0.0, images=10_000)
    return nl.Difference(
        "GN", "LN", nl.Interval(mean, margin, chance), 3, 10_000, 0.5, "toy images"
    )


def test_a_difference_says_itself_in_a_sentence():
    effect = 0.004 / 0.005  # 15 pairs tell it from 0 in 80 % of cases
    assert stats.nct.sf(stats.t.ppf(0.975, 14), 14, effect * math.sqrt(15)) > 0.8
    assert str(difference(0.004, 0.006)) == (
        "GN − LN = +0.40 ± 0.60 points over 3 seeds: not distinguishable; if it is as large as it "
        "looks, about 15 seeds would tell"
    )
    assert str(difference(-0.02, 0.006)).endswith(
        "-2.00 ± 0.60 points over 3 seeds: distinguishable"
    )
    few_images = difference(0.001, 0.01, images=0.004**2)
    assert str(few_images).endswith(
        "not distinguishable; a difference as small as this needs more than these 10,000 test "
        "images, however many seeds"
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
    with pytest.raises(ValueError, match="no differences"):
        nl.plot_compare([])


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 1), (5, 5), (0, 0), (0, 6), (40, 25)])
def test_mcnemar_is_the_sum_of_binomial_probabilities(only_first, only_second):
    both = 50
    first = np.array([True] * (both + only_first) + [False] * only_second)
    second = np.array([True] * both + [False] * only_first + [True] * only_second)
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_wants_to_know_what_is_right_rather_than_the_classes():
    labels, predicted = np.array([1, 2, 0, 3]), np.array([1, 0, 2, 3])
    with pytest.raises(TypeError, match="whether each image is right: run"):
        mcnemar(predicted, labels)
    with pytest.raises(TypeError, match="whether each image is right"):
        mcnemar(predicted == labels, predicted)
    assert mcnemar(predicted == labels, [True, False, True, True]) == 1.0


def test_mcnemar_wants_the_same_images():
    with pytest.raises(ValueError, match="tested on 3 and 4 images"):
        mcnemar([True] * 3, [False] * 4)
