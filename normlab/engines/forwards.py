"""Layers that for a while compute something else, without being other layers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def replaced_forward(
    layers: Iterable[nn.Module], forward: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block each of the layers gives `forward(layer, x)`; afterwards its own again.

    Their weights, names and hooks stay as they are, so nothing that is stored changes.
    """
    layers = list(layers)
    for layer in layers:
        layer.forward = functools.partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
