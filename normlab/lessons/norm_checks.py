"""`check_norm`: whether a student's normalization is right, and which mistakes it has if not."""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from normlab.lessons import checking
from normlab.lessons import norm_mistakes as formulas
from normlab.lessons.checking import Failed, Mistakes, as_numbers, explanations, said
from normlab.lessons.norm_mistakes import Case, Formula, normalized
from normlab.lessons.student_norm import LEARNED, STATISTICS, Called, StudentNorm, Way
from normlab.norms import EPSILON, NORMS, norm_name
from normlab.support.checks import one_of, whole_number
from normlab.support.seeding import generator


def check_norm(
    candidate: Callable,
    kind: str,
    *,
    groups: int | None = None,
    backward: Callable | None = None,
) -> checking.Checked:
    """Whether a normalization of images (N, C, H, W) is right; if not, which mistakes it has.

    Args:
        candidate: a function, an `nn.Module`, or a class of these. Arguments are given by their
            usual names (x, gamma or weight, beta or bias, eps, groups, running_mean, momentum,
            training, bn_param, …) or by their order, as tensors or as numpy arrays.
        kind: "bn", "ln", "gn", "in" or "ln-elementwise".
        groups: for "gn", if the number of groups is neither an argument nor kept in the module.
        backward: a backward pass written by hand, of (dout, cache), where the candidate returns
            (output, cache), or of (dout, x, gamma, …): it returns the gradients of x, scale, shift.

    The printed result names each mistake, with what it gives for a small example. What the code
    raises is reported with its line, and after a few seconds it is ended.
    Raises `ValueError` for an unknown kind, `TypeError` for what cannot be called.
    """
    known = [each for each, norm in NORMS.items() if norm.averaged and norm.moment == "mean"]
    name = one_of(norm_name(kind), known, "norm to check")
    if groups is not None:
        whole_number(groups, "groups")
    code = StudentNorm(candidate, name, groups)
    return checking.checked(NORMS[name].title, _NormCheck(name, code, backward).parts())


_OTHERS = ((4, 4, 2, 2), (4, 4, 4, 4))  # the shape of nl.example_batch(), and equal axes


