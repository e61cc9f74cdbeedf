"""The usual mistakes in a normalization, as data: each is one change to the right formula.

A formula has a few places (which numbers share a mean, what the variance divides by, …), and a
mistake puts something else in one of them. So what it computes can be computed, and two mistakes
together as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from normlab.lessons.by_hand import example_batch
from normlab.lessons.checking import Mistake, explanations, mistakes_at
from normlab.norms import EPSILON, NORMS


class Sharing(NamedTuple):
    """Which numbers of x (N, C, H, W) share a mean.

    Args:
        words: as in "over N only".
        axes: the axes of the mean, after the following.
        shape: what x is reshaped to, of N, C, H, W, of groups G and of -1.
        order: of the axes of x before that.
    """

    words: str
    axes: tuple[int, ...]
    shape: str = "N C H W"
    order: str = "NCHW"

    def arrange(self, x: Tensor, groups: int) -> Tensor:
        sizes = dict(zip("NCHW", x.shape, strict=True)) | {"G": groups, "-1": -1}
        x = x.permute(*map("NCHW".index, self.order))
        return x if self.shape == "N C H W" else x.reshape([sizes[s] for s in self.shape.split()])


def _over(names: tuple[str, ...]) -> Sharing:
    *most, last = names
    words = f"{', '.join(most)} and {last}" if most else f"{last} only"
    return Sharing(f"over {words}", tuple(map("NCHW".index, names)))


_SUBSETS = [_over(names) for size in (1, 2, 3, 4) for names in combinations("NCHW", size)]
_BLOCKS, _STRIDED = "N G -1 H W", "N -1 G H W"
_OF_BLOCKS = Sharing("over H, W and the C/G channels of a block", (2, 3, 4), _BLOCKS)
_GROUPINGS = {
    "groups interleaved": (
        "over H, W and every G-th channel, not C/G neighbours",
        (1, 3, 4),
        _STRIDED,
    ),
    "group size for number": ("over groups of G channels instead of G groups", (2, 3, 4), _STRIDED),
    "groups of interleaved channels": ("over H, W and the groups", (1, 3, 4), _BLOCKS),
    "groups over the batch": ("over N too: groups of all images", (0, 2, 3, 4), _BLOCKS),
    "groups without positions": ("over the channels of a group only", (2,), _BLOCKS),
}
_RESHAPED = {"C -1": 1, "-1 C": 0, "-1 N": 0, "G -1": 1, "-1 G": 0, "N -1 G": 1, "N -1 C": 1}
_RESHAPED |= {"G N -1": 2, "C N -1": 2}  # the axis of the mean after such a reshape
_PERMUTED = (("CNHW", (1, 2, 3)), ("NHWC", (0, 1, 2)), ("NHWC", (1, 2, 3)))
_MIXED = [
    Sharing(f"over axis {axis} after reshape to ({shape}), which mixes axes", (axis,), shape)
    for shape, axis in _RESHAPED.items()
] + [
    Sharing(f"after a permutation to {order} that is not undone", axes, order=order)
    for order, axes in _PERMUTED
]


class Case(NamedTuple):
    """What a formula is given: x (N, C, H, W), and vectors of shapes that broadcast along it."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    groups: int
    mean: Tensor | None = None  # the running ones
    var: Tensor | None = None


