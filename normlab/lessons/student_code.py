"""A student's normalization, function, class or object, called in the way that it wants."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.lessons.checking import Failed, as_numbers, call, role_of, roles_of
from normlab.norms import EPSILON
from normlab.support.module_state import copied

_NAMES = {"scale": "scale", "shift": "shift", "mean": "running_mean", "var": "running_var"}
VECTORS = (*_NAMES,)
_ROLES = ("x", *VECTORS, "groups", "eps", "momentum", "training", "evaluation", "options")
_ROLES += ("channels", "shape", "size", "dims", "device")
_ORDER = ("x", "groups", *VECTORS)  # of arguments with other names
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)


@dataclass(frozen=True)
class Way:
    """How a student's code wants its arguments.

    Args:
        numpy: arrays instead of tensors.
        gradients: whether tensors require gradients; numpy inside does not allow it.
        layout: the shape of vectors; "1C11" is (1, C, 1, 1).
        words: what it is told in training, and in evaluation.
        dtype: of tensors.
    """

    numpy: bool = False
    gradients: bool = True
    layout: str = "C"
    words: tuple[object, object] = (True, False)
    dtype: torch.dtype = torch.float32

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of vectors for x of these sizes."""
        return tuple(1 if axis == "1" else sizes["NCHW".index(axis)] for axis in self.layout)

    def give(self, value: Tensor) -> object:
        """A copy of a tensor of float64, as the student's code wants it."""
        return value.numpy().copy() if self.numpy else value.to(self.dtype, copy=True)


@dataclass
class Called:
    """What one call took and gave: tensors or arrays, of the student's own kind."""

    returned: tuple
    x: object  # after the call
    after: dict[str, object]  # the running statistics after it
    leaves: dict[str, object]  # x, scale and shift, of which gradients are taken

    @property
    def output(self) -> object:
        return self.returned[0]


class _Function:
    """A student's function as an object that keeps the vectors that the function takes."""

    def __init__(self, code: "StudentCode", sizes: tuple[int, ...], way: Way) -> None:
        self.code, self.way, self.training = code, way, True
        self.momentum = code.momentum
        for role in VECTORS:
            if role in code.takes:
                setattr(self, _NAMES[role], way.give(torch.ones(way.shape(sizes))))

    def __call__(self, x: object) -> tuple:
        """What is returned; running statistics are kept, wherever the function leaves them."""
        state = {role: vars(self)[name] for role, name in _NAMES.items() if name in vars(self)}
        before = {role: as_numbers(value) for role, value in state.items()}
        if self.way.gradients:  # a function may change what it is given
            state |= {role: state[role].clone() for role in VECTORS[:2] if role in state}
        running = {_NAMES[role]: state[role] for role in VECTORS[2:] if role in state}
        mode = "train" if self.training else "test"
        options = defaultdict(lambda: 0.9, mode=mode, eps=EPSILON, **running)  # as CS231n's
        values = {
            **{"x": x, "groups": self.code.groups, "eps": EPSILON, "momentum": 0.1, "dims": 4},
            **{"training": self.way.words[not self.training], "evaluation": not self.training},
            **{"channels": x.shape[1], "shape": tuple(x.shape[1:]), "size": tuple(x.shape[2:])},
            **{"options": options, "device": "cpu", **state},
        }
        found = call(self.code.made, values, self.code.roles, self.code.default)
        found = found if isinstance(found, tuple) else (found,)
        numbers = [(each, as_numbers(each)) for each in found[1:]]
        later = [e for e, value in numbers if value is not None and value.numel() == x.shape[1]]
        for role, given_back in zip(VECTORS[2:], (*later, None, None), strict=False):
            if role in state:
                kept = options[_NAMES[role]]
                moved = given_back is None or not torch.equal(as_numbers(kept), before[role])
                setattr(self, _NAMES[role], kept if moved else given_back)
        return found


