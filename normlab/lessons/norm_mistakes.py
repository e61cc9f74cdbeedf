"""The usual mistakes in a normalization, as data: each is one change to the right formula.

A formula has a few places (which numbers share a mean, what the variance divides by, …), and a
mistake puts something else in one of them. So what it computes can be computed, and two mistakes
together as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import torch
from torch import Tensor

from normlab.lessons.by_hand import example_batch
from normlab.norms import EPSILON, NORMS

KINDS = tuple(kind for kind in NORMS if kind != "none")


@dataclass(frozen=True)
class Sharing:
    """Which numbers of x (N, C, H, W) share a mean: `axes` of what `arrange` makes of x and G.

    Args:
        words: as in "over N only".
    """

    words: str
    axes: tuple[int, ...]
    arrange: Callable[[Tensor, int], Tensor] = lambda x, groups: x


def _over(names: str) -> Sharing:
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return Sharing(f"over {listed}" + " only" * (len(names) == 1), tuple(map("NCHW".index, names)))


def _blocks(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x), groups, -1, *x.shape[2:])


def _interleaved(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x), -1, groups, *x.shape[2:])


_SUBSETS = {
    "".join(names): _over(names) for size in (1, 2, 3, 4) for names in combinations("NCHW", size)
}
_RIGHT_SHARING = {
    "bn": _SUBSETS["NHW"],
    "ln": _SUBSETS["CHW"],
    "ln-elementwise": _SUBSETS["CHW"],
    "in": _SUBSETS["HW"],
    "gn": Sharing("over H, W and the C/G channels of a block", (2, 3, 4), _blocks),
}
_GROUPINGS = {
    "groups interleaved": Sharing(
        "over H, W and every G-th channel instead of C/G neighbours", (1, 3, 4), _interleaved
    ),
    "group size for number": Sharing(
        "over groups of G channels instead of over G groups",
        (2, 3, 4),
        lambda x, groups: _blocks(x, x.shape[1] // groups),
    ),
    "groups of interleaved channels": Sharing(
        "over H, W and the groups instead of the channels of a group", (1, 3, 4), _blocks
    ),
    "groups over the batch": Sharing("over N too: groups of all images", (0, 2, 3, 4), _blocks),
    "groups without positions": Sharing("over the channels of a group only", (2,), _blocks),
}
_MIXED = (
    *(
        Sharing(f"over axis {axes[0]} after {words}, which mixes the axes of x", axes, arrange)
        for words, axes, arrange in (
            ("reshape(C, -1)", (1,), lambda x, g: x.reshape(x.shape[1], -1)),
            ("reshape(-1, C)", (0,), lambda x, g: x.reshape(-1, x.shape[1])),
            ("reshape(-1, N)", (0,), lambda x, g: x.reshape(-1, len(x))),
            ("reshape(G, -1)", (1,), lambda x, g: x.reshape(g, -1)),
            ("reshape(-1, G)", (0,), lambda x, g: x.reshape(-1, g)),
            ("reshape(N, -1, G)", (1,), lambda x, g: x.reshape(len(x), -1, g)),
            ("reshape(N, -1, C)", (1,), lambda x, g: x.reshape(len(x), -1, x.shape[1])),
            ("reshape(G, N, -1)", (2,), lambda x, g: x.reshape(g, len(x), -1)),
            ("reshape(C, N, -1)", (2,), lambda x, g: x.reshape(x.shape[1], len(x), -1)),
        )
    ),
    *(
        Sharing(f"as is right, but {words} is not undone by the last reshape", axes, arrange)
        for words, axes, arrange in (
            ("permute(1, 0, 2, 3)", (1,), lambda x, g: x.transpose(0, 1).flatten(1)),
            ("permute(0, 2, 3, 1)", (0,), lambda x, g: x.movedim(1, 3).flatten(0, 2)),
            ("permute(0, 2, 3, 1)", (1, 2, 3), lambda x, g: x.movedim(1, 3)),
        )
    ),
)


@dataclass(frozen=True)
class Formula:
    """A normalization with its places; the defaults are right for all, but for `sharing`."""

    sharing: Sharing
    variance_sharing: Sharing | None = None  # where it is not that of the mean
    keepdim: bool = True  # whether the statistics keep their axes, to be broadcast along them
    center: Callable[[Tensor, Tensor], Tensor] = torch.sub
    moment: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda x, axes: x.var(
        axes, correction=0, keepdim=True
    )
    divisor: Callable[[Tensor], Tensor] = lambda v: (v + EPSILON).sqrt()
    affine: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, w, b: y * w + b
    detached: tuple[str, ...] = ()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        """The output for x (N, C, H, W), with a scale and shift that fit it."""
        arranged = self.sharing.arrange(x, groups)
        mean = arranged.mean(self.sharing.axes, keepdim=True)
        if other := self.variance_sharing:
            variance = self.moment(x, other.axes).expand_as(x)
            variance = self.sharing.arrange(variance, groups)
        else:
            variance = self.moment(arranged, self.sharing.axes)
        mean = mean.detach() if "mean" in self.detached else mean
        variance = variance.detach() if "variance" in self.detached else variance
        if not self.keepdim:
            mean, variance = mean.squeeze(self.sharing.axes), variance.squeeze(self.sharing.axes)
        y = self.center(arranged, mean) / self.divisor(variance)
        return self.affine(y.reshape(x.shape), weight, bias)

    def evaluated(
        self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        """The output of batch normalization in evaluation; the statistics are (C, 1, 1)."""
        return self.affine(self.center(x, mean) / self.divisor(variance), weight, bias)


@dataclass(frozen=True)
class Mistake:
    """A change to the right formula.

    Args:
        name: a few words.
        sentence: what is wrong and what is right.
        change: what stands in which place of the `Formula`.
    """

    name: str
    sentence: str
    change: dict[str, object]


_SIZES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9)
_RATIO = "the deviation is divided by the root of (variance + epsilon)"
_PLACES = (
    Mistake(
        "unbiased variance",
        "the variance is divided by n − 1; a normalization divides it by n",
        {"moment": lambda x, axes: x.var(axes, correction=1, keepdim=True)},
    ),
    Mistake(
        "sum instead of variance",
        "the squared deviations are summed up but not divided by their number n",
        {"moment": lambda x, axes: (x - x.mean(axes, True)).square().sum(axes, True)},
    ),
    Mistake(
        "variance about zero",
        "the variance is the mean of x², without the mean subtracted from x before",
        {"moment": lambda x, axes: x.square().mean(axes, True)},
    ),
    Mistake(
        "mean absolute deviation",
        "the mean of |x − mean| is taken for the standard deviation, the root of the mean square",
        {"moment": lambda x, axes: (x - x.mean(axes, True)).abs().mean(axes, True).square()},
    ),
    Mistake(
        "mean not squared",
        "the mean of x² less the mean is taken for the variance, the mean of x² less the mean²",
        {"moment": lambda x, axes: x.square().mean(axes, True) - x.mean(axes, True)},
    ),
    Mistake(
        "epsilon outside the root",
        f"epsilon is added to the standard deviation, outside the root; {_RATIO}",
        {"divisor": lambda v: v.sqrt() + EPSILON},
    ),
    Mistake(
        "epsilon missing",
        f"epsilon is missing, or too small to matter; {_RATIO}, epsilon being {EPSILON:g}",
        {"divisor": lambda v: v.sqrt()},
    ),
    Mistake(
        "epsilon squared",
        f"epsilon is squared; {_RATIO}",
        {"divisor": lambda v: (v + EPSILON**2).sqrt()},
    ),
    *(
        Mistake(
            "epsilon of another size",
            f"epsilon is {size:g}; {EPSILON:g} is used here",
            {"divisor": lambda v, size=size: (v + size).sqrt()},
        )
        for size in _SIZES
    ),
    *(
        Mistake(
            "epsilon outside the root",
            f"epsilon, here {size:g}, is added to the standard deviation, outside the root; "
            f"{_RATIO}, epsilon being {EPSILON:g}",
            {"divisor": lambda v, size=size: v.sqrt() + size},
        )
        for size in _SIZES
    ),
    *(
        Mistake(
            "variance instead of standard deviation",
            f"the deviation is divided by the variance, without a root; {_RATIO}",
            {"divisor": lambda v, size=size: v + size},
        )
        for size in (EPSILON, 0.0)
    ),
    Mistake(
        "multiplied by the standard deviation",
        "the deviation is multiplied by the standard deviation instead of divided by it",
        {"divisor": lambda v: 1 / (v + EPSILON).sqrt()},
    ),
    Mistake(
        "root taken twice",
        f"the root is taken of the standard deviation once more; {_RATIO}",
        {"divisor": lambda v: (v.sqrt() + EPSILON).sqrt()},
    ),
    Mistake(
        "not divided by the standard deviation",
        f"the mean is subtracted, but nothing is divided; {_RATIO}",
        {"divisor": torch.ones_like},
    ),
    Mistake(
        "mean not subtracted",
        "the mean is not subtracted from x before it is divided by the standard deviation",
        {"center": lambda x, mean: x},
    ),
    Mistake(
        "mean added",
        "the mean is added to x instead of subtracted from it",
        {"center": torch.add},
    ),
    Mistake(
        "scale and shift swapped",
        "scale and shift are exchanged; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: y * b + w},
    ),
    Mistake(
        "shift before scale",
        "the shift is added before the scale multiplies; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: (y + b) * w},
    ),
    Mistake(
        "scale and shift missing",
        "scale and shift are not used; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: y + 0 * (w + b)},
    ),
    Mistake(
        "shift missing",
        "the shift is not added; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: y * w + 0 * b},
    ),
    Mistake(
        "scale missing",
        "the scale is not used; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: y + b + 0 * w},
    ),
    Mistake(
        "shift subtracted",
        "the shift is subtracted; the output is scale · normalized + shift",
        {"affine": lambda y, w, b: y * w - b},
    ),
    Mistake(
        "one plus scale",
        "the normalized numbers are multiplied by 1 + scale instead of by the scale",
        {"affine": lambda y, w, b: y * (1 + w) + b},
    ),
)
# Only where C, H and W are equal does torch broadcast along the wrong axis without an error.
_BROADCAST = (
    Mistake(
        "statistics along the wrong axis",
        "mean and variance are broadcast along the last axis, W: their axes were dropped "
        "(keepdim=True keeps them)",
        {"keepdim": False},
    ),
    Mistake(
        "scale and shift along the wrong axis",
        "scale and shift are broadcast along the last axis, W, instead of the channels: give them "
        "the shape (1, C, 1, 1)",
        {"affine": lambda y, w, b: y * w.flatten() + b.flatten()},
    ),
)
DETACHED = (
    ("mean and variance detached", ("mean", "variance")),
    ("mean detached", ("mean",)),
    ("variance detached", ("variance",)),
)


_EXAMPLES = (
    (torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3), "the channel 1, 2, 3"),
    (torch.tensor([1e-3, 2e-3, 3e-3]).view(1, 1, 1, 3), "the channel 0.001, 0.002, 0.003"),
    (example_batch(), "nl.example_batch()"),
)


def right_formula(kind: str) -> Formula:
    """The formula of a kind of `NORMS`."""
    return Formula(_RIGHT_SHARING[kind])


def _sharings(kind: str) -> Iterator[Mistake]:
    """The mistakes in which numbers share their statistics, and then those of the variance only."""
    right, title = _RIGHT_SHARING[kind], NORMS[kind].title.split(",")[0]
    others = {_RIGHT_SHARING[k]: NORMS[k].title.split(",")[0] for k in KINDS if k != "gn"}
    named = (
        *((f"mean and variance {each.words}", each) for each in _SUBSETS.values()),
        *(_GROUPINGS.items() if kind == "gn" else ()),
        *(("axes mixed", each) for each in _MIXED),
    )
    for name, sharing in named:
        if sharing is not right:
            also = f" (that is {others[sharing]})" if sharing in others else ""
            text = f"mean and variance are taken {sharing.words}{also}; {title} takes them "
            yield Mistake(name, text + right.words, {"sharing": sharing})
    for sharing in _SUBSETS.values():
        if sharing is not right:
            change = {"variance_sharing": sharing}
            text = f"the variance is taken {sharing.words}; {title} takes it {right.words}"
            yield Mistake(f"variance {sharing.words}", text, change)
            if kind != "gn":
                change = {"sharing": sharing, "variance_sharing": right}
                text = f"the mean is taken {sharing.words}; {title} takes it {right.words}"
                yield Mistake(f"mean {sharing.words}", text, change)


def explanations(kind: str, *, cube: bool) -> Iterator[tuple[Formula, tuple[Mistake, ...]]]:
    """The right formula, then those with one mistake, then with two or three at different places.

    Args:
        cube: whether C, H and W are equal, so that more mistakes run without an error.
    """
    single = (*_PLACES, *_sharings(kind), *(_BROADCAST if cube else ()))
    yield from _changed(right_formula(kind), single)


_TOGETHER = (("sharing", "moment", "divisor"), ("moment", "divisor", "affine"))


def _triples(single: tuple[Mistake, ...]) -> Iterator[tuple[Mistake, ...]]:
    """Three mistakes at places that are often wrong together; all triples would be too many."""
    for places in _TOGETHER:
        yield from product(*([each for each in single if p in each.change] for p in places))


def _changed(right: object, single: tuple[Mistake, ...]) -> Iterator[tuple]:
    yield right, ()
    for mistakes in chain(zip(single), combinations(single, 2), _triples(single)):
        change = {place: value for each in mistakes for place, value in each.change.items()}
        if len(change) == sum(len(each.change) for each in mistakes):
            yield replace(right, **change), mistakes


def with_numbers(kind: str, mistake: Mistake) -> str:
    """The sentence of a mistake, with what it gives for a small example."""
    right = right_formula(kind)
    wrong = replace(right, **mistake.change)
    scale, shift = (2.0, 1.0) if "affine" in mistake.change else (1.0, 0.0)
    for x, words in _EXAMPLES:
        vectors = [torch.full((x.shape[1], 1, 1), value) for value in (scale, shift)]
        try:
            given, due = (f(x, *vectors, min(2, x.shape[1])).flatten() for f in (wrong, right))
        except RuntimeError:  # only axes of equal sizes would do
            continue
        if not torch.isfinite(given).all():
            continue
        for place in (-1, 0, int((given - due).abs().argmax())):
            if f"{given[place]:.3g}" != f"{due[place]:.3g}":
                words += ", with scale 2 and shift 1," * (scale == 2)
                return (
                    f"{mistake.sentence}. It gives {given[place]:.3g} where {due[place]:.3g} is "
                    f"right for the number {x.flatten()[place]:g} of {words}".rstrip(",")
                    + "."
                )
    return f"{mistake.sentence}."


# --- running statistics ----------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """How running statistics move in training; the defaults are right.

    Args:
        rate: the share of the batch, for the share that is wanted.
        batch: what mean and variance (the biased one) of a batch of n contribute.
        moved: which of them move.
        kept: the share of the old, for the share of the batch.
    """

    rate: Callable[[float], float] = lambda rate: rate
    batch: Callable = lambda mean, var, n: (mean, var * n / (n - 1))
    moved: tuple[bool, bool] = (True, True)
    kept: Callable[[float], float] = lambda rate: 1 - rate

    def __call__(self, old: list[Tensor], batch: list[Tensor], n: int, rate: float) -> list[Tensor]:
        """Running mean and variance after one batch."""
        rate = self.rate(rate)
        pairs = zip(old, self.batch(*batch, n), self.moved, strict=True)
        return [self.kept(rate) * o + rate * b if moved else o for o, b, moved in pairs]


_RULE = "new = (1 − momentum) · old + momentum · batch, where momentum is small, such as 0.1"
_RUNNING = (
    Mistake(
        "running variance biased",
        "the running variance is fed by the variance divided by n; torch and the paper divide by "
        "n − 1 there, and by n only for normalizing (d2l and CS231n leave it at n)",
        {"batch": lambda mean, var, n: (mean, var)},
    ),
    Mistake(
        "standard deviation in the running variance",
        "the running variance is fed by the standard deviation, which is the variance's root",
        {"batch": lambda mean, var, n: (mean, (var + EPSILON).sqrt())},
    ),
    Mistake(
        "running statistics not moved",
        "running mean and variance are the same after a batch in training: change them in place, "
        "or keep or return the new ones",
        {"rate": lambda rate: 0.0},
    ),
    Mistake(
        "momentum the wrong way round",
        f"the running statistics take most from the new batch; {_RULE}",
        {"rate": lambda rate: 1 - rate},
    ),
    Mistake(
        "running statistics moved twice",
        "the running statistics are moved twice by the same batch",
        {"rate": lambda rate: 1 - (1 - rate) ** 2},
    ),
    Mistake(
        "running statistics replaced",
        f"the running statistics are those of the last batch alone; {_RULE}",
        {"rate": lambda rate: 1.0},
    ),
    Mistake(
        "running statistics summed",
        f"the batch's statistics are added to the whole of the old ones; {_RULE}",
        {"kept": lambda rate: 1.0},
    ),
    Mistake(
        "running variance not moved",
        "the running mean moves, but not the running variance",
        {"moved": (True, False)},
    ),
    Mistake(
        "running mean not moved",
        "the running variance moves, but not the running mean",
        {"moved": (False, True)},
    ),
)


def running_explanations() -> Iterator[tuple[Running, tuple[Mistake, ...]]]:
    """As `explanations`, of the running statistics."""
    yield from _changed(Running(), _RUNNING)
