"""What a network holds beside its weights: modes, hooks, and tensors that its layers store."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

TRAINED: WeakSet[nn.Module] = WeakSet()  # networks that were trained in this process


def was_trained(network: nn.Module) -> bool:
    """Whether the network was trained here, or batch normalization has counted batches."""
    counters = (getattr(layer, "num_batches_tracked", None) for layer in network.modules())
    return network in TRAINED or any(bool(count) for count in counters if count is not None)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy; tensors that a forward pass stored in layers are copied without their history.

    torch's own copy refuses such tensors: an activation that is kept for a picture, say, or the
    weight that `torch.nn.utils.weight_norm` computes.
    Raises `TypeError` of one sentence for what Python cannot copy, such as an open file.
    """
    stored = (value for layer in network.modules() for value in _tensors(vars(layer)))
    memo = {id(value): value.detach().clone() for value in stored if not value.is_leaf}
    try:
        return copy.deepcopy(network, memo)
    except TypeError as error:
        raise TypeError(
            f"{type(network).__name__} cannot be copied ({error}): keep what cannot be outside the "
            "network"
        ) from error


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """After the block every layer is in the mode, training or evaluation, it was in before."""
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are; the CPU if it has none."""
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every layer is in the mode it was in before."""
    with modes_kept(network):
        network.eval()
        yield


def set_training(network: nn.Module) -> None:
    """Training mode, but for frozen layers and what lies in them.

    A layer is frozen if it is in evaluation mode and has parameters, none of which is to be
    trained: `layer.eval().requires_grad_(False)`. So its running statistics stay as they are.
    Raises `ValueError` for a single layer in evaluation mode that has running statistics alone.
    """
    frozen = []
    for name, layer in network.named_modules():
        learns = [weight.requires_grad for weight in layer.parameters()]
        asked = network.training and not layer.training and layer not in frozen
        if asked and not learns and getattr(layer, "running_mean", None) is not None:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) is in evaluation mode, but with "
                "affine=False it has no parameters by which it could be frozen: give it some, or "
                "call train() on it"
            )
        if learns and not any(learns) and not layer.training:
            frozen += [part for part in layer.modules() if not part.training]
    network.train()
    for layer in frozen:
        layer.training = False


class Attributes:
    """The buffers and other attributes that a network's modules have, as they are now."""

    def __init__(self, network: nn.Module) -> None:
        self._before = [
            (path, here, dict(here))
            for path, module in network.named_modules()
            for here in (module._buffers, vars(module))
        ]

    def tensors(self) -> list[Tensor]:
        """Each tensor once."""
        values = [value for *_, before in self._before for value in before.values()]
        return list({id(value): value for value in values if isinstance(value, Tensor)}.values())

    def changed(self) -> list[str]:
        """Names of tensors and numbers that are others by now, not just changed in place."""
        return [
            f"{path}.{name}".lstrip(".")
            for path, here, before in self._before
            for name in here.keys() | before.keys()
            if name != "training" and _differ(here.get(name), before.get(name))
        ]

    def put_back(self) -> None:
        """Makes all of them the objects that they were."""
        for _, here, before in self._before:
            here.clear()
            here.update(before)


def _differ(now: object, before: object) -> bool:
    if isinstance(now, Tensor) or isinstance(before, Tensor):
        return now is not before
    return isinstance(now, int | float) and now != before


def with_gradient_hooks(named: Iterable[tuple[str, nn.Module | Tensor]]) -> list[str]:
    """The names of those layers or weights whose hooks may change gradients."""
    kinds = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    return [name for name, owner in named if any(getattr(owner, kind, None) for kind in kinds)]


def has_hooks(network: nn.Module) -> bool:
    """Whether Python is called before or after a layer's own forward or backward pass.

    By hooks of one of the network's layers, or by torch's global ones, which all layers have.
    """
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    own = (getattr(layer, f"_{kind}_hooks") for layer in network.modules() for kind in kinds)
    return any(own) or bool(_has_any_global_hook())