class _NormCheck:
    """The parts of a check, each a method that returns mistakes with their sentences.

    What is looked at after the output returns None where there is nothing to see.
    """

    def __init__(self, kind: str, code: StudentNorm, backward: Callable | None) -> None:
        self.kind, self.code, self.backward = kind, code, backward
        self.formula = self.right = formulas.right_formula(kind)
        self.enough = time.monotonic() + checking.SECONDS / 2  # for looking for an explanation

    def parts(self) -> Iterator[tuple[str, Mistakes]]:
        forward, affine = self._forward()
        name = "forward in training" if self.kind == "bn" else "forward"
        if {*self.seen.vectors} & {*LEARNED}:
            yield name, forward
            yield "scale and shift", affine | self._sizes_of_vectors()
        else:
            yield name, forward | affine
        changed = _differs(self.seen.given, self.seen.x)
        in_place = said("input changed in place", when=changed)
        yield "input unchanged", in_place
        looks = {"gradients": self._gradients, "other shapes": self._shapes}
        looks |= {"running statistics": self._running, "evaluation": self._evaluation}
        looks |= {"dtype": self._dtype}
        for name, look in looks.items():
            try:
                mistakes = look()
            except Failed as error:
                mistakes = in_place or {f"error in {name}": f"{name}: {error}"}
            if mistakes and not self.known and name in ("gradients", "other shapes"):
                mistakes = forward  # what follows from it is no other mistake
            if mistakes is not None:
                yield name, mistakes

    # --- calls and formulas ---------------------------------------------------------------------

    def _call(self, way: Way, sizes: tuple[int, ...] | None, *, plain: bool = False) -> Called:
        """Calls the code in training, for x of these sizes or such as fit."""
        sizes, shapes = self.code.prepare(sizes, way)
        x, vectors = _some_input(sizes, plain=plain), _some_vectors(shapes)
        return self.code.call(x, vectors, way, training=True)

    def _case(self, seen: Called, **other: Tensor) -> Case:
        """What the code was given, or other x and vectors, as a formula needs it."""
        every = {"scale": torch.ones(1), "shift": torch.zeros(1), "x": seen.x}
        every |= seen.vectors | other
        x = every.pop("x")

        def along(value: Tensor) -> Tensor:
            """A vector that is broadcast along the channels of x, or along its elements."""
            if value.numel() == x[0].numel():
                return value.reshape(x.shape[1:])
            for_each = x.shape[1] // value.numel() if x.shape[1] % value.numel() == 0 else 1
            return value.flatten().repeat_interleave(for_each).view(-1, 1, 1)

        fit = {role: along(value) for role, value in every.items()}
        return Case(x, groups=self.code.groups, **fit)

    def _search(
        self, seen: Called, case: Case, among: Iterable[formulas.Explained]
    ) -> formulas.Explained | None:
        """The first formula that gives this output, as long as there is time to look for it."""
        for formula, mistakes in among:
            if time.monotonic() > self.enough:
                return None
            if _near(seen.numbers, normalized(case, **formula)):
                return formula, mistakes
        return None

    def _told(self, mistakes: dict[str, checking.Choice]) -> Mistakes:
        found = mistakes.items()
        return {each.name: formulas.with_numbers(self.kind, at, each) for at, each in found}

    # --- the parts ------------------------------------------------------------------------------

    def _forward(self) -> tuple[Mistakes, Mistakes]:
        """Looks for the best way of calling and for the formula that the code follows.

        Returns the mistakes, those of scale and shift apart.
        """
        tried = []
        for sizes in (None, *_OTHERS):
            tried.append(seen := self._best_call(sizes))
            if isinstance(seen, Failed) or not (known := self._explained(seen)):
                continue
            self.seen, (formula, mistakes) = seen, known
            if sizes and not mistakes:
                text = f"it is right for x of shape {sizes} only; for another shape: "
                self.known = True
                return {"constant of the example's shape": text + self._difference(tried[0])}, {}
            self.known = not formula["running"]
            self.formula = formula if self.known else self.right
            affine = {at: mistakes.pop(at) for at in ("affine",) if at in mistakes}
            return self._told(mistakes), self._told(affine)
        ran = [each for each in tried if isinstance(each, Called)]
        if not ran:
            raise tried[0]
        self.seen, self.known = ran[0], False
        text = "the output is wrong, by none of the usual mistakes: "
        return {"unknown": text + self._difference(ran[0])}, {}

    def _best_call(self, sizes: tuple[int, ...] | None) -> Called | Failed:
        """The first way of calling that is right, else that runs, else how the first one failed."""
        ran, errors = [], []
        for way in self.code.ways:
            try:
                ran.append(seen := self._call(way, sizes))
            except Failed as error:
                errors.append(error)
                continue
            right = _near(seen.numbers, normalized(self._case(seen), **self.right))
            if right or self.code.certain:
                return seen
        return (ran or errors)[0]

    def _explained(self, seen: Called) -> formulas.Explained | None:
        """The formula that gives this output, with its mistakes."""
        places = formulas.norm_places(self.kind, cube=len({*seen.sizes[1:]}) == 1)
        one, two = (explanations(places, number, number) for number in (1, 2))
        case, moved = self._case(seen), self._case(seen, **_statistics(seen))
        return (
            self._search(seen, case, explanations(places, 1))
            or self._search(seen, moved, one)
            or self._search(seen, case, two)
            or (seen.sizes not in _OTHERS and self._search(seen, case, formulas.three(places)))
            or None
        )

    def _difference(self, seen: Called | Failed) -> str:
        if isinstance(seen, Failed):
            return str(seen)
        due = normalized(self._case(seen), **self.right)
        return f"for x of shape {seen.sizes}, {_differs(seen.output, due)}"

    def _sizes_of_vectors(self) -> Mistakes:
        """Another number of scales than the kind has."""
        channels, elements = self.seen.sizes[1], math.prod(self.seen.sizes[1:])
        named = {1: "one scale for all channels", self.code.groups: "scale and shift by group"}
        named |= {elements: "scale and shift by element", channels: "scale and shift by channel"}
        due = elements if self.kind == "ln-elementwise" else channels
        mistakes = {}
        for each in {*LEARNED} & {*self.seen.vectors}:
            if (number := self.seen.vectors[each].numel()) != due:
                text = f"the {each} is {number} numbers for x of shape {self.seen.sizes}, not {due}"
                mistakes[named.get(number, "number of scales")] = text
        return mistakes

    def _gradients(self) -> Mistakes | None:
        """Whether x, scale and shift have the right ones; None where there need not be any."""
        seen = self._call(self.seen.way, self.seen.sizes, plain=True)
        upstream = _random(seen.sizes, 9)
        if self.backward is not None:
            given = self._by_hand(seen, upstream)
        elif not getattr(seen.output, "requires_grad", False):
            arrays = not seen.way.gradients or not isinstance(seen.output, Tensor)
            return None if arrays or "numpy" in self.code.names else said("no gradients")
        elif not all(leaf.requires_grad for leaf in seen.leaves.values()):
            return said("scale and shift are no parameters")
        else:
            wanted = (seen.output, [*seen.leaves.values()], upstream.to(seen.output.dtype))
            options = {"allow_unused": True, "materialize_grads": True}
            found = checking.attempt(torch.autograd.grad, *wanted, **options)
            given = dict(zip(seen.leaves, found, strict=True))
        due = self._due_gradients(seen, self.formula, upstream)
        wrong = {role: _differs(given[role], due[role]) for role in due}
        mistakes = {
            f"gradient of {role}": f"the gradient of {role} is wrong: {text}"
            for role, text in wrong.items()
            if text
        }
        for each in formulas.DETACHED if wrong["x"] else ():
            formula = self.formula | {"detached": each.value}
            if not _differs(given["x"], self._due_gradients(seen, formula, upstream)["x"]):
                del mistakes["gradient of x"]
                return mistakes | {each.name: f"{each.sentence}."}
        return mistakes

    def _by_hand(self, seen: Called, upstream: Tensor) -> dict[str, object]:
        """The gradients of a backward pass written by hand."""
        cache = seen.returned[1:]
        values = {"x": seen.x, **seen.vectors, "dy": upstream}
        values = {role: seen.way.give(value) for role, value in values.items()}
        values |= {"cache": cache[0] if len(cache) == 1 else cache}
        values |= {"eps": EPSILON, "groups": self.code.groups}
        learned = ("x", *LEARNED)
        roles = checking.roles_of(self.backward, values, ("dy", "cache", *learned))
        found = checking.call(self.backward, values, roles)
        found = found if isinstance(found, tuple | list) else (found,)
        # One that is not returned is None, which is wrong.
        return dict(zip_longest([role for role in learned if role in values], found))

    def _due_gradients(self, seen: Called, formula: Formula, upstream: Tensor) -> dict[str, Tensor]:
        """The gradients of x, scale and shift by a formula."""
        leaves = {"x": seen.x, **seen.vectors}
        leaves = {role: leaves[role].clone().requires_grad_() for role in seen.leaves}
        options = {"allow_unused": True, "materialize_grads": True}
        output = normalized(self._case(seen, **leaves), **formula)
        found = torch.autograd.grad(output, [*leaves.values()], upstream, **options)
        return dict(zip(leaves, found, strict=True))

    def _shapes(self) -> Mistakes | None:
        """One image, images of one pixel, square ones."""
        n, c, h, w = self.seen.sizes
        shapes = {"N = 1": (1, c, h, w), "H = W": (n, c, h, h), "H = W = 1": (n, c, 1, 1)}
        if self.kind == "in":  # of one pixel there is nothing to normalize
            del shapes["H = W = 1"]
        mistakes = {}
        for name, sizes in shapes.items():
            try:
                seen = self._call(self.seen.way, sizes)
                due = normalized(self._case(seen), **self.formula)
                wrong = "" if due is None else _differs(seen.output, due)
            except Failed as error:
                wrong = str(error)
            text = f"it is right for x of shape {self.seen.sizes}, but not for {sizes}: {wrong}"
            mistakes |= {f"shape {name}": text} if wrong else {}
        return None if self.seen.sizes in _OTHERS else mistakes  # else known to depend on it

    def _running(self) -> Mistakes | None:
        seen, after = self.seen, _statistics(self.seen)
        if self.kind != "bn" or (self.code.is_function and "mean" not in seen.vectors):
            return None
        if not {*STATISTICS} <= {*seen.vectors}:
            return said("no running statistics")
        old, new = ([each[role].flatten() for role in STATISTICS] for each in (seen.vectors, after))
        if {each.numel() for each in (*old, *new)} != {seen.sizes[1]}:
            return said("running statistics by channel")
        batch = seen.x.mean((0, 2, 3))
        share = float(((new[0] - old[0]) / (batch - old[0])).median())
        for formula, wrong in explanations(formulas.RUNNING):
            for rate in _rates(seen.momentum, share):
                due = formulas.moved_statistics(old, seen.x, rate, **formula)
                if not any(map(_differs, new, due)):
                    named = {each.name: f"{each.sentence}." for each in wrong.values()}
                    return named | _graph_in(seen)
        text = f"after a batch the running mean of channel 0 is {new[0][0]:.3g}, by none of the "
        text += f"usual mistakes; it was {old[0][0]:.3g}, that of the batch is {batch[0]:.3g}"
        return {"running statistics": text}

    def _evaluation(self) -> Mistakes | None:
        if not self.code.evaluates:
            return None
        x, vectors = self.seen.x, self.seen.vectors
        seen = self.code.call(x, vectors, self.seen.way, training=False)
        after = _statistics(seen)
        moved = any(_differs(new, vectors[role]) for role, new in after.items())
        mistakes = said("running statistics moved in evaluation", when=moved)
        if self.kind != "bn":
            other = _differs(seen.output, self.seen.numbers)
            return mistakes | said("other in evaluation", when=other)
        right = self.formula | {"running": True}
        case = self._case(seen)
        due = [normalized(each, **right) for each in (case, self._case(seen, **after))]
        if "mean" in vectors and any(_near(seen.numbers, each) for each in due):
            return mistakes
        first = formulas.EVALUATED  # if they are not kept, other sets give the batch's as well
        places = first | formulas.norm_places("bn") | first
        known = self._search(seen, case, explanations(places, 2, 1, right))
        return mistakes | (self._told(known[1]) if known else said("evaluation"))

    def _dtype(self) -> Mistakes | None:
        if self.seen.way.arrays:
            return None
        for dtype in (torch.float32, torch.float64):
            way = replace(self.seen.way, dtype=dtype)
            output = self.code.call(self.seen.x, self.seen.vectors, way, training=True).output
            if isinstance(output, Tensor) and output.dtype != dtype:
                text = f"for x of {dtype} the output is {output.dtype}; it should keep the dtype"
                return {"dtype not kept": text}
        return {}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def _some_input(sizes: tuple[int, ...], *, plain: bool) -> Tensor:
    """x (N, C, H, W) with other means and deviations in each image and channel.

    Unless it is plain, the last images and channels are so small that epsilon shows.
    """
    x = _random(sizes, 1) * (0.5 + _random((*sizes[:2], 1, 1), 2).abs())
    x = x + 0.7 * _random((*sizes[:2], 1, 1), 3)
    for axis in () if plain else (0, 1):
        for place, factor in ((2, 3e-3), (3, 1e-4)):
            x.select(axis, place).mul_(factor) if sizes[axis] > place else None
    return x.float().double()


