"""A student's normalization, function, class or object, called in the way that it wants."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.lessons.checking import Failed, as_numbers, call, role_of, roles_of
from normlab.norms import EPSILON
from normlab.support.module_state import copied

LEARNED, STATISTICS = ("scale", "shift"), ("mean", "var")
VECTORS = LEARNED + STATISTICS
_ROLES = ("x", *VECTORS, "groups", "eps", "momentum", "training", "evaluation", "options")
_ROLES += ("channels", "shape", "size", "dims", "device")
_ALWAYS = {"eps": EPSILON, "momentum": 0.1, "dims": 4, "device": "cpu"}
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
_WORDS = {True: ("train",), False: ("test", "eval", "evaluation", "inference")}  # for the mode


@dataclass(frozen=True)
class Way:
    """How a student's code wants its arguments.

    Args:
        arrays: of numpy, instead of tensors.
        gradients: whether tensors require gradients; numpy inside does not allow it.
        layout: the shape of vectors; "1C11" is (1, C, 1, 1).
        dtype: of tensors.
    """

    arrays: bool = False
    gradients: bool = True
    layout: str = "C"
    dtype: torch.dtype = torch.float32

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of vectors for x of these sizes."""
        return tuple(1 if axis == "1" else sizes["NCHW".index(axis)] for axis in self.layout)

    def give(self, value: Tensor, *, leaf: bool = False) -> object:
        """A copy of a tensor of float64, as the student's code wants it."""
        if self.arrays:
            return value.numpy().copy()
        return value.to(self.dtype, copy=True).requires_grad_(leaf and self.gradients)


@dataclass
class Called:
    """One call: what was given, in float64, and what came of it."""

    way: Way
    x: Tensor
    vectors: dict[str, Tensor]
    leaves: dict[str, object]  # x, scale and shift as given, of which gradients are taken
    given: object  # x after the call
    returned: tuple
    after: dict[str, object]  # the running statistics after it
    momentum: object  # `...` if it is not known

    def __post_init__(self) -> None:
        """Raises `Failed` unless the output is of the shape of x."""
        self.output, self.sizes = self.returned[0], tuple(self.x.shape)
        if self.output is None:
            raise Failed("nothing is returned: is `return` missing?")
        numbers = as_numbers(self.output)
        if numbers is None or numbers.shape != self.x.shape:
            shape = "no numbers" if numbers is None else tuple(numbers.shape)
            raise Failed(f"the output is {shape}, where x is of shape {self.sizes}")
        self.numbers = numbers.nan_to_num(0, 0, 0)


