"""The usual mistakes in a normalization, as data: each is one change to the right formula.

A formula has a few places (which numbers share a mean, what the variance divides by, …), and a
mistake puts something else in one of them. So what it gives can be computed, and what two mistakes
together give as well.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from normlab.lessons.by_hand import example_batch
from normlab.lessons.checking import Choice, Places, explanations, places
from normlab.norms import EPSILON, NORMS

Statistic = Callable[[Tensor, tuple[int, ...]], Tensor]  # over these axes, which are kept
Formula = dict[str, object]  # what stands in each place of `normalized`
Explained = tuple[Formula, dict[str, Choice]]  # with its mistakes, by their places


class Case(NamedTuple):
    """What a formula is given: x (N, C, H, W), and vectors of shapes that broadcast along it."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    groups: int
    mean: Tensor | None = None  # the running ones
    var: Tensor | None = None


class Sharing(NamedTuple):
    """Which numbers of x (N, C, H, W) share a mean.

    Args:
        words: as in "over N only".
        axes: the axes of the mean, after the following.
        shape: what x is reshaped to, of N, C, H, W, of groups G and of -1.
    """

    words: str
    axes: tuple[int, ...]
    shape: str = "N C H W"

    def apply(self, statistic: Statistic, x: Tensor, groups: int, keepdim: bool) -> Tensor:
        """A statistic of x, broadcast back to the shape of x."""
        sizes = dict(zip("NCHW", x.shape, strict=True)) | {"G": groups, "-1": -1}
        arranged = x.reshape([sizes[name] for name in self.shape.split()])
        found = statistic(arranged, self.axes)
        found = found if keepdim else found.squeeze(self.axes)
        return found.expand_as(arranged).reshape(x.shape)


_apply = lru_cache(1000)(Sharing.apply)  # formulas by the thousand differ in other places


def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.mean(axes, True)


