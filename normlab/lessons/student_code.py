"""A student's normalization, function, class or object, called in the way that it wants."""

import inspect
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.lessons.checking import (
    VARIADIC,
    Failed,
    attempt,
    bound,
    roles_by,
    signature_of,
)
from normlab.norms import EPSILON
from normlab.support.module_state import copied

# What arguments and attributes are usually called.
_ROLES = {
    "x": "x|xs|z|h|inputs?|images?|batch|data|tensor|features?|inp|activations?",
    "scale": "weights?|gammas?|scales?|g|w|gain|γ",
    "shift": "bias|betas?|shifts?|offset|b|β",
    "groups": "(n|num)?(of)?groups?|G",
    "eps": "eps|epsilon|e|ε",
    "mean": "(running|moving|run|ema|exp|pop|global|r)(mean|mu|avg|average|m)"
    "|(mean|mu)(run(ning)?|moving)",
    "var": "(running|moving|run|ema|exp|pop|global|r)(var|variance|v)"
    "|(var|variance)(run(ning)?|moving)",
    "momentum": "momentum|mom|m",
    "training": "(is)?train(ing)?(mode)?|mode|phase",
    "evaluation": "(is)?(eval|test|evaluation|testing|inference)",
    "options": "(bn|ln|gn|in|norm)?(params?|config|options)",
    "channels": "(num|n|in)?(features|channels|planes)|c|dim|d|nc",
    "shape": "(normalized|input|norm)?shape",
    "size": "size|hw",
    "dims": "(num|n)?dims",
    "device": "device|dev",
    "dy": "dy|dout|gradoutput|gradout|gout|upstream|grad|dldy|dldout",
    "cache": "cache|saved|memory|ctx|stored",
}
_LEARNED = ("x", "scale", "shift")  # what gradients are taken of
VECTORS = ("scale", "shift", "mean", "var")
_ORDER = ("x", "groups", *VECTORS)  # of arguments with other names


role_of = roles_by(_ROLES)


class _Options(dict):
    """The dictionary that CS231n's functions take, with what they may ask for."""

    def __missing__(self, key: str) -> float:
        if key == "momentum":
            return 0.9
        raise KeyError(key)


@dataclass(frozen=True)
class Way:
    """How a student's code wants its arguments.

    Args:
        numpy: arrays instead of tensors.
        layout: the shape of vectors; "1C11" is (1, C, 1, 1).
        words: what it is told in training, and in evaluation.
        dtype: of tensors.
        leaves: whether gradients are wanted of x, scale and shift.
    """

    numpy: bool = False
    layout: str = "C"
    words: tuple[object, object] = (True, False)
    dtype: torch.dtype = torch.float32
    leaves: bool = False

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of vectors for x of these sizes."""
        return tuple(1 if axis == "1" else sizes["NCHW".index(axis)] for axis in self.layout)

    def give(self, value: Tensor) -> object:
        """A copy of a tensor of float64, as the student's code wants it."""
        return value.numpy().copy() if self.numpy else value.to(self.dtype, copy=True)


@dataclass
class Called:
    """What one call took and gave: tensors or arrays, of the student's own kind."""

    output: object
    rest: tuple  # of the tuple that was returned
    x: object  # after the call
    after: dict[str, object]  # the running statistics after it
    leaves: dict[str, Tensor]  # x, scale and shift, where gradients are wanted

    @property
    def numbers(self) -> Tensor | None:
        return as_numbers(self.output)