class StudentCode:
    """A function, class or object as a student wrote it, to be called.

    Args:
        made: that.
        kind: of `NORMS`.
        groups: their number, if it is neither an argument nor kept by the object.

    Raises `TypeError` for what cannot be called.
    """

    def __init__(self, made: object, kind: str, groups: int | None) -> None:
        self.made = made = _applied(made)
        self.is_class = inspect.isclass(made)
        self.is_function = isinstance(made, _FUNCTIONS) or hasattr(made, "__wrapped__")
        if not callable(made) and not hasattr(made, "forward"):
            raise TypeError(f"a function, a class or a module is checked, not {made!r:.60}")
        self.vectors: set[str] = set()  # which it takes or keeps
        self.rates, self.evaluates, self.groups = None, True, groups or 2
        layouts = ("CHW",) if kind == "ln-elementwise" else ("C", "1C11", "C11", "CHW")
        self.words = [(True, False)]
        if self.is_function:
            self._read(kind)
            if {each.name for each in self.roles} & {"mode", "phase"}:
                self.words = [("train", "test"), ("train", "eval"), *self.words]
        elif self.is_class:
            order = ("groups", "channels") if kind == "gn" else ("channels", "groups")
            self.roles = roles_of(made, (order[0], *_ROLES), order)
            self.names = _names_in(vars(made).values())
        else:
            self.names, layouts = _names_in(vars(type(made)).values()), ("C",)
            self.groups = groups or _settings(made).get("groups") or 2
        tensors, arrays = [(False, True)], [(True, False)]
        if numpy := self.names & {"np", "numpy"}:
            tensors += [(False, False)]
        kinds = arrays + tensors if numpy and "torch" not in self.names else tensors + arrays
        self.named = bool(numpy) or "torch" in self.names or isinstance(made, nn.Module)
        ways = product(kinds, layouts)
        self.ways = [Way(*how, layout, self.words[0]) for how, layout in ways]

    def _read(self, kind: str) -> None:
        """What a function takes, by the names of its arguments and of what its code uses."""
        order = tuple(role for role in _ORDER if role != "groups" or kind == "gn")
        self.roles = roles_of(self.made, _ROLES, order)
        if kind == "gn" and "shift" not in self.roles.values():  # then g is the number of groups
            self.roles = roles_of(self.made, ("groups", *_ROLES), order)
        self.names = _names_in([self.made])
        self.takes = {*self.roles.values()}
        self.takes |= {"mean", "var", "training"} if "options" in self.takes else set()
        told = {"training", "evaluation", "is_grad_enabled"}
        self.evaluates = bool(told & (self.takes | self.names))
        defaults = {role: each.default for each, role in self.roles.items()}
        self.momentum = defaults.get("momentum", ...)
        self.default = "momentum" if kind == "gn" else "momentum groups"

    def _make(self, sizes: tuple[int, ...], way: Way) -> object:
        """An object of its own, for x of these sizes."""
        if self.is_function:
            return _Function(self, sizes, way)
        if not self.is_class:
            return copied(self.made) if isinstance(self.made, nn.Module) else deepcopy(self.made)
        values = {  # "features" is x in a call, but the number of channels here
            **{"channels": sizes[1], "x": sizes[1], "groups": self.groups, "size": sizes[2:]},
            **{"eps": EPSILON, "momentum": 0.1, "dims": 4, "device": "cpu"},
            "shape": sizes[1] if way.layout == "C" else way.shape(sizes),
        }
        return call(self.made, values, self.roles, "momentum")

    def prepare(self, sizes: tuple[int, ...] | None, way: Way) -> tuple[tuple, dict[str, tuple]]:
        """The sizes of x, those wanted or such as fit, and the shapes of the vectors."""
        wanted = sizes or _apart(3 * self.groups)
        made = self._make(wanted, way)
        shapes = {role: tuple(value.shape) for role, value in _now(_places(made)).items()}
        self.vectors = {*shapes}
        self.rates = _rates(_settings(made).get("momentum", ...))
        if shapes and not self.is_class and not self.is_function:
            longest = max(shapes.values(), key=math.prod)
            sides = [side for side in longest if side > 1]
            if len(sides) == 3 and len(longest) < 5:  # (C, H, W)
                return (wanted[0], *sides), shapes
            wanted = sizes or _apart(math.prod(longest))
        return wanted, shapes

    def call(self, x: Tensor, vectors: dict[str, Tensor], way: Way, training: bool) -> Called:
        """Calls it with x, where it has these vectors; they and x are of float64."""
        made = self._make(tuple(x.shape), way)
        if module := isinstance(made, nn.Module):
            made.to(way.dtype).train(training)
        for name in () if module else [*vars(made)]:
            if role := role_of(name, ("training", "evaluation")):
                setattr(made, name, training == (role == "training"))
        places = _places(made)
        leaves = _now(places)
        for role, value in vectors.items():
            _fill(leaves[role], value)
        leaves = {role: leaves[role] for role in VECTORS[:2] if role in leaves}
        leaves["x"] = way.give(x)
        for role, leaf in leaves.items():
            if way.gradients and isinstance(leaf, Tensor) and (role == "x" or not module):
                leaf.requires_grad_()
        given = leaves["x"].clone() if way.gradients else leaves["x"]
        method = made if callable(made) else made.forward
        values = {"x": given, "training": training}
        with torch.set_grad_enabled(training):
            returned = call(method, values, roles_of(method, values, ("x",)))
        returned = returned if isinstance(returned, tuple) else (returned,)
        after = {role: each for role, each in _now(places).items() if role in VECTORS[2:]}
        return Called(returned, given, after, leaves)


