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
    between = ("normlab", "torch", "contextlib")  # decorators such as `torch.no_grad` lie between
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in between:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_instance(value: object, kind: type, what: str, hint: str) -> None:
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


def plain(value: object) -> object:
    """Numbers of numpy and torch as Python's own, their arrays and a Series as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_list(values: object) -> list:
    """The values as a list of plain ones, whatever holds them; a single one or a name, too."""
    values = plain(values)
    alone = isinstance(values, str) or not isinstance(values, Iterable)
    return [values] if alone else [plain(value) for value in values]


def sizes(value: object, axes: str, what: str) -> tuple[int, ...]:
    """Returns a whole number for each of the axes, such as "C, H, W"."""
    value = plain(value)
    if not isinstance(value, tuple | list) or len(value) != len(axes.split(",")):
        raise ValueError(f"{what} must be ({axes}), not {value!r}")
    return tuple(whole_number(side, f"each number of {what}") for side in value)


def image_shape(shape: object) -> tuple[int, int, int]:
    """Returns (C, H, W) if `shape`, called input_shape, is three whole numbers."""
    return sizes(shape, "C, H, W", "input_shape")


def whole_number(value: object, what: str, *, least: int = 1) -> int:
    """Returns `value`, an integer of Python, numpy or torch, if it is at least `least`."""
    value = plain(value)
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
    value = plain(value)
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


def divisors(number: int) -> list[int]:
    """The numbers of groups that `number` channels can be split into."""
    return [count for count in range(1, number + 1) if number % count == 0]


def check_groups(groups: int | None, channels: int, name: str = "gn") -> None:
    """Raises `ValueError` unless `groups` divides `channels`."""
    if groups is None:
        raise ValueError(f"{name} needs groups=…, the number of groups to split the channels into")
    whole_number(groups, "groups")
    if channels % groups:
        allowed = ", ".join(map(str, divisors(channels)))
        raise ValueError(
            f"groups={groups} does not divide {channels} channels: it must be one of {allowed}"
        )


def height_and_width(size: object, name: str) -> tuple[int, int]:
    """Returns (H, W) if `size` is two whole numbers; `name` is the norm that needs them."""
    if size is None:
        raise ValueError(f"{name} learns numbers for every pixel, so it needs size=(H, W)")
    return sizes(size, "H, W", "size")
