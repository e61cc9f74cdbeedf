"""Whether variants differ by more than chance: the chance of the seeds and of the test images."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from normlab.checks import instance
from normlab.experiment import Results
from normlab.figures import drawn, ink, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIDENCE, POWER = 0.95, 0.8
BEYOND = (1 + CONFIDENCE) / 2  # as much lies below the upper end of an interval
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and images with its 95 % interval, mean ± margin.

    Args:
        mean: of the table that was given.
        margin: half the width of the interval.
        chance: what seeds and images contribute to it.
    """

    mean: float
    margin: float
    chance: Chance

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return abs(self.mean) > self.margin

    @property
    def needed(self) -> int | None:
        """Seeds with which an experiment like this one would tell such a mean from 0.

        That is in 80 % of cases; None where no number would, because so few images leave it open.
        """
        return self.chance.seeds_needed(self.mean)


@dataclass(frozen=True)
class Difference:
    """How far two variants lie apart in test accuracy after the last epoch.

    Args:
        first, second: labels of the variants.
        interval: of the accuracy of the first less that of the second, as fractions.
        seeds, images: how many of each it rests on.
        mcnemar: p-value of McNemar's test on the two networks of the first seed, which says
            nothing about other seeds.
        source: what the images are, as figures name them.
    """

    first: str
    second: str
    interval: Interval
    seeds: int
    images: int
    mcnemar: float
    source: str

    @property
    def pair(self) -> str:
        """The first less the second; in brackets a label that holds a plus of its own."""
        labels = (self.first, self.second)
        return " − ".join(f"({label})" if "+" in label else label for label in labels)

    def __str__(self) -> str:
        mean, margin = (100 * value for value in (self.interval.mean, self.interval.margin))
        found = f"{self.pair} = {mean:+.2f} ± {margin:.2f} points"
        found += f" over {self.seeds} seeds"
        if self.interval.excludes_zero:
            return f"{found}: distinguishable"
        needed = self.interval.needed
        if needed is None:
            return (
                f"{found}: not distinguishable; a difference as small as this needs more than "
                f"these {self.images:,} test images, however many seeds"
            )
        return (
            f"{found}: not distinguishable; if it is as large as it looks, about {needed:,} seeds "
            "would tell"
        )


def compare(results: Results) -> list[Difference]:
    """The differences between all pairs of variants, each with its 95 % interval.

    Runs are paired by their seeds, which gave them the same initial weights and order of images.
    Each interval stands by itself: of many pairs some exclude 0 by chance.

    Raises `ValueError` for fewer than two variants or two seeds, and for variants that were not
    tested on the same images.
    """
    instance(results, Results, "results", "nl.run_assignment(…) gives them")
    if len(results.runs) < 2:
        raise ValueError("a comparison takes at least two variants")
    _check_images(results)
    return [_difference(results, *pair) for pair in combinations(results.runs, 2)]


def _check_images(results: Results) -> None:
    """Raises `ValueError` if a variant was not tested on the images of the results."""
    for label, runs in results.runs.items():
        for run in runs:
            if run.config["is"]["data"]["fingerprint"] != results.data.fingerprint:
                raise ValueError(
                    f"{label}, seed {run.recipe.seed}, was trained and tested on other images than "
                    f"those of {results.data.source}: there is no common test set to compare on"
                )


def _difference(results: Results, first: str, second: str) -> Difference:
    labels = results.data.test_labels
    one, other = (
        {run.recipe.seed: (run.predicted == labels).numpy() for run in results.runs[label]}
        for label in (first, second)
    )
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        raise ValueError(
            f"{first} and {second} have {'one seed' if seeds else 'no seed'} in common, which "
            "cannot tell a difference from chance: train with seeds=3 or more"
        )
    table = np.stack([one[seed].astype(float) - other[seed] for seed in seeds])
    p = mcnemar(one[seeds[0]], other[seeds[0]])
    return Difference(first, second, interval(table), *table.shape, p, results.data.source)


def interval(table: np.ndarray) -> Interval:
    """The mean of a table (seeds, images) with a 95 % interval for other seeds and images.

    The error of the mean has two parts: that of the seeds, which is the spread of the seeds' own
    means, and that of the images, whose variance is estimated from the two-way layout without
    replication (what the images differ by beyond the noise of single cells). Satterthwaite's
    formula gives the degrees of freedom of their sum, so that Student's t holds for few seeds.
    Seeds that lie close by chance do not make it narrower than the noise of single cells allows,
    which is known from many images.

    In simulations without a difference 2 to 6 % of the intervals exclude 0, but up to 8 % of those
    over 3 seeds where the luck of the seeds decides. For 2 seeds, with which the formula would be
    too sure, seeds and images have margins of their own that are added in squares: at most 5 %.

    Source: Satterthwaite, "An approximate distribution of estimates of variance components", 1946.
    Raises `ValueError` unless there are two seeds and two images at least, and for NaN.
    """
    if np.ndim(table) != 2 or min(np.shape(table)) < 2:
        raise ValueError(
            f"an interval needs at least 2 seeds by 2 images, not a table of {np.shape(table)}"
        )
    if not np.isfinite(table).all():
        raise ValueError("an interval needs a table of finite numbers, without NaN")
    seeds, images = table.shape
    by_seed, by_image, mean = table.mean(1), table.mean(0), float(table.mean())
    cells = ((table - by_seed[:, None] - by_image + mean) ** 2).sum() / (seeds - 1) / (images - 1)
    of_images = max(by_image.var(ddof=1) - cells / seeds, 0.0) / images
    chance = Chance(float(by_seed.var(ddof=1)), float(of_images), cells / images, images)
    return Interval(mean, chance.margin(seeds), chance)