class StudentNorm:
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
        self.groups = groups or 2
        layouts = ("CHW",) if kind == "ln-elementwise" else ("C", "1C11", "C11", "CHW")
        if self.is_function:
            self.names = _names_in([made])
            self._read(kind)
        elif self.is_class:
            self.names = _names_in(vars(made).values())
            order = ("groups", "channels") if kind == "gn" else ("channels", "groups")
            self.roles = roles_of(made, (order[0], *_ROLES), order)
        else:
            self.names, layouts = _names_in(vars(type(made)).values()), ("C",)
            self.groups = groups or _setting(made, "groups", 2)
        numpy, in_torch = bool(self.names & {"np", "numpy"}), "torch" in self.names
        self.certain = numpy or in_torch or isinstance(made, nn.Module)  # arrays, or tensors
        tensors, arrays = [{}], [{"arrays": True, "gradients": False}]
        tensors += [{"gradients": False}] * numpy
        kinds = arrays + tensors if numpy and not in_torch else tensors + arrays
        self.ways = [Way(**each, layout=layout) for each in kinds for layout in layouts]

    def _read(self, kind: str) -> None:
        """What a function takes, by the names of its arguments and of what its code uses."""
        order = ("x", *["groups"] * (kind == "gn"), *VECTORS)
        self.roles = roles_of(self.made, _ROLES, order)
        if kind == "gn" and "shift" not in self.roles.values():  # then g is the number of groups
            self.roles = roles_of(self.made, ("groups", *_ROLES), order)
        self.takes = {*self.roles.values()}
        if "options" in self.takes:
            self.takes |= {*STATISTICS, "training"}
        self.default = "momentum" if kind == "gn" else "momentum groups"

    @property
    def evaluates(self) -> bool:
        """Whether it can be told, or can see, that it does not train."""
        told = not self.is_function or {"training", "evaluation"} & self.takes
        return bool(told or "is_grad_enabled" in self.names)

    def prepare(self, sizes: tuple[int, ...] | None, way: Way) -> tuple[tuple, dict[str, tuple]]:
        """The sizes of x, those wanted or such as fit, and the shapes of the vectors."""
        wanted = sizes or _apart(3 * self.groups)
        if self.is_function:
            return wanted, {role: way.shape(wanted) for role in VECTORS if role in self.takes}
        places = _places(self._object(wanted, way))
        shapes = {role: tuple(getattr(*place).shape) for role, place in places.items()}
        if shapes and not self.is_class:
            longest = max(shapes.values(), key=math.prod)
            sides = [side for side in longest if side > 1]
            if len(sides) == 3 and len(longest) < 5:  # (C, H, W)
                return (wanted[0], *sides), shapes
            wanted = sizes or _apart(math.prod(longest))
        return wanted, shapes

    def call(self, x: Tensor, vectors: dict[str, Tensor], way: Way, *, training: bool) -> Called:
        """Calls it with x, where it has these vectors; they and x are of float64."""
        run = self._call_function if self.is_function else self._call_object
        with torch.set_grad_enabled(training):
            return Called(way, x, vectors, *run(x, vectors, way, training))

    def _call_function(self, x: Tensor, vectors: dict, way: Way, training: bool) -> tuple:
        learned = {role: vectors[role] for role in LEARNED if role in vectors}
        leaves = {role: way.give(each, leaf=True) for role, each in {"x": x, **learned}.items()}
        # A function may change what it is given.
        given = {role: each.clone() if way.gradients else each for role, each in leaves.items()}
        running = {role: way.give(vectors[role]) for role in STATISTICS if role in vectors}
        word = self._word(training)
        options = defaultdict(lambda: 0.9, mode=word, eps=EPSILON)  # as CS231n's
        options |= {f"running_{role}": each for role, each in running.items()}
        values = {**_ALWAYS, **given, **running, "options": options, "groups": self.groups}
        values |= {"training": word, "evaluation": not training, "channels": x.shape[1]}
        values |= {"shape": tuple(x.shape[1:]), "size": tuple(x.shape[2:])}
        returned = _tuple(call(self.made, values, self.roles, self.default))
        # Running statistics may be changed in place, in the options, or returned.
        after = {role: options[f"running_{role}"] for role in running}
        sizes = [(each, as_numbers(each)) for each in returned[1:]]
        later = [each for each, now in sizes if now is not None and now.numel() == x.shape[1]]
        for role, each in zip(running, later, strict=False):
            now = as_numbers(after[role])
            if now is not None and torch.equal(now, vectors[role]):
                after[role] = each
        momentum = {role: each.default for each, role in self.roles.items()}.get("momentum", ...)
        return leaves, given["x"], returned, after, momentum

    def _word(self, training: bool) -> object:
        """How a function is told whether it trains: by a word, if it compares with words."""
        known = self.names & {*_WORDS[True], *_WORDS[False]}
        named = {each.name for each in self.roles} & {"mode", "phase"}
        if "options" in self.takes or (named and known):
            return next((each for each in _WORDS[training] if each in known), _WORDS[training][0])
        return training

    def _object(self, sizes: tuple[int, ...], way: Way) -> object:
        """An object of its own, for x of these sizes."""
        if not self.is_class:
            return copied(self.made) if isinstance(self.made, nn.Module) else deepcopy(self.made)
        shape = sizes[1] if way.layout == "C" else way.shape(sizes)
        values = {**_ALWAYS, "channels": sizes[1], "groups": self.groups, "size": sizes[2:]}
        values |= {"shape": shape, "x": sizes[1]}  # "features" is x in a call, but C here
        return call(self.made, values, self.roles, "momentum")

    def _call_object(self, x: Tensor, vectors: dict, way: Way, training: bool) -> tuple:
        made = self._object(tuple(x.shape), way)
        if isinstance(made, nn.Module):
            made.to(way.dtype).train(training)
        else:
            for name in vars(made):
                if role := role_of(name, ("training", "evaluation")):
                    setattr(made, name, training == (role == "training"))
        places = _places(made)
        for role, value in vectors.items():
            _fill(getattr(*places[role]), value)
        leaves = {role: getattr(*places[role]) for role in LEARNED if role in places}
        for leaf in leaves.values():
            if way.gradients and isinstance(leaf, Tensor) and not isinstance(made, nn.Module):
                leaf.requires_grad_()
        leaves["x"] = way.give(x, leaf=True)
        given = leaves["x"].clone() if way.gradients else leaves["x"]
        method = made if callable(made) else made.forward
        values = {"x": given, "training": training}
        returned = _tuple(call(method, values, roles_of(method, values, ("x",))))
        after = {role: getattr(*place) for role, place in places.items() if role in STATISTICS}
        return leaves, given, returned, after, _setting(made, "momentum", ...)


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
    """All names, and all words in quotes, that the code of functions uses: "torch", "train"."""
    left = [getattr(inspect.unwrap(f), "__code__", None) for f in functions if callable(f)]
    names = set()
    while left:
        each = left.pop()
        if isinstance(each, CodeType):
            left += [*each.co_names, *each.co_consts]
        elif isinstance(each, tuple | frozenset):
            left += each
        elif isinstance(each, str):
            names.add(each)
    return names


