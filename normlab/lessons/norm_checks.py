"""`check_norm`: whether a student's normalization is right, and which mistakes it has if not."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normlab.lessons import checking
from normlab.lessons.checking import Checked, Failed, as_numbers, checked, explanations, roles_of
from normlab.lessons.norm_mistakes import (
    DETACHED,
    RUNNING,
    USED_IN_EVALUATION,
    USED_IN_TRAINING,
    Case,
    Formula,
    Running,
    norm_explanations,
    norm_mistakes,
    right_formula,
    with_numbers,
)
from normlab.lessons.student_code import VECTORS, Called, StudentCode, Way
from normlab.norms import EPSILON, NORMS, norm_name
from normlab.support.checks import one_of, whole_number
from normlab.support.seeding import generator

Mistakes = dict[str, str]  # names with their sentences


def check_norm(
    candidate: Callable,
    kind: str,
    *,
    groups: int | None = None,
    backward: Callable | None = None,
) -> Checked:
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
    name = one_of(norm_name(kind), [each for each in NORMS if each != "none"], "norm to check")
    if groups is not None:
        whole_number(groups, "groups")
    code = StudentCode(candidate, name, groups)
    return checked(NORMS[name].title, _NormCheck(name, code, backward).parts())


_LEARNED = ("x", "scale", "shift")
_OTHERS = ((4, 4, 2, 2), (4, 4, 4, 4))  # the shape of nl.example_batch(), and equal axes


@dataclass
class _Seen:
    """How the code did in one way of calling it, for one x."""

    way: Way
    sizes: tuple[int, ...]
    vectors: dict[str, Tensor]
    x: Tensor
    called: Called
    output: Tensor  # as numbers, 0 for NaN
    case: Case


class _NormCheck:
    """The parts of a check, each a method that returns mistakes with their sentences."""

    def __init__(self, kind: str, code: StudentCode, backward: Callable | None) -> None:
        self.kind, self.code, self.backward = kind, code, backward
        self.right = right_formula(kind)
        self.enough = time.monotonic() + checking.SECONDS / 2  # for looking for an explanation

    def parts(self) -> Iterator[tuple[str, Mistakes]]:
        self.seen, formula, forward, affine = self._best()
        self.formula = formula or self.right
        with_affine = bool(self.code.vectors & {"scale", "shift"})
        forward |= {} if with_affine else affine
        yield "forward in training" if self.kind == "bn" else "forward", forward
        if with_affine:
            yield "scale and shift", affine | self._sizes_of_vectors()
        text = "x itself is changed by the call (as x -= … does); make a new tensor, x = x - …"
        changed = not _same(self.seen.called.x, self.seen.x)
        in_place = {"input changed in place": text} if changed else {}
        yield "input unchanged", in_place
        for name, look in self._looks():
            try:
                mistakes = look()
            except Failed as error:
                mistakes = in_place or {f"error in {name}": f"{name}: {error}"}
            if formula is None and mistakes and name in ("gradients", "other shapes"):
                mistakes = forward  # what follows from it is no other mistake
            if mistakes is not None:
                yield name, mistakes

    def _looks(self) -> Iterator[tuple[str, Callable[[], Mistakes | None]]]:
        """What else is looked at; None is returned where there is nothing to see."""
        yield "gradients", self._gradients
        if self.seen.sizes not in _OTHERS:  # else it is known that it depends on the shape
            yield "other shapes", self._shapes
        if self.kind == "bn" and ("mean" in self.code.vectors or not self.code.is_function):
            yield "running statistics", self._running
        if self.code.evaluates:
            yield "evaluation", self._evaluation
        if not self.seen.way.numpy:
            yield "dtype", self._dtype

    def _best(self) -> tuple[_Seen, Formula | None, Mistakes, Mistakes]:
        """The best way of calling, the formula that it follows, and its mistakes."""
        errors, first = [], None
        for sizes in (None, *_OTHERS):
            ran: list[_Seen] = []
            for way in self.code.ways:
                if ran and (self.code.named or ran[-1].way.numpy == way.numpy):
                    continue  # arrays after tensors if it may be either; no second layout
                try:
                    ran.append(self._call(way, sizes))
                except Failed as error:
                    errors.append(error)
            ran.sort(key=lambda seen: not _near(seen.output, self.right(seen.case)))
            for seen in ran:
                if (known := self._explained(seen)) and (sizes is None or any(known[1:])):
                    return seen, *known
                if known:
                    said = self._difference(first) if first else errors[0]
                    text = f"it is right for x of shape {sizes} only; for another shape: {said}"
                    return seen, known[0], {"constant of the example's shape": text}, {}
            first = first or next(iter(ran), None)
        if first is None:
            raise errors[0]
        text = f"the output is wrong, by none of the usual mistakes: {self._difference(first)}"
        return first, None, {"unknown": text}, {}

    def _call(self, way: Way, sizes: tuple[int, ...] | None, *, plain: bool = False) -> _Seen:
        """Calls the code in training, for x of these sizes or such as fit."""
        sizes, shapes = self.code.prepare(sizes, way)
        vectors, x = _some_vectors(shapes), _some_input(sizes, plain=plain)
        called = self.code.call(x, vectors, way, True)
        if called.output is None:
            raise Failed("nothing is returned: is `return` missing?")
        numbers = as_numbers(called.output)
        if numbers is None or tuple(numbers.shape) != sizes:
            shape = "no numbers" if numbers is None else tuple(numbers.shape)
            raise Failed(f"the output is {shape}, where x is of shape {sizes}")
        output = numbers.nan_to_num(0, 0, 0)
        return _Seen(way, sizes, vectors, x, called, output, self._case(x, vectors))

    def _case(self, x: Tensor, vectors: dict[str, Tensor]) -> Case:
        """x with vectors that are broadcast along its channels, or its elements."""

        def fitting(value: Tensor) -> Tensor:
            if value.numel() == x[0].numel():
                return value.reshape(x.shape[1:])
            for_each = x.shape[1] // value.numel() if x.shape[1] % value.numel() == 0 else 1
            return value.flatten().repeat_interleave(for_each).view(-1, 1, 1)

        vectors = {"scale": torch.ones(1), "shift": torch.zeros(1), **vectors}
        fit = {role: fitting(vectors[role]) for role in VECTORS if role in vectors}
        return Case(x, groups=self.code.groups, **fit)

    def _search(
        self, output: Tensor, case: Case, among: Iterable[tuple[Formula, tuple]]
    ) -> tuple[Formula, tuple] | None:
        """The first formula that gives this output, as long as there is time to look for it."""
        for formula, mistakes in among:
            if time.monotonic() > self.enough:
                return None
            if _near(output, formula(case)):
                return formula, mistakes
        return None

    def _explained(self, seen: _Seen) -> tuple[Formula | None, Mistakes, Mistakes] | None:
        """The formula that gives this output, and its mistakes, those of scale and shift apart."""
        single = norm_mistakes(self.kind, cube=len({*seen.sizes[1:]}) == 1)
        more = explanations if seen.sizes in _OTHERS else norm_explanations
        moved = self._case(seen.x, seen.vectors | _statistics(seen.called))
        running = [*explanations(self.right, USED_IN_TRAINING, 1, 1)] * ("mean" in seen.vectors)
        known = (
            self._search(seen.output, seen.case, explanations(self.right, single, 1))
            or self._search(seen.output, seen.case, running)
            or self._search(seen.output, moved, running)
            or self._search(seen.output, seen.case, more(self.right, single))
        )
        if known is None:
            return None
        formula, mistakes = known
        told = {each.name: with_numbers(self.kind, each) for each in mistakes}
        affine = {each.name: told.pop(each.name) for each in mistakes if "affine" in each.change}
        return None if formula.running else formula, told, affine

    def _difference(self, seen: _Seen) -> str:
        return f"for x of shape {seen.sizes}, {_differs(seen.output, self.right(seen.case))}"

    # --- the parts ------------------------------------------------------------------------------

    def _sizes_of_vectors(self) -> Mistakes:
        """Another number of scales than the kind has."""
        channels, elements = self.seen.sizes[1], math.prod(self.seen.sizes[1:])
        named = {1: "one scale for all channels", self.code.groups: "scale and shift by group"}
        named |= {elements: "scale and shift by element", channels: "scale and shift by channel"}
        due = elements if self.kind == "ln-elementwise" else channels
        mistakes = {}
        for each in {"shift", "scale"} & {*self.seen.vectors}:
            if (number := self.seen.vectors[each].numel()) != due:
                text = f"the {each} is {number} numbers for x of shape {self.seen.sizes}, not {due}"
                mistakes[named.get(number, "number of scales")] = text
        return mistakes

    def _gradients(self) -> Mistakes | None:
        """Whether x, scale and shift have the right ones; None where there need not be any."""
        seen = self._call(self.seen.way, self.seen.sizes, plain=True)
        called, upstream = seen.called, _random(seen.sizes, 9)
        if self.backward is not None:
            given = self._by_hand(seen, upstream)
        elif not getattr(called.output, "requires_grad", False):
            arrays = not seen.way.gradients or not isinstance(called.output, Tensor)
            text = "the output is cut off from x: no gradients flow through it"
            return None if arrays or "numpy" in self.code.names else {"no gradients": text}
        elif plain := [role for role, leaf in called.leaves.items() if not leaf.requires_grad]:
            text = f"{' and '.join(plain)} must be nn.Parameter, or no optimiser will train them"
            return {"scale and shift are no parameters": text}
        else:
            wanted = (called.output, [*called.leaves.values()], upstream.to(called.output.dtype))
            found = checking.attempt(torch.autograd.grad, *wanted, allow_unused=True)
            given = dict(zip(called.leaves, found, strict=True))
        due = self._due(seen, self.formula, upstream)
        given = {role: due[role] * 0 if each is None else each for role, each in given.items()}
        mistakes = {
            f"gradient of {role}": f"the gradient of {role} is wrong: {_differs(each, due[role])}"
            for role, each in given.items()
            if not _same(each, due[role])
        }
        for formula, (mistake,) in explanations(self.formula, DETACHED, 1, 1):
            if "gradient of x" in mistakes and _same(
                given["x"], self._due(seen, formula, upstream)["x"]
            ):
                del mistakes["gradient of x"]
                mistakes[mistake.name] = mistake.sentence
        return mistakes

    def _by_hand(self, seen: _Seen, upstream: Tensor) -> dict[str, object]:
        """The gradients of a backward pass written by hand."""
        cache = seen.called.returned[1:]
        values = {**seen.vectors, "x": seen.x, "dy": upstream}
        values = {role: seen.way.give(value) for role, value in values.items()}
        values |= {"cache": cache[0] if len(cache) == 1 else cache}
        values |= {"eps": EPSILON, "groups": self.code.groups}
        roles = roles_of(self.backward, values, ("dy", "cache", *_LEARNED))
        found = checking.call(self.backward, values, roles)
        found = found if isinstance(found, tuple | list) else (found,)
        return dict(zip([role for role in _LEARNED if role in values], found, strict=False))

    def _due(self, seen: _Seen, formula: Formula, upstream: Tensor) -> dict[str, Tensor]:
        """The gradients of x, scale and shift by a formula."""
        leaves = {"x": seen.x, **seen.vectors}
        leaves = {role: leaves[role].clone() for role in _LEARNED if role in leaves}
        for leaf in leaves.values():
            leaf.requires_grad_()
        output = formula(self._case(leaves["x"], seen.vectors | leaves))
        found = torch.autograd.grad(output, [*leaves.values()], upstream, allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    def _shapes(self) -> Mistakes:
        """One image, images of one pixel, square ones."""
        n, c, h, w = self.seen.sizes
        shapes = {"N = 1": (1, c, h, w), "H = W": (n, c, h, h), "H = W = 1": (n, c, 1, 1)}
        if self.kind == "in":  # of one pixel there is nothing to normalize
            del shapes["H = W = 1"]
        mistakes = {}
        for name, sizes in shapes.items():
            text = f"it is right for x of shape {self.seen.sizes}, but not for {sizes}"
            try:
                seen = self._call(self.seen.way, sizes)
                due = self.formula(seen.case)
                if due is not None and not _near(seen.output, due):
                    mistakes[f"shape {name}"] = f"{text}: {_differs(seen.output, due)}"
            except Failed as error:
                mistakes[f"shape {name}"] = f"{text}: {error}"
        return mistakes

    def _running(self) -> Mistakes:
        vectors, x, called = self.seen.vectors, self.seen.x, self.seen.called
        if not {"mean", "var"} <= {*vectors}:
            return {"no running statistics": "no running mean and variance are kept for evaluation"}
        after = _statistics(called)
        old, new = ([some[each].flatten() for each in ("mean", "var")] for some in (vectors, after))
        if {each.numel() for each in (*old, *new)} != {x.shape[1]}:
            return {"running statistics by channel": "running mean and variance must be (C,)"}
        batch = x.mean((0, 2, 3))
        seen = float(((new[0] - old[0]) / (batch - old[0])).median())
        rates = self.code.rates or {min(seen, 1 - seen) if 0.001 < seen < 0.999 else 0.1}
        for rule, mistakes in explanations(Running(), RUNNING):
            for rate in rates:
                if all(map(_same, new, rule(old, x, rate))):
                    return {each.name: f"{each.sentence}." for each in mistakes} | _graph_in(called)
        text = f"after a batch the running mean of channel 0 is {new[0][0]:.3g}, by none of the "
        text += f"usual mistakes; it was {old[0][0]:.3g}, that of the batch is {batch[0]:.3g}"
        return {"running statistics": text}

    def _evaluation(self) -> Mistakes:
        """What is wrong in evaluation, told by the word for it that is understood best."""
        found, errors = [], []
        for words in self.code.words:
            try:
                found.append(self._evaluated(replace(self.seen.way, words=words)))
            except Failed as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return min(found, key=len)

    def _evaluated(self, way: Way) -> Mistakes:
        x, vectors = self.seen.x, self.seen.vectors
        called = self.code.call(x, vectors, way, False)
        mistakes, after, given = {}, _statistics(called), called.output
        if any(not _same(new, vectors[role]) for role, new in after.items()):
            text = "running mean and variance change in evaluation; only training moves them"
            mistakes["running statistics moved in evaluation"] = text
        if self.kind != "bn":
            text = "the output is another in evaluation than in training; here it is the same"
            return mistakes if _same(given, self.seen.output) else {"other in evaluation": text}
        right = replace(self.formula, running=True)
        due = [right(self._case(x, vectors | after))] * bool(mistakes) + [right(self.seen.case)]
        if "mean" in vectors and any(_same(given, each) for each in due):
            return mistakes
        table = [*USED_IN_EVALUATION, *norm_mistakes(self.kind, cube=False)]
        numbers = as_numbers(given)
        known = numbers is not None and numbers.shape == x.shape
        known = known and self._search(numbers, self.seen.case, explanations(right, table, 2, 1))
        if not known:
            return mistakes | {"evaluation": "in evaluation the output is wrong"}
        return mistakes | {each.name: with_numbers(self.kind, each) for each in known[1]}

    def _dtype(self) -> Mistakes:
        for dtype in (torch.float32, torch.float64):
            way = replace(self.seen.way, dtype=dtype)
            output = self.code.call(self.seen.x, self.seen.vectors, way, True).output
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


def _graph_in(called: Called) -> Mistakes:
    """Running statistics with a history of gradients, or that an optimiser would change."""
    if any(isinstance(each, nn.Parameter) for each in called.after.values()):
        text = "running mean and variance are parameters, so that an optimiser changes them; "
        return {"running statistics are parameters": text + "use register_buffer"}
    if any(getattr(each, "requires_grad", False) for each in called.after.values()):
        text = "the running statistics keep the history of gradients of every batch; move them "
        return {"running statistics in the graph": text + "under torch.no_grad() or detached"}
    return {}


def _near(given: Tensor, due: Tensor | None) -> bool:
    """Whether numbers are the same but for rounding to float32, as the largest goes."""
    if due is None:
        return False
    due = due.nan_to_num(0, 0, 0)  # the root of what is below 0; `given` is without them
    return bool((given - due).abs().max() <= 5e-4 * due.abs().max() + 1e-6)


def _same(given: object, due: Tensor | None) -> bool:
    """Whether what a student's code gives is the same numbers, in any layout."""
    numbers = as_numbers(given)
    if numbers is None or due is None or numbers.numel() != due.numel():
        return False
    return _near(numbers.flatten().nan_to_num(0, 0, 0), due.detach().flatten())


def _differs(given: object, due: Tensor | None) -> str:
    """Where numbers differ most."""
    numbers = as_numbers(given)
    if numbers is None or due is None or numbers.numel() != due.numel():
        return f"{None if numbers is None else tuple(numbers.shape)} is no shape that fits"
    apart = (numbers.view(due.shape) - due).abs().nan_to_num(1e9)
    index = tuple(map(int, torch.unravel_index(apart.argmax(), apart.shape)))
    numbers = numbers.view(due.shape)
    return f"number {list(index)} is {numbers[index]:.3g} where {due[index]:.3g} is right"