def as_numbers(value: object) -> Tensor | None:
    """Numbers of a tensor, an array or nested lists as float64; None if it is none of these."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else np.array(value, dtype=float)
        return torch.as_tensor(tensor).double().cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        return None


def _differ(value: object, number: Tensor) -> bool:
    return not torch.allclose(as_numbers(value).flatten(), number.float().double().flatten())


def _libraries(functions: list[Callable]) -> set[str]:
    """Which of "numpy", "torch" and "is_grad_enabled" the code of functions names."""
    found = set()
    for function in functions:
        names, codes = set(), [getattr(function, "__code__", None)]
        while codes:
            if isinstance(code := codes.pop(), CodeType):
                names |= {*code.co_names}
                codes += code.co_consts
        used = map(getattr(function, "__globals__", {}).get, names)
        found |= {str(getattr(each, "__name__", "")).split(".")[0] for each in used}
        found |= {"torch"} if "Tensor" in str(getattr(function, "__annotations__", "")) else set()
        found |= names & {"is_grad_enabled", "numpy"}
    return found


def _ways(libraries: set[str], layouts: tuple[str, ...], words: list[tuple]) -> list[Way]:
    """The ways to call code that names these libraries, the most probable first."""
    numpy = {"numpy": [True], "torch": [False]}.get("".join(libraries & {"numpy", "torch"}))
    every = product(numpy or [False, True], words, layouts)
    return [Way(numpy=array, words=word, layout=layout) for array, word, layout in every]


def _apart(channels: int) -> tuple[int, int, int, int]:
    """Sizes (N, C, H, W) that all differ."""
    n, h, w = [size for size in (4, 2, 5, 3) if size != channels][:3]
    return n, channels, h, w


def _roles_of(parameters: Iterable[str], kind: str) -> dict[str, str | None]:
    """The roles of a function's arguments by their names; single letters may mean other things."""
    roles = {name: role_of(name) for name in parameters}
    if "x" not in roles.values():
        return {name: role if len(name) > 1 else None for name, role in roles.items()}
    if kind == "gn" and roles.get("g") == "scale" and "shift" not in roles.values():
        roles["g"] = "groups"
    return roles


class FunctionCode:
    """A student's function: what it takes, and calls of it."""

    def __init__(self, function: Callable, kind: str, groups: int) -> None:
        self.function, self.groups = function, groups
        self.order = _ORDER if kind == "gn" else tuple(role for role in _ORDER if role != "groups")
        every = signature_of(function).parameters.items()
        parameters = {name: each for name, each in every if each.kind not in VARIADIC}
        self.names = _roles_of(parameters, kind)
        self.roles = {*self.names.values()}
        needed = [name for name, each in parameters.items() if each.default is each.empty]
        others = [role for role in self.order if role not in self.roles]
        self.roles |= {*others[: sum(self.names[name] is None for name in needed)]}
        if "options" in self.roles:
            self.roles |= {"mean", "var", "training"}
        named = {self.names[name]: each.default for name, each in parameters.items()}
        momentum = named.get("momentum")
        self.rates = {min(momentum, 1 - momentum)} if isinstance(momentum, float) else None
        if momentum is inspect.Parameter.empty:  # old or new may be what it multiplies
            self.rates = {0.1, 0.9}
        self.if_needed = ("momentum",) if kind == "gn" else ("momentum", "groups")
        self.libraries = _libraries([inspect.unwrap(function)])
        words = [(True, False), ("train", "test"), ("train", "eval")]
        if isinstance(default := named.get("training", True), bool | str):
            words = words[1:] if isinstance(default, str) else words[:1]
        elif {"mode", "phase"} & {*parameters}:  # every word is true, so it may not be found out
            words = [*words[1:], words[0]]
        layouts = ("CHW",) if kind == "ln-elementwise" else ("C", "1C11", "C11", "CHW")
        self.ways = _ways(self.libraries, layouts, words)

    @property
    def evaluates(self) -> bool:
        """Whether it can be told that it is in evaluation."""
        return bool({"training", "evaluation", "is_grad_enabled"} & (self.roles | self.libraries))

    def prepare(self, sizes: tuple[int, ...] | None, way: Way) -> tuple[tuple, dict[str, tuple]]:
        """The sizes of x, those wanted or others, and the shapes of the vectors it takes."""
        sizes = sizes or _apart(3 * self.groups)
        return sizes, {role: way.shape(sizes) for role in VECTORS if role in self.roles}

    def call(self, x: Tensor, vectors: dict[str, Tensor], way: Way, training: bool) -> Called:
        """Calls it with x and the vectors, both of float64."""
        given = {role: way.give(value) for role, value in {"x": x, **vectors}.items()}
        leaves = {}
        if way.leaves:
            leaves = {role: given[role].requires_grad_() for role in given if role in _LEARNED}
            given.update({role: leaf.clone() for role, leaf in leaves.items()})
        running = {f"running_{role}": given[role] for role in ("mean", "var") if role in given}
        mode = "train" if training else "test"
        options = _Options(mode=mode, eps=EPSILON, **running)
        values = {
            **{"eps": EPSILON, "momentum": 0.1, "groups": self.groups, "options": options},
            **{"training": way.words[not training], "evaluation": not training, "dims": 4},
            "device": "cpu",
            **{"channels": x.shape[1], "shape": tuple(x.shape[1:]), "size": tuple(x.shape[2:])},
            **given,
        }
        arguments = bound(
            self.function, values, self.names.get, self.order, if_needed=self.if_needed
        )
        with torch.set_grad_enabled(training):
            result = attempt(self.function, *arguments.args, **arguments.kwargs)
        output, *rest = result if isinstance(result, tuple) else (result,)
        numbers = [(each, as_numbers(each)) for each in rest]
        returned = [e for e, value in numbers if value is not None and value.numel() == x.shape[1]]
        after = {}
        for place, role in enumerate(("mean", "var")):
            if role in given:
                after[role] = options[f"running_{role}"]
                if place < len(returned) and not _differ(after[role], vectors[role]):
                    after[role] = returned[place]
        return Called(output, tuple(rest), given["x"], after, leaves)