def _tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) and value else (value,)


def _apart(channels: int) -> tuple[int, int, int, int]:
    """Sizes (N, C, H, W) that all differ."""
    n, h, w = [size for size in (4, 2, 5, 3) if size != channels][:3]
    return n, channels, h, w


def _kept(made: object) -> Iterator[tuple[object, str, object]]:
    """The layer, the name and the value of everything that an object or its layers keep."""
    for layer in made.modules() if isinstance(made, nn.Module) else [made]:
        parts = (layer._parameters, layer._buffers) if isinstance(layer, nn.Module) else ()
        for kept in (*parts, getattr(layer, "__dict__", {})):
            for name, value in kept.items():
                yield layer, name, value


def _setting(made: object, role: str, default: object) -> object:
    """What an object or one of its layers keeps in this role, beside tensors."""
    for _, name, value in _kept(made):
        if role_of(name, (role,)) and not isinstance(value, Tensor | np.ndarray):
            return value
    return default


def _places(made: object) -> dict[str, tuple[object, str]]:
    """Where an object keeps scale, shift and running statistics: the layer and the attribute.

    They are found by their names, else by their first values.
    """
    found, unknown = {}, {}
    for layer, name, value in _kept(made):
        if is_lazy(value):
            raise Failed("a lazy layer has no parameters yet: call it once before the check")
        if not isinstance(value, Tensor | np.ndarray) or not value.ndim:
            continue
        if role := role_of(name, VECTORS):
            found.setdefault(role, (layer, name))
        elif isinstance(layer, nn.Module) and name not in vars(layer):
            zeros, ones = ("shift", "scale") if name in layer._parameters else ("mean", "var")
            for role, end in ((zeros, 0), (ones, 1)):
                unknown |= {role: (layer, name)} if bool((value == end).all()) else {}
    found = unknown | found
    return {role: found[role] for role in VECTORS if role in found}


def _fill(target: object, value: Tensor) -> None:
    if isinstance(target, Tensor):
        target.data.copy_(value.reshape(target.shape))
    else:
        target[...] = value.reshape(target.shape).numpy()