@dataclass(frozen=True)
class Formula:
    """A normalization with its places; the defaults are right for all, but for `sharing`."""

    sharing: Sharing
    variance_sharing: Sharing | None = None  # where it is not that of the mean
    running: bool = False  # whether the running statistics are used, where there are any
    keepdim: bool = True  # whether the statistics keep their axes, to be broadcast along them
    center: Callable[[Tensor, Tensor], Tensor] = torch.sub
    moment: Callable[[Tensor, tuple], Tensor] = lambda x, axes: x.var(axes, False, keepdim=True)
    divisor: Callable[[Tensor], Tensor] = lambda v: (v + EPSILON).sqrt()
    affine: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, w, b: y * w + b
    detached: tuple[str, ...] = ()

    def __call__(self, case: Case) -> Tensor | None:
        """The output; None where the formula does not fit the shapes."""
        try:
            x, mean, variance = self._statistics(case)
            y = self.center(x, mean) / self.divisor(variance)
            return self.affine(y.reshape(case.x.shape), case.scale, case.shift)
        except RuntimeError:
            return None

    def _statistics(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """x as it is arranged, and its mean and variance."""
        if self.running and case.mean is not None:
            return case.x, case.mean, case.var
        axes, other = self.sharing.axes, self.variance_sharing
        x, mean, variance = _moments(case.x, case.groups, self.sharing, other, self.moment)
        mean = mean.detach() if "mean" in self.detached else mean
        variance = variance.detach() if "variance" in self.detached else variance
        if not self.keepdim:
            mean, variance = mean.squeeze(axes), variance.squeeze(axes)
        return x, mean, variance


@lru_cache(1000)  # formulas by the thousand differ in other places
def _moments(
    x: Tensor, groups: int, sharing: Sharing, other: Sharing | None, moment: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """x as it is arranged, its mean, and its variance, which may be shared otherwise."""
    arranged = sharing.arrange(x, groups)
    mean = arranged.mean(sharing.axes, keepdim=True)
    if other is None:
        return arranged, mean, moment(arranged, sharing.axes)
    return arranged, mean, sharing.arrange(moment(x, other.axes).expand_as(x), groups)


_RATIO = "the deviation is divided by the root of (variance + epsilon)"
_SHARES = (
    "running statistics become (1 − momentum) · old + momentum · batch; momentum is small, as 0.1"
)
_MOMENTS = {
    "unbiased variance": (
        "the variance is divided by n − 1; a normalization divides it by n",
        lambda x, axes: x.var(axes, True, keepdim=True),
    ),
    "sum instead of variance": (
        "the squared deviations are summed up but not divided by their number n",
        lambda x, axes: (x - x.mean(axes, True)).square().sum(axes, True),
    ),
    "variance about zero": (
        "the variance is the mean of x², without the mean subtracted from x before",
        lambda x, axes: x.square().mean(axes, True),
    ),
    "mean absolute deviation": (
        "the mean of |x − mean| is taken for the standard deviation, the root of the mean square",
        lambda x, axes: (x - x.mean(axes, True)).abs().mean(axes, True).square(),
    ),
    "mean not squared": (
        "the mean of x² less the mean is taken for the variance, the mean of x² less the mean²",
        lambda x, axes: x.square().mean(axes, True) - x.mean(axes, True),
    ),
}
_DIVISORS = {
    "epsilon outside the root": ("epsilon is added outside the root", lambda v: v.sqrt() + EPSILON),
    "epsilon missing": (f"epsilon, {EPSILON:g}, is missing, or too small", lambda v: v.sqrt()),
    "epsilon squared": ("epsilon is squared", lambda v: (v + EPSILON**2).sqrt()),
    "variance instead of standard deviation": ("the root is missing", lambda v: v + EPSILON),
    "multiplied by the standard deviation": (
        "it is multiplied, not divided",
        lambda v: v.add(EPSILON).rsqrt(),
    ),
    "root taken twice": ("the root is taken twice", lambda v: (v.sqrt() + EPSILON).sqrt()),
    "not divided by the standard deviation": ("nothing is divided", torch.ones_like),
}
_CENTERS = {
    "mean not subtracted": ("the mean is not subtracted from x first", lambda x, mean: x),
    "mean added": ("the mean is added to x instead of subtracted from it", torch.add),
}
_AFFINE = {
    "scale and shift swapped": ("scale and shift are exchanged", lambda y, w, b: y * b + w),
    "shift before scale": ("the shift is added before the scale", lambda y, w, b: (y + b) * w),
    "scale and shift missing": ("scale and shift are unused", lambda y, w, b: y + 0 * (w + b)),
    "shift missing": ("the shift is not added", lambda y, w, b: y * w + 0 * b),
    "scale missing": ("the scale is not used", lambda y, w, b: y + b + 0 * w),
    "shift subtracted": ("the shift is subtracted", lambda y, w, b: y * w - b),
    "one plus scale": ("1 + scale stands for the scale", lambda y, w, b: y * (1 + w) + b),
}
_ALONG = "broadcast along the last axis, W, instead of the channels"
_STATISTICS = f"mean and variance are {_ALONG}: keepdim=True keeps their axes"
_VECTORS = f"scale and shift are {_ALONG}: give them the shape (1, C, 1, 1)"
_WIDTH = {
    "scale and shift along the wrong axis": (
        _VECTORS,
        lambda y, w, b: y * w.flatten() + b.flatten(),
    ),
}
# Only where C, H and W are equal does torch broadcast along the wrong axis without an error.
_BROADCAST = [
    *mistakes_at("keepdim", {"statistics along the wrong axis": (_STATISTICS, False)}),
    *mistakes_at("affine", _WIDTH),
]
_PLACES = [
    *mistakes_at("moment", _MOMENTS),
    *mistakes_at("divisor", _DIVISORS, rule=_RATIO),
    *mistakes_at("center", _CENTERS, rule=_RATIO),
    *mistakes_at("affine", _AFFINE, rule="the output is scale · normalized + shift"),
]
_NO_ROOT = {"variance instead of standard deviation": ("the root is missing", lambda v: v)}
_PLACES += mistakes_at("divisor", _NO_ROOT, rule=_RATIO)
for size in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9):
    said = f"epsilon is {size:g}, not {EPSILON:g}"
    rows = {
        "epsilon of another size": (said, lambda v, size=size: (v + size).sqrt()),
        "epsilon outside the root": (f"{said}, and outside", lambda v, size=size: v.sqrt() + size),
    }
    _PLACES += mistakes_at("divisor", rows, rule=_RATIO)
_RUNNING = "in training x is normalized by the running statistics instead of by the batch's"
_BATCH = "in evaluation x is normalized by the batch's statistics instead of by the running ones"
USED_IN_TRAINING = mistakes_at("running", {"running statistics used in training": (_RUNNING, True)})
USED_IN_EVALUATION = mistakes_at(
    "running", {"batch statistics used in evaluation": (_BATCH, False)}
)
_GRADIENT = "the gradient of x misses the terms of {}, which depend on x: they must not be detached"
DETACHED = mistakes_at(
    "detached",
    {
        f"{words} detached": (_GRADIENT.format(words), tuple(words.split(" and ")))
        for words in ("mean and variance", "mean", "variance")
    },
    rule="so no .data, .detach() or torch.no_grad()",
)


def right_formula(kind: str) -> Formula:
    """The formula of a kind of `NORMS`."""
    averaged = NORMS[kind].averaged
    return Formula(_OF_BLOCKS if "C/G" in averaged else _over(averaged))


def norm_mistakes(kind: str, *, cube: bool) -> list[Mistake]:
    """All single mistakes in one kind; some run without an error only if C, H and W are equal."""
    right, title = right_formula(kind).sharing, NORMS[kind].title.split(",")[0]
    others = {right_formula(k).sharing: NORMS[k].title for k in ("bn", "ln", "in")}
    named = [(f"mean and variance {each.words}", each) for each in _SUBSETS]
    named += [(name, Sharing(*row)) for name, row in _GROUPINGS.items()] if kind == "gn" else []
    named += [("axes mixed", each) for each in _MIXED]
    found = [*_PLACES, *_BROADCAST * cube]
    for name, each in named:
        also = f" (that is {others[each]})" if each in others else ""
        text = f"mean and variance are taken {each.words}{also}; {title} takes them {right.words}"
        found.append(Mistake(name, text, {"sharing": each}))
    for each in _SUBSETS:
        text = f"is taken {each.words}; {title} takes it {right.words}"
        change = {"variance_sharing": each}
        found.append(Mistake(f"variance {each.words}", f"the variance {text}", change))
        if kind != "gn":
            change = {"sharing": each, "variance_sharing": right}
            found.append(Mistake(f"mean {each.words}", f"the mean {text}", change))
    return [each for each in found if not each.name.endswith(right.words)]


_OFTEN = ("unbiased variance", "epsilon outside the root")


def norm_explanations(right: Formula, single: list[Mistake]) -> Iterator[tuple]:
    """The right formula, then those with one mistake, with two, with three of the frequent ones."""
    yield from explanations(right, single, 2)
    often = [m for m in single if m.name in _OFTEN or {*m.change} & {"sharing", "affine"}]
    yield from explanations(right, often, 3, 3)


_EXAMPLES = (
    (torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3), "the channel 1, 2, 3"),
    (torch.tensor([1e-3, 2e-3, 3e-3]).view(1, 1, 1, 3), "the channel 0.001, 0.002, 0.003"),
    (example_batch(), "nl.example_batch()"),
)