class ObjectCode:
    """A student's module, or an object that is called, or a class of these; and calls of it."""

    def __init__(self, made: object, kind: str, groups: int | None) -> None:
        self.made, self.is_class = made, inspect.isclass(made)
        kind_of = made if self.is_class else type(made)
        self.groups = groups or (not self.is_class and _settings(made).get("groups")) or 2
        self.libraries = _libraries([f for f in vars(kind_of).values() if inspect.isfunction(f)])
        self.libraries |= {"torch"} if issubclass(kind_of, nn.Module) else set()
        layouts = ("CHW",) if kind == "ln-elementwise" else ("C", "C11", "CHW")
        self.ways = _ways(self.libraries, layouts if self.is_class else ("C",), [(True, False)])
        self.order = ("groups", "channels") if kind == "gn" else ("channels", "groups")
        self.roles: set[str] = set()
        self.rates: set[float] | None = None
        self.evaluates = True

    def _make(self, sizes: tuple[int, ...], way: Way) -> object:
        """The object, or one of the class for x of these sizes."""
        if not self.is_class:
            return copied(self.made) if isinstance(self.made, nn.Module) else deepcopy(self.made)
        values = {  # "features" is x in a call, but the number of channels here
            **{"channels": sizes[1], "x": sizes[1], "groups": self.groups, "size": sizes[2:]},
            **{"eps": EPSILON, "momentum": 0.1, "dims": 4},
            "device": "cpu",
            "shape": sizes[1] if way.layout == "C" else way.shape(sizes),
        }
        arguments = bound(self.made, values, role_of, self.order, if_needed=("momentum",))
        return attempt(self.made, *arguments.args, **arguments.kwargs)

    def prepare(self, sizes: tuple[int, ...] | None, way: Way) -> tuple[tuple, dict[str, tuple]]:
        """The sizes of x, those wanted or such as fit, and the shapes of the vectors it has."""
        wanted = sizes or _apart(3 * self.groups)
        made = self._make(wanted, way)
        shapes = {role: tuple(value.shape) for role, value in _vectors(made, _places(made)).items()}
        self.roles = {*shapes}
        momentum = _settings(made).get("momentum", ...)
        self.rates = {min(momentum, 1 - momentum)} if isinstance(momentum, float) else None
        self.rates = {1.0} if momentum is None else self.rates  # the first of a mean of all
        if not self.is_class and shapes:
            longest = max(shapes.values(), key=math.prod)
            sides = [side for side in longest if side > 1]
            whole = len(sides) == 3 and len(longest) < 5
            fitting = (wanted[0], *sides) if whole else _apart(math.prod(longest))
            if sizes is None or whole:
                wanted = fitting
        return wanted, shapes

    def call(self, x: Tensor, vectors: dict[str, Tensor], way: Way, training: bool) -> Called:
        """Calls a copy of it that has the vectors; they and x are of float64."""
        made = self._make(tuple(x.shape), way)
        if isinstance(made, nn.Module):
            made.to(way.dtype).train(training)
        else:
            for name in vars(made):
                if role_of(name) in ("training", "evaluation"):
                    setattr(made, name, training == (role_of(name) == "training"))
        given = way.give(x)
        places = _places(made)
        own = _vectors(made, places)
        for role, value in vectors.items():
            _fill(own[role], value)
        leaves = {}
        if way.leaves:
            learned = {role: own[role] for role in _LEARNED if isinstance(own.get(role), Tensor)}
            plain = isinstance(made, nn.Module)
            leaves = {"x": given.requires_grad_()} | {
                role: value if isinstance(value, nn.Parameter) or plain else value.requires_grad_()
                for role, value in learned.items()
            }
            given = given.clone()
        arguments = bound(_method(made), {"x": given, "training": training}, role_of, ("x",))
        with torch.set_grad_enabled(training):
            result = attempt(made if callable(made) else made.forward, *arguments.args)
        output, *rest = result if isinstance(result, tuple) else (result,)
        now = _vectors(made, places)
        after = {role: each for role, each in now.items() if role in ("mean", "var")}
        return Called(output, tuple(rest), given, after, leaves)