def _variance(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.var(axes, False, True)


def normalized(
    case: Case,
    *,
    sharing: tuple[Sharing, Sharing],  # for the mean, and for the variance
    variance_sharing: Sharing | None,  # instead of the second
    moment: Statistic,
    divisor: Callable[[Tensor], Tensor],
    center: Callable[[Tensor, Tensor], Tensor],
    affine: Callable[[Tensor, Tensor, Tensor], Tensor],
    order: tuple[int, ...],  # the axes that become N, C, H, W at the end
    keepdim: bool,  # whether mean and variance keep their axes
    running: bool,  # whether they are the running ones, if there are any
    detached: tuple[str, ...],  # which of them are
) -> Tensor | None:
    """What a formula gives; None where it does not fit the shapes."""
    try:
        mean, variance = case.mean, case.var
        if not running or mean is None:
            mean = _apply(sharing[0], _mean, case.x, case.groups, keepdim)
            variance = _apply(variance_sharing or sharing[1], moment, case.x, case.groups, keepdim)
        mean = mean.detach() if "mean" in detached else mean
        variance = variance.detach() if "variance" in detached else variance
        y = center(case.x, mean) / divisor(variance)
        return affine(y.permute(order).reshape(y.shape), case.scale, case.shift)
    except RuntimeError:
        return None


# --- which numbers share a mean -----------------------------------------------------------------


def _over(names: tuple[str, ...]) -> Sharing:
    *most, last = names
    words = f"{', '.join(most)} and {last}" if most else f"{last} only"
    return Sharing(f"over {words}", tuple(map("NCHW".index, names)))


_SUBSETS = [_over(names) for size in (1, 2, 3, 4) for names in combinations("NCHW", size)]
_BLOCKS, _STRIDED = "N G -1 H W", "N -1 G H W"
_OF_BLOCKS = Sharing("over H, W and the C/G channels of a block", (2, 3, 4), _BLOCKS)
_GROUPINGS = {
    "groups interleaved": Sharing("over H, W and every G-th channel", (1, 3, 4), _STRIDED),
    "group size for number": Sharing("over groups of G channels", (2, 3, 4), _STRIDED),
    "groups of interleaved channels": Sharing("over H, W and the groups", (1, 3, 4), _BLOCKS),
    "groups over the batch": Sharing("over N too: groups of all images", (0, 2, 3, 4), _BLOCKS),
    "groups without positions": Sharing("over the channels of a group only", (2,), _BLOCKS),
}
_RESHAPED = {"C -1": 1, "-1 C": 0, "-1 N": 0, "G -1": 1, "-1 G": 0, "N -1 G": 1, "N -1 C": 1}
_RESHAPED |= {"G N -1": 2, "C N -1": 2}  # the axis of the mean after such a reshape
_MIXED = [
    Sharing(f"over axis {axis} after reshape to ({shape}), which mixes axes", (axis,), shape)
    for shape, axis in _RESHAPED.items()
]


def _right_sharing(kind: str) -> Sharing:
    averaged = NORMS[kind].averaged
    return _OF_BLOCKS if "C/G" in averaged else _over(averaged)


def _sharings(kind: str) -> Places:
    """What mean and variance are taken over: what is right, then every other set of numbers."""
    right, title = _right_sharing(kind), NORMS[kind].title.split(",")[0]
    others = {_right_sharing(k): f"that is {NORMS[k].title}; " for k in ("bn", "ln", "in")}
    rule = f"{title} takes them {right.words}"
    both, variance = [Choice("", (right, right))], [Choice("", None)]
    for each in (each for each in _SUBSETS if each != right):
        text = others.get(each, "") + rule
        both.append(Choice(f"mean and variance {each.words}", (each, each), text))
        both.append(Choice(f"mean {each.words}", (each, right), rule))
        variance.append(Choice(f"variance {each.words}", each, rule))
    named = [*_GROUPINGS.items()] * (kind == "gn") + [("axes mixed", each) for each in _MIXED]
    for name, each in named:
        text = f"mean and variance are taken {each.words}; {rule}"
        both.append(Choice(name, (each, each), text))
    return {"sharing": both, "variance_sharing": variance}


# --- all places ---------------------------------------------------------------------------------

_PLACES = places(
    moment={
        "": _variance,
        "unbiased variance": lambda x, axes: x.var(axes, True, True),
        "sum instead of variance": lambda x, axes: (x - _mean(x, axes)).square().sum(axes, True),
        "variance about zero": lambda x, axes: _mean(x**2, axes),
        "mean absolute deviation": lambda x, axes: _mean((x - _mean(x, axes)).abs(), axes) ** 2,
        "mean not squared": lambda x, axes: _mean(x**2, axes) - _mean(x, axes),
    },
    divisor={
        "": lambda v: (v + EPSILON).sqrt(),
        "epsilon outside the root": lambda v: v.sqrt() + EPSILON,
        "epsilon missing": lambda v: v.sqrt(),
        "epsilon squared": lambda v: (v + EPSILON**2).sqrt(),
        "variance instead of standard deviation": lambda v: v + EPSILON,
        "multiplied by the standard deviation": lambda v: (v + EPSILON).rsqrt(),
        "root taken twice": lambda v: (v.sqrt() + EPSILON).sqrt(),
        "not divided by the standard deviation": torch.ones_like,
    },
    center={"": torch.sub, "mean not subtracted": lambda x, mean: x, "mean added": torch.add},
    affine={
        "": lambda y, w, b: y * w + b,
        "scale and shift swapped": lambda y, w, b: y * b + w,
        "shift before scale": lambda y, w, b: (y + b) * w,
        "scale and shift missing": lambda y, w, b: y + 0 * (w + b),
        "shift missing": lambda y, w, b: y * w + 0 * b,
        "scale missing": lambda y, w, b: y + b + 0 * w,
        "shift subtracted": lambda y, w, b: y * w - b,
        "one plus scale": lambda y, w, b: y * (1 + w) + b,
    },
    order={"": (0, 1, 2, 3), "axes mixed": (0, 2, 3, 1)},
    keepdim={"": True},
    running={"": False, "running statistics used in training": True},
    detached={"": ()},
)
_PLACES["order"] += places(order={"axes mixed": (1, 0, 2, 3)})["order"]
_PLACES["divisor"] += places(divisor={"variance instead of standard deviation": lambda v: v})[
    "divisor"
]
for size in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9):
    rows = {
        "epsilon of another size": lambda v, size=size: (v + size).sqrt(),
        "epsilon outside the root": lambda v, size=size: v.sqrt() + size,
    }
    text = f"epsilon is {size:g}, and {EPSILON:g} within the root is right"
    _PLACES["divisor"] += [Choice(*row, text) for row in rows.items()]
