"""What Python changes in a network while it computes: a CUDA graph would not repeat it."""

from torch import Tensor, nn


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


def has_hooks(module: nn.Module) -> bool:
    """Whether Python is called before or after a layer's own forward or backward pass."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