def _some_vectors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Scale, shift and running statistics of these shapes."""
    vectors = {}
    for seed, (each, shape) in enumerate(shapes.items(), 4):
        values = _random(shape, seed)
        if each in ("scale", "var"):
            values = 0.5 + values.abs()
        if each == "var" and values.numel():
            values.view(-1)[0] = 1e-5  # so that epsilon shows
        vectors[each] = values.float().double()
    return vectors


def _statistics(called: Called) -> dict[str, Tensor]:
    """The running statistics after a call, as numbers."""
    return {role: as_numbers(each) for role, each in called.after.items()}


def _rates(momentum: object, seen: float) -> set[float]:
    """The shares of a batch that a momentum may stand for; where it is not known, that seen."""
    if momentum is inspect.Parameter.empty:  # then it is given 0.1: of the old or of the new
        return {0.1, 0.9}
    if momentum is None:  # the first of a mean of all
        return {1.0}
    if isinstance(momentum, float):
        return {min(momentum, 1 - momentum)}
    return {min(seen, 1 - seen) if 0.001 < seen < 0.999 else 0.1}


def _graph_in(called: Called) -> Mistakes:
    """Running statistics with a history of gradients, or that an optimiser would change."""
    after = called.after.values()
    if any(isinstance(each, nn.Parameter) for each in after):
        return said("running statistics are parameters")
    recorded = any(getattr(each, "requires_grad", False) for each in after)
    return said("running statistics in the graph", when=recorded)


def _near(given: Tensor, due: Tensor | None) -> bool:
    """Whether numbers are the same but for rounding to float32, as the largest goes."""
    if due is None:
        return False
    due = due.nan_to_num(0, 0, 0)  # the root of what is below 0; `given` is without them
    return bool((given - due).abs().max() <= 5e-4 * due.abs().max() + 1e-6)


def _differs(given: object, due: Tensor) -> str:
    """Where what a student's code gives, in any layout, differs most; nothing if it does not."""
    if given is None:
        return "it is missing"
    numbers = as_numbers(given)
    if numbers is None or numbers.numel() != due.numel():
        return f"{None if numbers is None else tuple(numbers.shape)} is no shape that fits"
    numbers, due = numbers.reshape(due.shape), due.detach()
    if _near(numbers.nan_to_num(0, 0, 0), due):
        return ""
    apart = (numbers - due).abs().nan_to_num(1e9)
    index = tuple(map(int, torch.unravel_index(apart.argmax(), apart.shape)))
    return f"number {list(index)} is {numbers[index]:.3g} where {due[index]:.3g} is right"
