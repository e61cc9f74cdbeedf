"""Intervals for means over seeds and images: their errors, and the widths that many need together.

The model: whether a network of a variant with some seed classifies an image correctly depends on
the variant, on the image (for all variants alike, which cancels in differences), on how the image
suits the variant, on the luck of the seed, and on noise. So an error has a part of the seeds and a
part of the images. Seeds are not paired: networks of one seed agree no more than others do. Nor is
the noise of the single images the least that seeds may differ by: a network that takes more images
for cats is right about more cats and fewer dogs, and its mistakes cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np

CONFIDENCE, POWER = 0.95, 0.8
UNEQUAL = 0.4  # the level of the test of equal spreads: a few seeds show unequal ones so rarely


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and images with its 95 % interval, mean ± margin.

    Args:
        mean: what was measured.
        margin: half the width of the interval.
        error: standard error of the mean.
        freedom: degrees of freedom of the error.
    """

    mean: float
    margin: float
    error: float
    freedom: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return abs(self.mean) > self.margin

    @property
    def detectable(self) -> float:
        """How large a true mean must be so that such an interval excludes 0 in 80 % of cases."""
        from scipy import optimize, stats

        if not self.error:
            return 0.0
        limit = self.margin / self.error
        power = partial(stats.nct.sf, limit, self.freedom)  # of a true mean, in standard errors
        return self.error * optimize.brentq(lambda mean: power(mean) - POWER, 0, 3 * limit + 3)


def interval(table: np.ndarray) -> Interval:
    """The mean of a table (seeds, images) with a 95 % interval for other seeds and images.

    The variance of the images is estimated from the two-way layout without replication: what the
    images differ by beyond the noise of single cells. This interval stands by itself: of many such
    intervals some exclude 0 by chance, and `compare` makes those that hold together. In simulations
    without a difference up to 8 % exclude 0 with 3 seeds, and up to 9 % with 2, whose spread is all
    but unknown.

    Source: Satterthwaite, "An approximate distribution of estimates of variance components", 1946.
    Raises `ValueError` unless there are two seeds and two images at least, and for NaN.
    """
    table = np.asarray(table)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"an interval needs at least 2 seeds by 2 images, not {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("an interval needs a table of finite numbers, without NaN")
    return Family(levels=2, pairs=1).interval(Sample.of([table]), np.ones(1))[0]


