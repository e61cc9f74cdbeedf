"""What the checks of a student's code share: calls that end, mistakes as data, a result."""

import inspect
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normlab.lessons.sentences import RULES, SENTENCES

SECONDS = 8  # the longest that a check takes
Mistakes = dict[str, str]  # their names with sentences that explain them


# --- what is found ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What a check found: true where all is right, and printed as a list of what is not.

    Args:
        title: what was checked.
        parts: everything that was looked at, such as "gradients", with its mistakes.
    """

    title: str
    parts: dict[str, Mistakes]

    def __bool__(self) -> bool:
        return not self.mistakes

    @property
    def mistakes(self) -> Mistakes:
        """The names of all mistakes, with the sentences that explain them."""
        return {name: text for part in self.parts.values() for name, text in part.items()}

    @property
    def fraction(self) -> float:
        """The share of the parts that are right, from 0 to 1."""
        return sum(not part for part in self.parts.values()) / len(self.parts)

    def __str__(self) -> str:
        right = sum(not part for part in self.parts.values())
        lines = [f"{self.title}: {right} of {len(self.parts)} parts are right"]
        unsaid = self.mistakes
        for part, mistakes in self.parts.items():
            lines.append(f"  {'✗' if mistakes else '✓'} {part}")
            new = [name for name in mistakes if name in unsaid]
            lines += [f"      {name} – {unsaid.pop(name)}" for name in new]
        return "\n".join(lines)

    __repr__ = __str__


# --- mistakes as data ---------------------------------------------------------------------------


class Choice(NamedTuple):
    """What stands in one place of a computation: what is right has no name, a mistake has one."""

    name: str
    value: object
    sentence: str = ""


Places = dict[str, list[Choice]]  # the first of each place is right


def places(**choices: dict[str, object]) -> Places:
    """For each place what is right, which is called "", and then the mistakes by their names."""
    found: Places = {}
    for place, rows in choices.items():
        texts = {name: SENTENCES.get(name) or RULES.get(place, "") for name in rows}
        found[place] = [Choice(name, value, texts[name]) for name, value in rows.items()]
    return found


def explanations(
    places: Places, most: int = 2, fewest: int = 0, right: dict[str, object] | None = None
) -> Iterator[tuple[dict[str, object], dict[str, Choice]]]:
    """What may stand in all places: first all right, then with one mistake, with two …

    Args:
        right: where it is not the first of each place.

    Each comes with its mistakes, by their places.
    """
    right = right or {place: each[0].value for place, each in places.items()}
    for number in range(fewest, most + 1):
        for changed in combinations(places, number):
            for some in product(*(places[place][1:] for place in changed)):
                wrong = dict(zip(changed, some, strict=True))
                yield right | {place: each.value for place, each in wrong.items()}, wrong


def said(*names: str, when: bool = True) -> Mistakes:
    """These mistakes with their sentences, if it is so; else none."""
    return {name: f"{SENTENCES[name]}." for name in names} if when else {}


# --- calls that end -----------------------------------------------------------------------------


class Failed(Exception):
    """A student's code raised something: a sentence that says what, and in which line."""


class TooLong(BaseException):
    """Time is over; no `except Exception` of a student's stops it."""


def checked(title: str, parts: Iterable[tuple[str, Mistakes]]) -> Checked:
    """Collects parts with their mistakes, until time is over or a student's code raises something.

    Only the main thread can be ended when time is over.
    """

    def end(*_: object) -> None:
        raise TooLong

    _import_what_torch_needs()
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    found = {}
    try:
        if timed:
            former = signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)  # again, should `except:` have it
        found.update(parts)  # one after the other: those before an error are kept
    except TooLong as error:
        text = f"this took more than {SECONDS} seconds and was ended{_where(error)}"
        found["time"] = {"too slow": text}
    except Failed as error:
        found["runs without an error"] = {"error": str(error)}
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
    return Checked(title, found)


@cache
def _import_what_torch_needs() -> None:
    """Has torch import what it does at the first gradient that is given one, and optimiser.

    The seconds would count as the student's, and an import that is ended half-way stays so.
    """
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(x * x, x, torch.ones(2))
    torch.optim.SGD([x], lr=1.0).zero_grad()


def attempt(function: Callable, *arguments: object, **named: object) -> object:
    """What the function returns; what it raises becomes `Failed`."""
    try:
        return function(*arguments, **named)
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        raise Failed(f"{text[:300]}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The last line of the student's own code that an error went through."""
    libraries = (str(Path(inspect.__file__).parent), str(Path(__file__).parents[1]), "<frozen")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries) and "-packages" not in frame.filename
    ]
    if not frames:
        return ""
    line = f": {frames[-1].line}" if frames[-1].line else ""
    return f" (in line {frames[-1].lineno} of {frames[-1].name}{line})"


