"""`check_norm`: whether a student's normalization is right, and which mistakes it has if not."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normlab.lessons import checking
from normlab.lessons.checking import Checked, Failed, Part, attempt, bound, checked
from normlab.lessons.norm_mistakes import (
    DETACHED,
    Formula,
    explanations,
    right_formula,
    running_explanations,
    with_numbers,
)
from normlab.lessons.student_code import (
    Called,
    FunctionCode,
    ObjectCode,
    Way,
    as_numbers,
    role_of,
    student_code,
)
from normlab.norms import EPSILON, NORMS, norm_name
from normlab.support.checks import one_of, whole_number
from normlab.support.seeding import generator


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
    title = NORMS[name].title
    code = student_code(candidate, name, groups)
    return checked(title, _NormCheck(name, code, backward).parts())


_FACTORS = (1.0, 3e-3, 1e-4)  # factors of the inputs, so that epsilon shows
_OTHERS = ((4, 4, 2, 2), (4, 4, 4, 4))  # the shape of nl.example_batch(), and equal axes


@dataclass
class _Try:
    """How the code did in one way of calling it, for x of one shape."""

    way: Way
    sizes: tuple[int, ...] = ()
    vectors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    called: list[Called] = field(default_factory=list)  # none where an error was raised
    error: Failed | None = None


class _NormCheck:
    """The parts of a check, each a method that returns mistakes with their sentences."""

    def __init__(
        self, kind: str, code: FunctionCode | ObjectCode, backward: Callable | None
    ) -> None:
        self.kind, self.code, self.backward = kind, code, backward
        self.right = right_formula(kind)
        self.enough = time.monotonic() + checking.SECONDS / 2  # for looking for an explanation

    def parts(self) -> Iterator[Part]:
        self.found, self.formula, forward, affine = self._best()
        roles = self.code.roles
        with_affine = bool(roles & {"scale", "shift"})
        forward |= {} if with_affine else affine
        yield Part("forward in training" if self.kind == "bn" else "forward", forward)
        if with_affine:
            yield Part("scale and shift", affine | self._sizes_of_vectors())
        if not self.found.called:
            return
        looks = {"input unchanged": self._unchanged, "gradients": self._gradients}
        looks["other shapes"] = self._shapes
        if self.kind == "bn" and ("mean" in roles or isinstance(self.code, ObjectCode)):
            looks["running statistics"] = self._running
        if self.code.evaluates:
            looks["evaluation"] = self._evaluation
        if not self.found.way.numpy:
            looks["dtype"] = self._dtype
        in_place = {}
        for name, look in looks.items():
            try:
                mistakes = look()
            except Failed as error:
                mistakes = in_place or {f"error in {name}": f"{name}: {error}"}
            in_place = mistakes if name == "input unchanged" else in_place
            if self.formula is None and mistakes and name in ("gradients", "other shapes"):
                mistakes = forward  # what follows from it is no other mistake
            if mistakes is not None:
                yield Part(name, mistakes)

    # --- forward --------------------------------------------------------------------------------

    def _best(self) -> tuple[_Try, Formula | None, dict[str, str], dict[str, str]]:
        """The best way of calling, the formula that it follows, and its mistakes."""
        tries = [*self._tries()]
        ran = [each for each in tries if each.called]
        ran.sort(key=lambda each: (not self._agrees(each, self.right), not self._evaluates(each)))
        for each in ran:
            if known := self._explained(each):
                return each, *known
        for sizes in _OTHERS:
            for each in self._tries(sizes):
                if each.called and (known := self._explained(each)):
                    return each, *self._at_one_shape(tries[0], each, known)
        if not ran:
            error = {"error": str(tries[0].error)}
            return tries[0], None, error, error
        text = f"the output is wrong, by none of the usual mistakes: {self._difference(ran[0])}"
        return ran[0], None, {"unknown": text}, {}

    def _tries(self, sizes: tuple[int, ...] | None = None) -> Iterator[_Try]:
        """Calls in each way; vectors of another layout only where the former raised."""
        ran = set()
        for way in self.code.ways:
            if (way.numpy, way.words) not in ran:
                yield (tried := self._try(way, sizes))
                ran |= {(way.numpy, way.words)} if tried.called else set()

    def _try(self, way: Way, sizes: tuple[int, ...] | None) -> _Try:
        found = _Try(way)
        try:
            found.sizes, shapes = self.code.prepare(sizes, way)
            found.vectors = _some_vectors(shapes)
            found.inputs = [_some_input(found.sizes) * factor for factor in _FACTORS]
            called = [self.code.call(x, found.vectors, way, True) for x in found.inputs]
            for each in called:
                if each.output is None:
                    raise Failed("nothing is returned: is `return` missing?")
                if each.numbers is None or tuple(each.numbers.shape) != found.sizes:
                    shape = "no numbers" if each.numbers is None else tuple(each.numbers.shape)
                    raise Failed(f"the output is {shape}, where x is of shape {found.sizes}")
            found.called = called
        except Failed as error:
            found.error = error
        return found

    def _agrees(self, tried: _Try, formula: Formula) -> bool:
        pairs = zip(tried.inputs, tried.called, strict=True)
        return all(
            _close(called.numbers, self._output(formula, x, tried.vectors)) for x, called in pairs
        )

    def _output(self, formula: Formula, x: Tensor, vectors: dict[str, Tensor]) -> Tensor | None:
        """What a formula gives; None where it does not fit the shape of x."""
        try:
            return formula(x, *_affine(x, vectors), self.code.groups)
        except RuntimeError:
            return None

    def _evaluated(self, formula: Formula, x: Tensor, vectors: dict[str, Tensor]) -> Tensor | None:
        """What a formula gives in evaluation, by running statistics if there are any."""
        if "mean" not in vectors or "var" not in vectors:
            return self._output(formula, x, vectors)
        statistics = (vectors[each].reshape(-1, 1, 1) for each in ("mean", "var"))
        try:
            return formula.evaluated(x, *_affine(x, vectors), *statistics)
        except RuntimeError:
            return None

    def _evaluates(self, tried: _Try) -> bool:
        """Whether evaluation is right when called in this way."""
        if self.kind != "bn" or not self.code.evaluates:
            return True
        try:
            called = self.code.call(tried.inputs[0], tried.vectors, tried.way, False)
        except Failed:
            return False
        return _close(called.numbers, self._evaluated(self.right, tried.inputs[0], tried.vectors))

    def _explanations(self, cube: bool, most: int) -> Iterator[tuple[Formula, tuple]]:
        """Formulas with up to so many mistakes, as long as there is time to look for them."""
        for formula, mistakes in explanations(self.kind, cube=cube):
            if len(mistakes) > most or time.monotonic() > self.enough:
                return
            yield formula, mistakes

    def _explained(self, tried: _Try) -> tuple[Formula, dict[str, str], dict[str, str]] | None:
        """The formula that gives this output, and its mistakes, those of scale and shift apart."""
        cube = len({*tried.sizes[1:]}) == 1
        for formula, mistakes in self._explanations(cube, 2 if tried.sizes in _OTHERS else 3):
            if self._agrees(tried, formula):
                affine = [each for each in mistakes if "affine" in each.change]
                forward = [each for each in mistakes if each not in affine]
                told = [
                    {m.name: with_numbers(self.kind, m) for m in some} for some in (forward, affine)
                ]
                return formula, *told
        moved = tried.vectors | _statistics(tried.called[0])
        for vectors in (tried.vectors, moved) if "mean" in tried.vectors else ():
            given = self._evaluated(self.right, tried.inputs[0], vectors)
            if self.kind == "bn" and _close(tried.called[0].numbers, given):
                text = "in training x is normalized by the running statistics; it is by the batch's"
                return None, {"running statistics used in training": text}, {}
        return None

    def _at_one_shape(self, tried: _Try, other: _Try, known: tuple) -> tuple:
        """What is known of code that follows a formula for x of another shape only."""
        formula, forward, affine = known
        if not forward and not affine:
            said = str(tried.error or self._difference(tried))
            text = f"it is right for x of shape {other.sizes} only; for another shape: {said}"
            forward = {"constant of the example's shape": text}
        return formula, forward, affine

    def _difference(self, tried: _Try) -> str:
        """Where the output is wrong most."""
        given = tried.called[0].numbers
        due = self._output(self.right, tried.inputs[0], tried.vectors)
        if due is None:
            return "scale and shift do not fit x"
        apart = (given - due).abs().nan_to_num(1e9)
        index = tuple(map(int, torch.unravel_index(apart.argmax(), apart.shape)))
        return (
            f"for x of shape {tried.sizes}, number {list(index)} is {given[index]:.3g} where "
            f"{due[index]:.3g} is right"
        )

    # --- the other parts ------------------------------------------------------------------------

    def _sizes_of_vectors(self) -> dict[str, str]:
        """Another number of scales than the kind has."""
        _, *image = self.found.sizes
        words = {
            1: ("one scale for all channels", "a single number for all channels"),
            self.code.groups: ("scale and shift by group", "one for every group"),
            math.prod(image): ("scale and shift by element", "one for every element (C, H, W)"),
            image[0]: ("scale and shift by channel", "one for every channel"),
        }
        due = math.prod(image) if self.kind == "ln-elementwise" else image[0]
        mistakes = {}
        for each in ("shift", "scale"):
            number = math.prod(self.found.vectors.get(each, torch.empty(due)).shape)
            if number != due:
                name, said = words.get(number, ("number of scales", f"{number} numbers"))
                title = NORMS[self.kind].title.split(",")[0]
                mistakes[name] = f"the {each} is {said}; {title} has {words[due][1]} here"
        return mistakes

    def _gradients(self) -> dict[str, str] | None:
        upstream = _random(self.found.sizes, 9)
        given = self._given(upstream)
        if given is None or "x" not in given:
            return given
        formula = self.formula or self.right
        due = self._due(formula, upstream)
        given = {role: due[role] * 0 if each is None else each for role, each in given.items()}
        wrong = [role for role in given if not _same(given[role], due[role])]
        mistakes = {
            f"gradient of {role}": _told_gradient(role, given[role], due[role]) for role in wrong
        }
        for name, detached in DETACHED if "x" in wrong else ():
            other = self._due(replace(formula, detached=detached), upstream)
            if _same(given["x"], other["x"]):
                del mistakes["gradient of x"]
                mistakes[name] = (
                    f"the gradient of x misses the terms of {' and '.join(detached)}: they depend "
                    "on x, so they must not be detached or computed without gradients"
                )
                break
        return mistakes

    def _given(self, upstream: Tensor) -> dict[str, object] | None:
        """The gradients by the student's code, a mistake, or None where there need not be any."""
        way, x, vectors = self.found.way, self.found.inputs[0], self.found.vectors
        arrays = way.numpy or "numpy" in self.code.libraries  # no gradients are expected then
        try:
            called = self.code.call(x, vectors, replace(way, leaves=not way.numpy), True)
        except Failed:
            if arrays and self.backward is None:
                return None
            raise
        if self.backward is not None:
            return self._by_hand(called, upstream)
        if not getattr(called.output, "requires_grad", False):
            text = "the output is cut off from x: no gradients flow through it"
            return None if arrays else {"no gradients": text}
        leaves = called.leaves
        if plain := [role for role, leaf in leaves.items() if not leaf.requires_grad]:
            text = f"{' and '.join(plain)} must be nn.Parameter, or no optimiser will train them"
            return {"scale and shift are no parameters": text}
        wanted = (called.output, [*leaves.values()], upstream.to(called.output.dtype))
        found = attempt(torch.autograd.grad, *wanted, allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    def _by_hand(self, called: Called, upstream: Tensor) -> dict[str, object]:
        """The gradients of a backward pass written by hand."""
        way, vectors = self.found.way, self.found.vectors
        values = {role: way.give(v) for role, v in (vectors | {"x": self.found.inputs[0]}).items()}
        values |= {"dy": way.give(upstream), "eps": EPSILON, "groups": self.code.groups}
        values |= {"cache": called.rest[0] if len(called.rest) == 1 else called.rest}
        arguments = bound(self.backward, values, role_of, ("dy", "cache", "x", "scale", "shift"))
        found = attempt(self.backward, *arguments.args, **arguments.kwargs)
        found = found if isinstance(found, tuple | list) else (found,)
        roles = ("x", *(each for each in ("scale", "shift") if each in vectors))
        return dict(zip(roles, found, strict=False))

    def _due(self, formula: Formula, upstream: Tensor) -> dict[str, Tensor]:
        """The gradients of x, scale and shift by a formula."""
        leaves = {"x": self.found.inputs[0], **self.found.vectors}
        leaves = {role: leaf.clone().requires_grad_() for role, leaf in leaves.items()}
        output = self._output(formula, leaves["x"], leaves)
        if output is None:
            raise Failed("scale and shift do not fit x")
        wanted = {role: leaf for role, leaf in leaves.items() if role in ("x", "scale", "shift")}
        found = torch.autograd.grad(output, [*wanted.values()], upstream, allow_unused=True)
        return dict(zip(wanted, found, strict=True))

    def _shapes(self) -> dict[str, str] | None:
        """One image, images of one pixel, square ones."""
        if self.found.sizes in _OTHERS:  # it is known already that it depends on the shape
            return None
        n, c, h, w = self.found.sizes
        mistakes, formula = {}, self.formula or self.right
        named = {"N = 1": (1, c, h, w), "H = W = 1": (n, c, 1, 1), "H = W": (n, c, h, h)}
        if self.kind == "in":  # torch refuses one pixel, too: there is nothing to normalize
            del named["H = W = 1"]
        for name, sizes in named.items():
            sizes, shapes = self.code.prepare(sizes, self.found.way)
            vectors, x = _some_vectors(shapes), _some_input(sizes)
            text = f"it is right for x of shape {self.found.sizes}, but not for {sizes}"
            due = self._output(formula, x, vectors)
            try:
                given = self.code.call(x, vectors, self.found.way, True).numbers
            except Failed as error:
                mistakes[f"shape {name}"] = f"{text}: {error}"
                continue
            if due is not None and not _close(given, due):
                mistakes[f"shape {name}"] = text
        return mistakes

    def _running(self) -> dict[str, str]:
        vectors = self.found.vectors
        if not {"mean", "var"} <= {*vectors}:
            return {"no running statistics": "no running mean and variance are kept for evaluation"}
        after = _statistics(self.found.called[0])
        old, new = ([some[each].flatten() for each in ("mean", "var")] for some in (vectors, after))
        x = self.found.inputs[0]
        batch, n = [x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)], x[:, 0].numel()
        if {each.numel() for each in (*old, *new)} != {x.shape[1]}:
            return {"running statistics by channel": "running mean and variance must be (C,)"}
        seen = float(((new[0] - old[0]) / (batch[0] - old[0])).median())
        rates = self.code.rates or {min(seen, 1 - seen) if 0.001 < seen < 0.999 else 0.1}
        for rule, mistakes in running_explanations():
            for rate in rates:
                if all(map(_same, new, rule(old, batch, n, rate))):
                    return {each.name: f"{each.sentence}." for each in mistakes} | self._in_graph()
        text = f"after a batch the running mean of channel 0 is {float(new[0][0]):.3g}, by none of "
        text += f"the usual mistakes; it was {float(old[0][0]):.3g}, that of the batch is "
        return {"running statistics": f"{text}{float(batch[0][0]):.3g}"}

    def _in_graph(self) -> dict[str, str]:
        """Running statistics with a history of gradients, or that an optimiser would change."""
        if self.found.way.numpy:
            return {}
        way, x = replace(self.found.way, leaves=True), self.found.inputs[0]
        after = self.code.call(x, self.found.vectors, way, True).after.values()
        if any(isinstance(each, nn.Parameter) for each in after):
            text = "running mean and variance are parameters, so that an optimiser changes them; "
            return {"running statistics are parameters": text + "use register_buffer"}
        if any(getattr(each, "requires_grad", False) for each in after):
            text = "the running statistics keep the history of gradients of every batch; move them "
            return {"running statistics in the graph": text + "under torch.no_grad() or detached"}
        return {}

    def _evaluation(self) -> dict[str, str]:
        x, vectors = self.found.inputs[0], self.found.vectors
        called = self.code.call(x, vectors, self.found.way, False)
        mistakes, given = {}, called.numbers
        if any(not _same(new, vectors[role]) for role, new in _statistics(called).items()):
            text = "running mean and variance change in evaluation; only training moves them"
            mistakes["running statistics moved in evaluation"] = text
        formula = self.formula or self.right
        if self.kind != "bn":
            same = _close(given, self.found.called[0].numbers)
            text = "the output is another in evaluation than in training; here it is the same"
            return mistakes if same else {"other in evaluation": text}
        if "mean" in vectors and _close(given, self._evaluated(formula, x, vectors)):
            return mistakes
        if _close(given, self._output(formula, x, vectors)):
            text = "in evaluation x is normalized by the statistics of the batch instead of by the "
            return mistakes | {"batch statistics used in evaluation": text + "running ones"}
        for formula, found in self._explanations(False, 2):
            if _close(given, self._evaluated(formula, x, vectors)):
                return mistakes | {m.name: with_numbers(self.kind, m) for m in found}
        return mistakes | {"evaluation": "in evaluation the output is wrong"}

    def _dtype(self) -> dict[str, str]:
        x, vectors = self.found.inputs[0], self.found.vectors
        for dtype in (torch.float32, torch.float64):
            way = replace(self.found.way, dtype=dtype)
            output = self.code.call(x, vectors, way, True).output
            if isinstance(output, Tensor) and output.dtype != dtype:
                text = f"for x of {dtype} the output is {output.dtype}; it should keep the dtype"
                return {"dtype not kept": text}
        return {}

    def _unchanged(self) -> dict[str, str]:
        pairs = zip(self.found.inputs, self.found.called, strict=True)
        if all(_same(called.x, x) for x, called in pairs):
            return {}
        text = "x itself is changed by the call (as x -= … does); make a new tensor, x = x - …"
        return {"input changed in place": text}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def _some_input(sizes: tuple[int, ...]) -> Tensor:
    """x (N, C, H, W) with other means and deviations in each image and channel."""
    x = _random(sizes, 1) * (0.5 + _random((*sizes[:2], 1, 1), 2).abs())
    return (x + 0.7 * _random((*sizes[:2], 1, 1), 3)).float().double()


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


