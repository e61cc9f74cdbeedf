"""Which variants differ by more than the chance of seeds and test images, in all pairs together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import ArrayLike

from normlab.comparisons.intervals import Family, Interval, Sample
from normlab.experiment import Results
from normlab.support.checks import check_instance, one_of
from normlab.support.colours import background, text_colour
from normlab.support.figures import drawn, label_axes, literal, new_axes
from normlab.support.type_hints import Axes, Figure


@dataclass(frozen=True)
class Difference:
    """How far two variants, or two levels of a factor, lie apart in accuracy.

    Args:
        first, second: labels of the two.
        interval: of the accuracy of the first less that of the second, as fractions; all intervals
            of a comparison together are right with 95 % probability.
        seeds: how many each variant has, or the fewest that one has.
        images: how many were counted; 0 where only accuracies were given.
        mcnemar: p-value of McNemar's test on the first network of each, which says nothing about
            other seeds; None where there are more networks to a level, or no predictions.
        source: what the images are, as figures name them.
        method: what the interval's width is from.
        pairs: how many differences the comparison has.
        p: the p-value, for so many pairs: below 0.05 where the interval excludes 0.
        interaction: p-value of the test whether the difference is the same throughout a main
            effect; None elsewhere.
    """

    first: str
    second: str
    interval: Interval
    seeds: int
    images: int
    mcnemar: float | None
    source: str
    method: str
    pairs: int
    p: float
    interaction: float | None = None

    @property
    def pair(self) -> str:
        """The first less the second; in brackets a label that holds a plus or comma of its own."""
        labels = (self.first, self.second)
        return " − ".join(f"({label})" if set("+,") & set(label) else label for label in labels)

    def __str__(self) -> str:
        mean, margin = 100 * self.interval.mean, 100 * self.interval.margin
        verdict = "significantly different"
        if not self.interval.excludes_zero:
            verdict = (
                f"not significantly different; {self.seeds} seeds would show a difference of "
                f"{100 * self.interval.detectable:.2f} points with 80 % probability"
            )
        grounds = [
            _p_value(self.p),
            f"{self.method}, {self.pairs} pair{'s' if self.pairs > 1 else ''}",
        ]
        if self.interaction is not None:
            grounds.append(f"interaction: {_p_value(self.interaction)}")
        grounds += [] if self.images else ["seeds alone"]
        found = f"{self.pair} = {mean:+.2f} ± {margin:.2f} points over {self.seeds} seeds"
        return f"{found}: {verdict} ({'; '.join(grounds)})"


def _p_value(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def compare(
    results: Results | Mapping[str, ArrayLike], pairs: Iterable[tuple[str, str]] | None = None
) -> list[Difference]:
    """The differences between variants, with intervals that all hold together with 95 %.

    The variance between seeds is pooled over all variants; that of the test images, which are the
    same for all, is each pair's own. Satterthwaite's formula gives their sum's degrees of freedom,
    Tukey's studentized range the width for all pairs ("Tukey–Kramer"). Where one spread is larger
    than the others by Cochran's test (at a level of 40 %, since few seeds show so little), the
    variants' own spreads with Welch's degrees of freedom give another width ("Games–Howell"), and
    the larger counts. For a few chosen pairs Bonferroni's width is taken where it is smaller.

    In simulations without a difference 2 to 7 % of the comparisons find one, with three seeds or
    more. With two it is 1 to 7 %, but up to 11 % where one variant's spread is four times that of
    the others, which two seeds cannot show.

    Args:
        results: of `run_assignment`; or for each label which images each seed got right, bool
            (seeds, images), or the seeds' accuracies alone, as fractions (seeds,): then the
            chance of the images is left out.
        pairs: which to compare, chosen before looking at them; all if left out.

    Sources: Kramer, "Extension of multiple range tests to group means with unequal numbers of
    replications", 1956; Games & Howell, "Pairwise multiple comparison procedures with unequal n's
    and/or variances", 1976; Satterthwaite, "An approximate distribution of estimates of variance
    components", 1946; Cochran, "The distribution of the largest of a set of estimated variances as
    a fraction of their total", 1941.
    Raises `ValueError` for fewer than two variants, a variant with one seed, and variants that
    were not tested on the same images.
    """
    tables = _tables(results)
    chosen = list(combinations(tables, 2) if pairs is None else pairs)
    return _differences(tables, {label: [label] for label in tables}, chosen, _source(results))


def main_effects(
    results: Results | Mapping[str, ArrayLike] | Sequence[Results],
    levels: Mapping[str, Sequence[str]],
) -> list[Difference]:
    """What the levels of a factor are worth on average, for all pairs of levels.

        nl.main_effects(results, {"skip": ["BN + skip", "GN + skip"], "no skip": ["BN", "GN"]})

    A level's accuracy is the mean of its variants, so all their runs count; the intervals are made
    as those of `compare`. `interaction` says whether the difference depends on the variant (an F
    test): where it is significant, the mean alone says little.

    Args:
        results: as for `compare`, or several results with the same test images, each of which
            counts with those variants that it has.
        levels: the labels of each level's variants, in the same order for all levels.

    Raises `ValueError` for levels of different lengths, and for variants that are not there.
    """
    several = results if isinstance(results, list | tuple) else [results]
    found = [_tables(each) for each in several]
    if len({each.data.fingerprint for each in several if isinstance(each, Results)}) > 1:
        raise ValueError("the results are of different data: there is no common test set")
    if len({len(labels) for labels in levels.values()}) > 1 or not all(levels.values()):
        counts = ", ".join(str(len(labels)) for labels in levels.values())
        raise ValueError(f"give as many variants for each level, at least one, not {counts}")
    tables: dict[str, np.ndarray] = {}
    members: dict[str, list[str]] = {level: [] for level in levels}
    for row in zip(*levels.values(), strict=True):
        places = [place for place, labels in enumerate(found) if set(row) <= set(labels)]
        if not places:
            raise ValueError(f"none of the results has all of {', '.join(row)}")
        for place, (level, label) in product(places, zip(levels, row, strict=True)):
            tables[f"{label} ({place})"] = found[place][label]
            members[level].append(f"{label} ({place})")
    return _differences(tables, members, list(combinations(levels, 2)), _source(several[0]))


def _tables(results: Results | Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """For each label which images its seeds got right, or how many; raises for what is neither."""
    if not isinstance(results, Results):
        check_instance(results, Mapping, "results", "nl.run_assignment(…) gives them")
        return {label: np.asarray(table) for label, table in results.items()}
    for label, run in ((label, run) for label, runs in results.runs.items() for run in runs):
        if run.identity["data"]["fingerprint"] != results.data.fingerprint:
            raise ValueError(
                f"{label}, seed {run.recipe.seed}, was trained and tested on other images than "
                f"those of {results.data.source}: there is no common test set to compare on"
            )
    labels = results.data.test_labels
    return {
        label: np.stack([(run.predicted == labels).numpy() for run in runs])
        for label, runs in results.runs.items()
    }


def _source(results: Results | Mapping[str, ArrayLike]) -> str:
    return results.data.source if isinstance(results, Results) else ""


def _differences(
    tables: Mapping[str, np.ndarray],
    levels: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    source: str,
) -> list[Difference]:
    """The differences between levels, each of which is the mean of some of the tables."""
    if len(levels) < 2 or not pairs:
        raise ValueError("a comparison takes at least two variants")
    _check(tables)
    sample, family = Sample.of(list(tables.values())), Family(len(levels), len(pairs))
    rows = dict(zip(tables, np.eye(len(tables)), strict=True))
    found = []
    for pair in pairs:
        first, second = (levels[one_of(level, levels, "variant")] for level in pair)
        gaps = np.stack([rows[a] - rows[b] for a, b in zip(first, second, strict=True)])
        interval, method = family.interval(sample, gaps.mean(0))
        some = [tables[label] for label in (*first, *second)]
        with_images = len(some) == 2 and all(t.ndim == 2 and t.dtype == bool for t in some)
        about = {
            "interval": interval,
            "method": method,
            "p": family.p(interval),
            "interaction": sample.interaction(gaps) if len(gaps) > 1 else None,
            "seeds": min(map(len, some)),
            "images": sample.images,
            "mcnemar": mcnemar(*(table[0] for table in some)) if with_images else None,
        }
        found.append(Difference(*pair, source=source, pairs=len(pairs), **about))
    return found


def _check(tables: Mapping[str, np.ndarray]) -> None:
    """Raises `ValueError` for tables that cannot be compared."""
    for label, table in tables.items():
        if table.ndim not in (1, 2) or table.dtype.kind not in "biuf":
            raise ValueError(
                f"{label} must be a table (seeds, images) or accuracies (seeds,), not {table!r:.60}"
            )
        if len(table) < 2:
            raise ValueError(
                f"{label} has one seed, which cannot tell a difference from chance: train with "
                "seeds=3 or more"
            )
        if not ((table >= 0) & (table <= 1)).all():  # NaN is neither
            raise ValueError(f"{label} must hold fractions from 0 to 1, not {table!r:.60}")
        if 1 in table.shape[1:]:
            raise ValueError(f"{label} was tested on one image: give at least two images")
    if len({table.shape[1:] for table in tables.values()}) > 1:
        raise ValueError("the variants were not tested on the same images")


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
    """The intervals of `compare` or `main_effects` in rows: filled where they exclude 0."""
    if not differences:
        raise ValueError("there are no differences to plot")
    for each in differences:
        check_instance(each, Difference, "a difference", "nl.compare(…) gives a list of them")
    ax = ax if ax is not None else new_axes(6.4, 1.4 + 0.38 * len(differences))
    for row, each in enumerate(differences):
        colour = "#0072B2" if each.interval.excludes_zero else "#767676"
        fill = colour if each.interval.excludes_zero else background()
        mean, margin = (100 * value for value in (each.interval.mean, each.interval.margin))
        ax.errorbar(mean, row, xerr=margin, fmt="o", color=colour, markerfacecolor=fill, capsize=3)
    counts = sorted({str(each.seeds) for each in differences}, key=int)
    sources = sorted({each.source for each in differences} - {""})
    title = ", ".join([f"Differences over {' or '.join(counts)} seeds", *sources])
    ax.locator_params(axis="x", nbins=6)  # more labels would touch
    label_axes(ax, title, "difference of test accuracy (points), with 95 % intervals", "")
    ax.axvline(0, color=text_colour(), linewidth=0.8)
    ax.set_yticks(range(len(differences)), [literal(each.pair) for each in differences])
    ax.set_ylim(len(differences) - 0.4, -0.6)
    ax.grid(False, axis="y")
    return ax.figure