# --- arguments by their names -------------------------------------------------------------------

# What arguments, attributes and keys are usually called, without _ and digits. A name may have
# several roles, of which a check knows some.
_USUAL = {
    "network": "model|net|network|module|m",
    "parameters": "params?|parameters|weights|ws?",
    "named": "namedparam(eter)?s",
    "batches": "(train(ing)?|test(ing)?|valid|val|data|eval)?(loader|dataloader|dl|iter|set)"
    "|(train|test|val)?(data|batches)|(data|train|test)(loader|iter)|iterator",
    "optimizer": "optimi[sz]er|opt|optim|updater|sgd",
    "loss": "(data)?loss|criterion|loss(fn|func|function)|objective|cost(fn|function)?"
    "|crossentropy|celoss",
    "device": "device|dev",
    "epoch": "(num|n)?epochs?|e",
    "scheduler": "(lr)?sched(uler)?",
    "rate": "lr|learningrate|rate",
    "factor": "l|l?lambda?l?|lambd|lmbda|lmbd|l?factor|strength|alpha|coeff?(icient)?|λ"
    "|reg(ularization)?|weightdecay|penalty",
    "count": "count|n|k|num|number|numimages|nimages",
    "classes": "classes|classnames|labelnames|names",
    "images": "images?|imgs?|x|data|pictures?|inputs?",
    "true": "true|truth|labels?|targets?|y|ytrue|actual|true(labels?|class(es)?)|groundtruth|gt",
    "predicted": "y?pred|preds|predict(ed|ions?)|pred(icted)?(labels?|class(es)?)|guess(es)?"
    "|outputs?|yhat",
    "x": "x|xs|z|h|inputs?|images?|batch|data|tensor|features?|inp|activations?",
    "scale": "weights?|gammas?|scales?|g|w|gain|γ",
    "shift": "bias|betas?|shifts?|offset|b|β",
    "groups": "(n|num)?(of)?groups?|G|g",
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
    "dy": "dy|dout|gradoutput|gradout|gout|upstream|grad|dldy|dldout",
    "cache": "cache|saved|memory|ctx|stored",
}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def role_of(name: str, roles: Iterable[str]) -> str | None:
    """The first of these roles that arguments of this name usually have; None if it has none."""
    return next((role for role in roles if role in _all_roles_of(name)), None)


@cache
def _all_roles_of(name: str) -> set[str]:
    plain = re.sub("[_0-9]", "", name if name == "G" else name.lower())
    return {role for role, usual in _USUAL.items() if re.fullmatch(usual, plain)}


def roles_of(
    function: Callable, known: Iterable[str], order: tuple[str, ...]
) -> dict[inspect.Parameter, str | None]:
    """The role of each argument: by its usual name, else by its place if it has no default.

    Args:
        function: a function, a class, or a module, of which `forward` counts.
        known: the roles that there are.
        order: the roles of arguments with other names, in this order.

    Raises `TypeError` for some functions that are built in.
    """
    every = _signature(function).parameters.values()
    roles = {each: role_of(each.name, known) for each in every if each.kind not in _VARIADIC}
    if order[0] == "x" and "x" not in roles.values():  # then single letters may mean anything
        roles = {each: role if len(each.name) > 1 else None for each, role in roles.items()}
    left = iter([role for role in order if role not in roles.values()])
    needed = [each for each in roles if each.default is each.empty]
    return roles | {each: roles[each] or next(left, None) for each in needed}


def _signature(function: Callable) -> inspect.Signature:
    if not inspect.isclass(function):
        function = getattr(function, "forward", function)
    try:
        return inspect.signature(function)
    except ValueError:
        text = f"{function!r} does not tell its arguments: wrap it in a function"
        raise TypeError(text) from None


def call(function: Callable, values: dict[str, object], roles: dict, default: str = "") -> object:
    """What a function, class or module returns for the values of its arguments' roles.

    Args:
        roles: as `roles_of` finds them.
        default: roles left at the default of an argument that has one, as in "rate loss".

    Raises `Failed` for an argument without a value, and for what the function raises.
    """
    given = inspect.BoundArguments(_signature(function), {})
    for each, role in roles.items():
        needed = each.default is each.empty
        if role in values and (needed or role not in default.split()):
            given.arguments[each.name] = values[role]
        elif needed:
            raise Failed(f"the check knows no value for the argument {each.name!r}: rename it")
    function = function if callable(function) else function.forward
    return attempt(function, *given.args, **given.kwargs)


def as_numbers(value: object) -> Tensor | None:
    """Numbers of a tensor, an array or nested lists as float64; None if it is none of these."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else np.array(value, dtype=float)
        return torch.as_tensor(tensor).double().cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        return None