def with_numbers(kind: str, mistake: Mistake) -> str:
    """The sentence of a mistake, with what it gives for a small example."""
    right = right_formula(kind)
    affine = "affine" in mistake.change
    for x, words in _EXAMPLES:
        scale, shift = (torch.full((x.shape[1], 1, 1), 1.0 * v) for v in (1 + affine, affine))
        case = Case(x, scale, shift, min(2, x.shape[1]))
        given, due = (formula(case) for formula in (replace(right, **mistake.change), right))
        if given is None or not given.isfinite().all():  # None: only axes of equal sizes would do
            continue
        given, due, numbers = given.flatten(), due.flatten(), x.flatten()
        for place in (-1, 0, int((given - due).abs().argmax())):
            if f"{given[place]:.3g}" != f"{due[place]:.3g}":
                return (
                    f"{mistake.sentence}. It gives {given[place]:.3g} where {due[place]:.3g} is "
                    f"right for the number {numbers[place]:g} of {words}"
                    f"{', with scale 2 and shift 1' * affine}."
                )
    return f"{mistake.sentence}."


# --- running statistics -------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """How running statistics move in training; the defaults are right."""

    # the shares of the old and of the batch, for the share that is wanted of the batch
    shares: Callable[[float], tuple[float, float]] = lambda rate: (1 - rate, rate)
    # what the variance of a batch of n, divided by n, contributes
    batch: Callable[[Tensor, int], Tensor] = lambda var, n: var * n / (n - 1)
    moved: tuple[bool, bool] = (True, True)  # whether mean and variance move

    def __call__(self, old: list[Tensor], x: Tensor, rate: float) -> list[Tensor]:
        """Running mean and variance after the batch x (N, C, H, W)."""
        kept, taken = self.shares(rate)
        axes = (0, 2, 3)
        new = [x.mean(axes), self.batch(x.var(axes, False), x[:, 0].numel())]
        pairs = zip(old, new, self.moved, strict=True)
        return [kept * o + taken * b if moved else o for o, b, moved in pairs]