def _method(made: object) -> Callable:
    """What is called: `forward` of modules, so that its arguments are known."""
    found = getattr(made, "forward", made)
    if not callable(found):
        raise Failed(f"a {type(made).__name__} cannot be called")
    return found


def _layers(made: object) -> list[object]:
    return [*made.modules()] if isinstance(made, nn.Module) else [made]


def _settings(made: object) -> dict[str, object]:
    """Numbers that an object or its layers keep, by role: groups and momentum."""
    kept = {}
    for layer in _layers(made):
        for name, value in getattr(layer, "__dict__", {}).items():
            if isinstance(value, int | float | None):
                kept.setdefault(role_of(name), value)
    return kept


def _places(made: object) -> dict[str, tuple[int, str]]:
    """Where an object keeps scale, shift and running statistics: the layer and the attribute.

    They are found by their names, else by their first values.
    """
    found, unknown = {}, {}
    for number, layer in enumerate(_layers(made)):
        module = isinstance(layer, nn.Module)
        kept = {**layer._parameters, **layer._buffers} if module else {}
        for name, value in {**kept, **getattr(layer, "__dict__", {})}.items():
            if is_lazy(value):
                raise Failed(
                    "a lazy layer has no parameters yet: call it once before it is checked"
                )
            if isinstance(value, Tensor | np.ndarray) and value.ndim:
                if (role := role_of(name)) in VECTORS:
                    found.setdefault(role, (number, name))
                elif module and name in kept:
                    pair = ("shift", "scale") if name in layer._parameters else ("mean", "var")
                    ends = [bool((value == end).all()) for end in (0, 1)]
                    unknown |= {
                        role: (number, name) for role, end in zip(pair, ends, strict=True) if end
                    }
    found = unknown | found
    return {role: found[role] for role in VECTORS if role in found}


def _vectors(made: object, places: dict[str, tuple[int, str]]) -> dict[str, object]:
    layers = _layers(made)
    return {role: getattr(layers[number], name) for role, (number, name) in places.items()}


def _fill(target: object, value: Tensor) -> None:
    if isinstance(target, Tensor):
        target.data.copy_(value.reshape(target.shape))
    else:
        target[...] = value.reshape(target.shape).numpy()


def student_code(candidate: object, kind: str, groups: int | None) -> FunctionCode | ObjectCode:
    """A function, class or object as a student wrote it, to be called."""
    if inspect.isclass(candidate) and issubclass(candidate, torch.autograd.Function):
        apply, forward = candidate.apply, candidate.forward
        parameters = [*inspect.signature(forward).parameters.values()][1:]  # without ctx
        candidate = lambda *arguments: apply(*arguments)  # noqa: E731
        candidate.__signature__ = inspect.Signature(parameters)
        candidate.__wrapped__ = forward
    if inspect.isclass(candidate) or isinstance(candidate, nn.Module):
        return ObjectCode(candidate, kind, groups)
    if not callable(candidate) and not hasattr(candidate, "forward"):
        raise TypeError(f"a function, a class or a module is checked, not {candidate!r:.60}")
    by_code = (FunctionType, BuiltinFunctionType, MethodType, partial)
    if isinstance(candidate, by_code) or hasattr(candidate, "__wrapped__"):
        return FunctionCode(candidate, kind, groups or 2)
    return ObjectCode(candidate, kind, groups)