def _applied(made: object) -> object:
    """A function, for a class of `torch.autograd.Function`."""
    if not (inspect.isclass(made) and issubclass(made, torch.autograd.Function)):
        return made
    function = lambda *arguments: made.apply(*arguments)  # noqa: E731
    parameters = [*inspect.signature(made.forward).parameters.values()][1:]  # without ctx
    function.__signature__ = inspect.Signature(parameters)
    function.__wrapped__ = made.forward
    return function


def _names_in(functions: Iterable[object]) -> set[str]:
    """All names that the code of functions uses, such as "torch" or "np"."""
    codes = [
        getattr(inspect.unwrap(each), "__code__", None) for each in functions if callable(each)
    ]
    names = set()
    while codes:
        if isinstance(code := codes.pop(), CodeType):
            names |= {*code.co_names}
            codes += code.co_consts
    return names


def _apart(channels: int) -> tuple[int, int, int, int]:
    """Sizes (N, C, H, W) that all differ."""
    n, h, w = [size for size in (4, 2, 5, 3) if size != channels][:3]
    return n, channels, h, w


def _rates(momentum: object) -> set[float] | None:
    """The share of a batch that a momentum may stand for; None if it is not known."""
    if momentum is inspect.Parameter.empty:  # then it is given 0.1: of the old or of the new
        return {0.1, 0.9}
    if momentum is None:  # the first of a mean of all
        return {1.0}
    return {min(momentum, 1 - momentum)} if isinstance(momentum, float) else None


def _layers(made: object) -> list[object]:
    return [*made.modules()] if isinstance(made, nn.Module) else [made]


def _settings(made: object) -> dict[str, object]:
    """What an object or its layers keep beside tensors, by role: groups and momentum."""
    kept = {}
    for layer in _layers(made):
        for name, value in getattr(layer, "__dict__", {}).items():
            role = role_of(name, ("groups", "momentum"))
            if role and value is not ... and not isinstance(value, Tensor | np.ndarray):
                kept.setdefault(role, value)
    return kept


def _places(made: object) -> dict[str, tuple[object, str]]:
    """Where an object keeps scale, shift and running statistics: the layer and the attribute.

    They are found by their names, else by their first values.
    """
    found, unknown = {}, {}
    for layer in _layers(made):
        module = isinstance(layer, nn.Module)
        kept = {**layer._parameters, **layer._buffers} if module else {}
        for name, value in {**kept, **getattr(layer, "__dict__", {})}.items():
            if is_lazy(value):
                raise Failed("a lazy layer has no parameters yet: call it once before the check")
            if not isinstance(value, Tensor | np.ndarray) or not value.ndim:
                continue
            if role := role_of(name, VECTORS):
                found.setdefault(role, (layer, name))
            elif name in kept:
                zeros, ones = ("shift", "scale") if name in layer._parameters else ("mean", "var")
                for role, end in ((zeros, 0), (ones, 1)):
                    unknown |= {role: (layer, name)} if bool((value == end).all()) else {}
    found = unknown | found
    return {role: found[role] for role in VECTORS if role in found}


def _now(places: dict[str, tuple[object, str]]) -> dict[str, object]:
    return {role: getattr(layer, name) for role, (layer, name) in places.items()}


def _fill(target: object, value: Tensor) -> None:
    if isinstance(target, Tensor):
        target.data.copy_(value.reshape(target.shape))
    else:
        target[...] = value.reshape(target.shape).numpy()