# Only where C, H and W are equal does torch broadcast along the wrong axis without an error.
_ALONG_W = places(
    keepdim={"statistics along the wrong axis": False},
    affine={"scale and shift along the wrong axis": lambda y, w, b: y * w.flatten() + b.flatten()},
)
EVALUATED = places(running={"": True, "batch statistics used in evaluation": False})
DETACHED = places(
    detached={
        "mean and variance detached": ("mean", "variance"),
        "mean detached": ("mean",),
        "variance detached": ("variance",),
    }
)["detached"]


def norm_places(kind: str, *, cube: bool = False) -> Places:
    """All places of a kind of `NORMS`; some mistakes need a cube, with C, H and W equal."""
    along = _ALONG_W if cube else {}
    every = {place: some + along.get(place, []) for place, some in _PLACES.items()}
    return _sharings(kind) | every


def right_formula(kind: str) -> Formula:
    return {place: choices[0].value for place, choices in norm_places(kind).items()}


def three(places: Places) -> Iterator[Explained]:
    """Formulas with three of the frequent mistakes."""
    names = ("", "unbiased variance", "epsilon outside the root")
    often = {
        place: [each for each in some if place in ("sharing", "affine") or each.name in names]
        for place, some in places.items()
    }
    return explanations(often, 3, 3)


# --- an example ---------------------------------------------------------------------------------

_EXAMPLES = (
    (torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3), "the channel 1, 2, 3"),
    (torch.tensor([1e-3, 2e-3, 3e-3]).view(1, 1, 1, 3), "the channel 0.001, 0.002, 0.003"),
    (example_batch(), "nl.example_batch()"),
)


def with_numbers(kind: str, place: str, mistake: Choice) -> str:
    """The sentence of a mistake, with what it gives for a small example."""
    right = right_formula(kind)
    affine = place == "affine"
    for x, words in _EXAMPLES:
        scale, shift = (torch.full((x.shape[1], 1, 1), 1.0 * v) for v in (1 + affine, affine))
        case = Case(x, scale, shift, min(2, x.shape[1]))
        given, due = (normalized(case, **each) for each in (right | {place: mistake.value}, right))
        if given is None or not given.isfinite().all():  # None: only axes of equal sizes would do
            continue
        given, due, numbers = given.flatten(), due.flatten(), x.flatten()
        for at in (-1, 0, int((given - due).abs().argmax())):
            if f"{given[at]:.3g}" != f"{due[at]:.3g}":
                of = f"the number {numbers[at]:g} of {words}{', with scale 2 and shift 1' * affine}"
                example = f"It gives {given[at]:.3g} where {due[at]:.3g} is right for {of}."
                return f"{mistake.sentence}. {example}"
    return f"{mistake.sentence}."


# --- running statistics -------------------------------------------------------------------------

RUNNING = places(
    # the shares of the old and of the batch, for the share that is wanted of the batch
    shares={
        "": lambda rate: (1 - rate, rate),
        "running statistics not moved": lambda rate: (1, 0),
        "momentum the wrong way round": lambda rate: (rate, 1 - rate),
        "running statistics moved twice": lambda rate: ((1 - rate) ** 2, 2 * rate - rate**2),
        "running statistics replaced": lambda rate: (0, 1),
        "running statistics summed": lambda rate: (1, rate),
    },
    # what the variance of a batch of n, divided by n, contributes
    batch={
        "": lambda var, n: var * n / (n - 1),
        "running variance biased": lambda var, n: var,
        "standard deviation in the running variance": lambda var, n: (var + EPSILON).sqrt(),
    },
    moved={  # whether mean and variance are
        "": (True, True),
        "running variance not moved": (True, False),
        "running mean not moved": (False, True),
    },
)


def moved_statistics(
    old: list[Tensor], x: Tensor, rate: float, *, shares: Callable, batch: Callable, moved: tuple
) -> list[Tensor]:
    """Running mean and variance after the batch x (N, C, H, W)."""
    kept, taken = shares(rate)
    new = (x.mean((0, 2, 3)), batch(x.var((0, 2, 3), False), x[:, 0].numel()))
    rows = zip(old, new, moved, strict=True)
    return [kept * before + taken * found if moves else before for before, found, moves in rows]