def _affine(x: Tensor, vectors: dict[str, Tensor]) -> list[Tensor]:
    """Scale and shift as they are broadcast along the channels, or the elements, of x."""
    found = []
    for each, absent in (("scale", torch.ones), ("shift", torch.zeros)):
        value = vectors.get(each, absent(1, dtype=x.dtype)).flatten()
        if x.shape[1] % value.numel() == 0:  # one for each group
            value = value.repeat_interleave(x.shape[1] // value.numel())
        by_element = value.numel() == x[0].numel()
        shape = x.shape[1:] if by_element else (-1, 1, 1) if value.numel() == x.shape[1] else (-1,)
        found.append(value.reshape(shape))
    return found


def _statistics(called: Called) -> dict[str, Tensor]:
    """The running statistics after a call, as numbers."""
    return {role: as_numbers(each) for role, each in called.after.items()}


def _close(given: Tensor | None, due: Tensor | None) -> bool:
    """Whether outputs are the same but for rounding to float32."""
    if given is None or due is None or given.shape != due.shape:
        return False
    finite = bool(due.isfinite().any())  # the root of a variance below 0 is NaN for both
    return finite and torch.allclose(given, due, rtol=5e-4, atol=2e-4, equal_nan=True)


def _same(given: object, due: Tensor) -> bool:
    """Whether numbers of any layout are the same but for rounding, as their largest goes."""
    numbers = as_numbers(given)
    if numbers is None or due is None or numbers.numel() != due.numel():
        return False
    return bool((numbers.flatten() - due.flatten()).abs().max() <= 1e-3 * due.abs().max() + 1e-6)


def _told_gradient(role: str, given: object, due: Tensor) -> str:
    numbers = as_numbers(given)
    if numbers is None or not numbers.any():
        return f"no gradient reaches the {role}: is it detached, or taken from .data?"
    if numbers.numel() != due.numel():
        return f"the gradient of {role} is of shape {tuple(numbers.shape)}, not {tuple(due.shape)}"
    given, due = numbers.flatten(), due.flatten()
    factor = float((given @ due) / (due @ due))
    if factor and _same(given / factor, due):
        return f"the gradient of {role} is {factor:.3g} times what it should be"
    place = int((given - due).abs().argmax())
    return f"the gradient of {role} is wrong: {given[place]:.3g} where {due[place]:.3g} is right"
