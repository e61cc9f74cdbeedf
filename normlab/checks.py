"""Checks of what a user passes in: a failure is one sentence with the value and the way out."""

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable


def nearest(value: object, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the allowed name that resembles `value` most, or nothing."""
    found = difflib.get_close_matches(str(value).lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def warn(message: str) -> None:
    """Warns, pointing at the line outside normlab from which the call came."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "normlab":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def instance(value: object, kind: type, what: str, hint: str) -> None:
    """Raises `TypeError` unless `value` is of the class `kind`; `hint` says how to get one."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be a {kind.__name__}, not {value!r:.60}: {hint}")


def one_of(value: object, allowed: Iterable[str], what: str) -> str:
    """Returns `value` if it is among the `allowed` names; `what` says what is being named."""
    allowed = list(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(
        f"unknown {what} {value!r}: it must be one of {', '.join(allowed)}{nearest(value, allowed)}"
    )


def whole_number(value: object, what: str, *, least: int = 1) -> int:
    """Returns `value` if it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{what} must be at least {least}, not {value}")
    return int(value)


def number(
    value: object,
    what: str,
    *,
    least: float = 0.0,
    below: float = math.inf,
    positive: bool = False,
) -> float:
    """Returns `value` as a float if it is finite and in [least, below), above 0 if `positive`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value}")
    if positive and value <= 0:
        raise ValueError(f"{what} must be greater than 0, not {value}")
    if value < least:
        raise ValueError(f"{what} must be at least {least:g}, not {value}")
    if value >= below:
        raise ValueError(f"{what} must be below {below:g}, not {value}")
    return float(value)