_BATCHES = {
    "running variance biased": (
        "the running variance is fed by the variance divided by n; torch and the paper divide by "
        "n − 1 there, and by n only for normalizing (d2l and CS231n leave it at n)",
        lambda var, n: var,
    ),
    "standard deviation in the running variance": (
        "the running variance is fed by the standard deviation, which is the variance's root",
        lambda var, n: (var + EPSILON).sqrt(),
    ),
}
_KEPT = {
    "running statistics not moved": ("a batch does not change them", lambda rate: (1, 0)),
    "momentum the wrong way round": ("most is taken from the batch", lambda rate: (rate, 1 - rate)),
    "running statistics moved twice": (
        "a batch counts twice",
        lambda r: ((1 - r) ** 2, 2 * r - r * r),
    ),
    "running statistics replaced": ("only the last batch counts", lambda rate: (0, 1)),
    "running statistics summed": ("all of the old is kept", lambda rate: (1, rate)),
}
_MOVED = {
    "running variance not moved": ("only the running mean moves", (True, False)),
    "running mean not moved": ("only the running variance moves", (False, True)),
}
RUNNING = [
    *mistakes_at("batch", _BATCHES),
    *mistakes_at("shares", _KEPT, rule=_SHARES),
    *mistakes_at("moved", _MOVED),
]
