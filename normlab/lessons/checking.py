"""What the checks of a student's code share: a result that prints itself, and calls that end."""

import inspect
import re
import signal
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 8  # the longest that a check takes


@dataclass(frozen=True)
class Part:
    """One thing that was looked at.

    Args:
        name: such as "gradients".
        mistakes: the name of each mistake, with a sentence that explains it; none if it is right.
    """

    name: str
    mistakes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """What a check found: true where all is right, and printed as a list of what is not.

    Args:
        title: what was checked.
        parts: what was looked at.
    """

    title: str
    parts: tuple[Part, ...]

    def __bool__(self) -> bool:
        return not self.mistakes

    @property
    def mistakes(self) -> dict[str, str]:
        """The names of all mistakes, with the sentences that explain them."""
        return {name: text for part in self.parts for name, text in part.mistakes.items()}

    @property
    def fraction(self) -> float:
        """The share of the parts that are right, from 0 to 1."""
        return sum(not part.mistakes for part in self.parts) / len(self.parts)

    def __str__(self) -> str:
        right = sum(not part.mistakes for part in self.parts)
        lines = [f"{self.title}: {right} of {len(self.parts)} parts are right"]
        said = set()
        for part in self.parts:
            lines.append(f"  {'✗' if part.mistakes else '✓'} {part.name}")
            lines += [f"      {text}" for name, text in part.mistakes.items() if name not in said]
            said |= part.mistakes.keys()
        return "\n".join(lines)

    __repr__ = __str__


class Failed(Exception):
    """A student's code raised something: a sentence that says what, and in which line."""


class TooLong(BaseException):
    """Time is over; no `except Exception` of a student's stops it."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """After `SECONDS` the block is ended by `TooLong`; only the main thread can be ended so."""

    def end(*_: object) -> None:
        raise TooLong

    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")):
        yield
        return
    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)  # again, should a bare `except` have it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def checked(title: str, parts: Iterator[Part]) -> Checked:
    """Collects the parts as long as there is time, and until a student's code raises something."""
    found = []
    try:
        with _time_limit():
            for part in parts:
                found.append(part)
    except TooLong as error:
        text = f"this took more than {SECONDS} seconds and was ended{_where(error)}"
        found.append(Part("time", {"too slow": text}))
    except Failed as error:
        found.append(Part("runs without an error", {"error": str(error)}))
    return Checked(title, tuple(found))


def attempt(function: Callable, *arguments: object, **named: object) -> object:
    """What the function returns; what it raises becomes `Failed`."""
    try:
        return function(*arguments, **named)
    except (Exception, SystemExit) as error:
        if isinstance(error, Failed):
            raise
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        raise Failed(f"{said[:300]}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The last line of the student's own code that an error went through."""
    libraries = (sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[1]), "<frozen")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries) and "-packages" not in frame.filename
    ]
    if not frames:
        return ""
    line = f": {frames[-1].line}" if frames[-1].line else ""
    return f" (in line {frames[-1].lineno} of {frames[-1].name}{line})"


def roles_by(names: Mapping[str, str]) -> Callable[[str], str | None]:
    """Finds the role of an argument's name by the pattern that a role's usual names have.

    The patterns are of small letters, without _ and digits; "G" alone may also be written large.
    """

    def role_of(name: str) -> str | None:
        plain = re.sub("[_0-9]", "", name if name == "G" else name.lower())
        return next((role for role, usual in names.items() if re.fullmatch(usual, plain)), None)

    return role_of


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def signature_of(function: Callable) -> inspect.Signature:
    """The arguments of a function, of a class's constructor or of a module's `forward`.

    Raises `TypeError` for some that are built in.
    """
    if not inspect.isclass(function):
        function = getattr(function, "forward", function)
    try:
        return inspect.signature(function)
    except ValueError:
        raise TypeError(
            f"{function!r} does not tell its arguments: wrap it in a function"
        ) from None


def bound(
    function: Callable,
    values: Mapping[str, object],
    role_of: Callable[[str], str | None],
    order: tuple[str, ...],
    *,
    if_needed: tuple[str, ...] = (),
) -> inspect.BoundArguments:
    """The values as arguments of a function: by their usual names, the others by their order.

    Args:
        values: by role.
        role_of: the role of an argument's name, None if it is no usual one.
        order: the roles that arguments of other names have, in this order.
        if_needed: roles left at the default of an argument that has one.

    Raises `Failed` for an argument without a value.
    """
    signature = signature_of(function)
    parameters = [p for p in signature.parameters.values() if p.kind not in VARIADIC]
    roles = {p.name: role_of(p.name) for p in parameters}
    left = [role for role in order if role not in roles.values()]
    arguments = {}
    for each in parameters:
        needed = each.default is each.empty
        role = roles[each.name] or (left.pop(0) if needed and left else None)
        if role in values and (needed or role not in if_needed):
            arguments[each.name] = values[role]
        elif needed:
            raise Failed(f"the check knows no value for the argument {each.name!r}: rename it")
    return inspect.BoundArguments(signature, arguments)
