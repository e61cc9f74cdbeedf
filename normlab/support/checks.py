"""Checks of what a user passes in: a failure is one sentence with the value and the way out."""

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.support.module_state import copied


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


def image_shape(shape: object) -> tuple[int, int, int]:
    """Returns (C, H, W) if `shape`, called input_shape, is three whole numbers."""
    shape = plain(shape)
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise ValueError(f"input_shape must be (C, H, W), not {shape!r}")
    return tuple(whole_number(side, "each number of input_shape") for side in shape)


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


def check_weights(network: nn.Module) -> None:
    """Raises `ValueError` for a lazy layer, which makes its weights when it first sees images."""
    for name, layer in network.named_modules():
        if any(map(is_lazy, (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) of {type(network).__name__} has no "
                "weights yet: call the network once on images of the right shape, as in "
                "network(torch.zeros(2, 1, 28, 28)), where it is built"
            )


def images_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch, if it consists of these two: (B, …) and int64 (B,)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise ValueError(
            f"a batch must be (images, labels), not a {type(batch).__name__}{size}: pick these two"
        )
    images, labels = batch
    for each in batch:
        check_instance(each, Tensor, "images and labels of a batch", "torch.as_tensor(…) makes one")
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise ValueError(
            f"the labels of a batch of {len(images)} images must be int64 of shape "
            f"({len(images)},), the numbers of their classes, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    return images, labels


def check_logits(
    network: nn.Module, images: Tensor, logits: object, classes: int | None = None
) -> None:
    """Raises an error of one sentence unless the network made logits (B, classes) of its images."""
    name, count = type(network).__name__, len(images)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must return a tensor of logits, not a {type(logits).__name__}")
    if logits.dim() == 2 and len(logits) == count and classes in (None, logits.shape[1]):
        return
    wanted = "(B, classes)" if classes is None else f"(B, {classes}) for {classes} classes"
    cut = logits.dim() == 2 and len(logits) != count
    raise ValueError(
        f"{name} must return logits of shape {wanted}, not {tuple(logits.shape)} for B = {count}"
        + (_where_cut(network, images, len(logits)) if cut else "")
    )


def _where_cut(network: nn.Module, images: Tensor, rows: int) -> str:
    """The last layer that leaves a row for each image, where the network returns other `rows`."""
    twin, calls = copied(network).eval(), []
    for name, layer in twin.named_modules():
        if next(layer.children(), None) is None:
            layer.register_forward_hook(lambda *call, name=name: calls.append((name, *call)))
    with torch.no_grad():
        twin(images)
    calls = [call for call in calls if getattr(call[-1], "shape", (0,))[0] == len(images)]
    if not calls:
        return ""
    name, layer, _, output = calls[-1]
    return (
        f": layer {name!r} ({type(layer).__name__}) leaves {tuple(output.shape)}, of which a view "
        f"or reshape then makes {rows} rows: it expects another size there, such as 1×1 from the "
        "last pooling; x.flatten(1) keeps images apart"
    )