@dataclass(frozen=True)
class Sample:
    """The means of some variants, and what makes them uncertain.

    Args:
        seeds: how many each variant has, (V,).
        means: the variants' means, (V,).
        of_seeds: variance between the means of a variant's seeds, (V,).
        of_cells: the part of it that is the noise of single cells, (V,); 0 if it is not known.
        of_images: covariance of the means for other images, (V, V); 0 if it is not known.
        images: how many, or 0 if only the seeds' means are known.
    """

    seeds: np.ndarray
    means: np.ndarray
    of_seeds: np.ndarray
    of_cells: np.ndarray
    of_images: np.ndarray
    images: int

    @classmethod
    def of(cls, tables: Sequence[np.ndarray]) -> Sample:
        """From tables (seeds, images) of the same images, or from means of seeds (seeds,)."""
        seeds = np.array([len(table) for table in tables])
        by_seed = [table.reshape(len(table), -1).mean(1) for table in tables]
        means = np.array([each.mean() for each in by_seed])
        of_seeds = np.array([each.var(ddof=1) for each in by_seed])
        if tables[0].ndim == 1:
            unknown = np.zeros(len(seeds))
            return cls(seeds, means, of_seeds, unknown, np.diag(unknown), 0)
        images = tables[0].shape[1]
        of_cells = np.array([_noise(table) for table in tables]) / images
        by_image = np.atleast_2d(np.cov([table.mean(0) for table in tables])) / images
        return cls(seeds, means, of_seeds, of_cells, by_image - np.diag(of_cells / seeds), images)

    @cached_property
    def is_unequal(self) -> bool:
        """Whether one spread is larger than the others by Cochran's test at level `UNEQUAL`."""
        from scipy import stats

        spare = self.seeds - 1
        squares = self.of_seeds * spare
        if len(squares) < 2 or not squares.any():
            return False
        parts = stats.beta.sf(squares / squares.sum(), spare / 2, (spare.sum() - spare) / 2)
        return bool(len(squares) * parts.min() < UNEQUAL)

    def spreads(self, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
        """Variances of the seeds and of the cells, (V,): the same for all where they are pooled."""
        both = (self.of_seeds, self.of_cells)
        if pooled:
            means = (np.average(each, weights=self.seeds - 1) for each in both)
            both = tuple(np.full(len(self.seeds), mean) for mean in means)
        return both

    def error(self, contrast: np.ndarray, pooled: bool) -> tuple[float, float]:
        """Standard error of a sum of means with these factors, and Satterthwaite's freedom.

        A few seeds that lie close by chance must not hand all weight to the many images, so for
        the degrees of freedom their variance is at least the noise of the cells.
        """
        of_seeds, of_cells = self.spreads(pooled)
        shares, spare = contrast**2 / self.seeds, self.seeds - 1
        parts = shares * np.maximum(of_seeds, of_cells)
        of_images = max(float(contrast @ self.of_images @ contrast), 0.0)
        square = parts.sum() ** 2 / spare.sum() if pooled else (parts**2 / spare).sum()
        square += of_images**2 / max(self.images - 1, 1)
        freedom = (parts.sum() + of_images) ** 2 / square if square else spare.sum()
        return math.sqrt(shares @ of_seeds + of_images), float(freedom)

    def interaction(self, contrasts: np.ndarray) -> float:
        """p-value of Wald's F test whether several contrasts (K, V) have the same value."""
        from scipy import stats

        pooled = not self.is_unequal
        gaps = contrasts[:-1] - contrasts[1:]
        least = np.maximum(*self.spreads(pooled)) / self.seeds
        covariance = gaps @ (np.diag(least) + self.of_images) @ gaps.T
        distances = gaps @ self.means
        wald = distances @ np.linalg.pinv(covariance) @ distances / len(gaps)
        return float(stats.f.sf(wald, len(gaps), self.error(contrasts.mean(0), pooled)[1]))


def _noise(table: np.ndarray) -> float:
    """Variance of a table's cells beyond what seeds and images explain."""
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float((rest**2).sum() / (len(table) - 1) / (table.shape[1] - 1))


@dataclass(frozen=True)
class Family:
    """`pairs` of some `levels`, whose intervals shall hold together with 95 %."""

    levels: int
    pairs: int

    def interval(self, sample: Sample, contrast: np.ndarray) -> tuple[Interval, str]:
        """The interval of a sum of means with these factors, and the name of its method.

        It is the wider of those with pooled spreads and, if they are unequal, with their own. The
        second alone holds too seldom with three seeds, whose spreads are hardly known, and the
        first where one spread is much larger than the others.
        """
        ways = (True, False) if sample.is_unequal else (True,)
        found = [self._interval(sample, contrast, pooled) for pooled in ways]
        return max(found, key=lambda each: each[0].margin)

    def _interval(self, sample: Sample, contrast: np.ndarray, pooled: bool) -> tuple[Interval, str]:
        from scipy import stats

        error, freedom = sample.error(contrast, pooled)
        freedom = _rounded(freedom)
        by_range = _range(self.levels, freedom)
        by_pairs = float(stats.t.isf((1 - CONFIDENCE) / 2 / self.pairs, freedom))
        few = by_pairs < by_range and self.pairs < math.comb(self.levels, 2)
        names = _METHODS["one" if self.levels == 2 else "few" if few else "all"]
        margin = min(by_range, by_pairs) * error
        interval = Interval(float(contrast @ sample.means), margin, error, freedom)
        return interval, names[not pooled]

    def p(self, interval: Interval) -> float:
        """The p-value for so many pairs: below 0.05 where the interval excludes 0."""
        from scipy import stats

        if not interval.error:
            return 0.0 if interval.mean else 1.0
        distance, freedom = abs(interval.mean) / interval.error, interval.freedom
        by_range = stats.studentized_range.sf(distance * math.sqrt(2), self.levels, freedom)
        by_pairs = 2 * self.pairs * stats.t.sf(distance, freedom)
        return float(min(by_range, by_pairs, 1.0))


# By the pairs that the width is for: with pooled spreads, and with their own.
_METHODS = {
    "all": ("Tukey–Kramer", "Games–Howell"),
    "few": ("Bonferroni", "Bonferroni with Welch's degrees of freedom"),
    "one": ("Student's t", "Welch's t"),
}


def _rounded(freedom: float) -> float:
    """Down to two digits, as tables have them: so few are slow to look up."""
    step = 10.0 ** (math.floor(math.log10(freedom)) - 1)
    return math.floor(freedom / step + 1e-6) * step


@cache
def _range(levels: int, freedom: float) -> float:
    """How many standard errors a difference of two of the levels is below with 95 %."""
    from scipy import stats

    return float(stats.studentized_range.ppf(CONFIDENCE, levels, freedom)) / math.sqrt(2)