@dataclass(frozen=True)
class Chance:
    """Variance of one seed's mean, and what the `images` add to it however many seeds there are.

    `of_cells` is the least that the first can be: the noise of single cells alone.
    """

    of_a_seed: float
    of_images: float
    of_cells: float
    images: int

    def margin(self, seeds: int) -> float:
        """Half the width of the 95 % interval of the mean over so many seeds."""
        from scipy import stats

        least = math.sqrt(self.of_cells / seeds + self.of_images)
        return float(
            max(self._margin(self.of_a_seed / seeds, seeds), stats.norm.ppf(BEYOND) * least)
        )

    def _margin(self, of_seeds: float, seeds: int) -> float:
        """The margin where so many seeds add this to the variance of the mean."""
        from scipy import stats

        if seeds > 2:
            limit = stats.t.ppf(BEYOND, self.freedom(seeds))
            return float(limit * math.sqrt(of_seeds + self.of_images))
        # Two seeds that lie close by chance would let the images decide how sure the sum is.
        by_seeds = stats.t.ppf(BEYOND, seeds - 1) * math.sqrt(of_seeds)
        return math.hypot(by_seeds, stats.norm.ppf(BEYOND) * math.sqrt(self.of_images))

    def freedom(self, seeds: int) -> float:
        """Satterthwaite's degrees of freedom of the error's square.

        A few seeds that lie close by chance must not hand all weight to the many images.
        """
        of_seeds = self._of_seeds(seeds)
        squares = of_seeds**2 / (seeds - 1) + self.of_images**2 / (self.images - 1)
        return (of_seeds + self.of_images) ** 2 / squares if squares else seeds - 1.0

    def _of_seeds(self, seeds: int) -> float:
        """What so many seeds add to the variance of the mean: no less than it can be."""
        return max(self.of_a_seed, self.of_cells) / seeds

    def power(self, mean: float, seeds: int) -> float:
        """How probable it is that the interval over so many seeds excludes 0."""
        from scipy import stats

        error = math.sqrt(self._of_seeds(seeds) + self.of_images)
        limit = self._margin(self._of_seeds(seeds), seeds) / error
        return float(stats.nct.sf(limit, self.freedom(seeds), abs(mean) / error))

    def seeds_needed(self, mean: float) -> int | None:
        """The fewest seeds of enough power, up to `MOST_SEEDS`."""
        if not mean or not self._of_seeds(1) + self.of_images:
            return None
        enough = partial(self._is_enough, mean)
        place = bisect_left(range(2, MOST_SEEDS + 1), True, key=enough)
        return place + 2 if enough(place + 2) else None

    def _is_enough(self, mean: float, seeds: int) -> bool:
        return self.power(mean, seeds) >= POWER


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """p-value of McNemar's exact test: are two networks equally often right on the same images?

    Of the images that only one of the two gets right, each network would have half by chance.

    Args:
        first, second: whether each test image is classified rightly, bool (N,).

    Raises `TypeError` for anything but bool, and `ValueError` for different images.
    """
    from scipy import stats

    first, second = np.asarray(first), np.asarray(second)
    if not first.dtype == second.dtype == bool:  # classes would all but 0 pass for True
        raise TypeError("give whether each image is right: run.predicted == data.test_labels")
    if first.shape != second.shape:
        raise ValueError(f"the networks were tested on {first.size} and {second.size} images")
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    differing = int(only_first + only_second)
    return float(stats.binomtest(int(only_first), differing).pvalue) if differing else 1.0


@drawn
def plot_compare(differences: Sequence[Difference], *, ax: Axes | None = None) -> Figure:
    """The intervals of `compare`, one below the other: filled where they exclude 0."""
    from matplotlib import pyplot

    if not differences:
        raise ValueError("there are no differences to plot")
    for each in differences:
        instance(each, Difference, "a difference", "nl.compare(…) gives a list of them")
    if ax is None:
        size = (6.4, 1.4 + 0.38 * len(differences))
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    for row, each in enumerate(differences):
        colour = "#0072B2" if each.interval.excludes_zero else "#767676"
        fill = colour if each.interval.excludes_zero else paper()
        mean, margin = (100 * value for value in (each.interval.mean, each.interval.margin))
        ax.errorbar(mean, row, xerr=margin, fmt="o", color=colour, markerfacecolor=fill, capsize=3)
    names = [each.pair for each in differences]
    ax.axvline(0, color=ink(), linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("difference of test accuracy (points), with its 95 % interval")
    counts = sorted({each.seeds for each in differences})
    sources = ", ".join(sorted({each.source for each in differences}))
    ax.set_title(f"Differences over {' or '.join(map(str, counts))} seeds, {sources}")
    ax.grid(axis="x", alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.figure
