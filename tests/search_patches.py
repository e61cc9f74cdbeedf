"""What the search tries and no recipe can say, as changes of the library while a block lasts.

`PATCHES` has a trial's name and the function that changes the library for it. None of them gained
anything, so `Recipe` does not have them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from normlab import training
from normlab.data import BatchLoader
from normlab.recipes import SCHEDULES
from normlab.support.seeding import generator

KEPT = 0.999  # part of an average that is left after a step


@contextmanager
def patched(trial: str) -> Iterator[None]:
    """Changes the library as the trial needs it, and changes it back."""
    with pytest.MonkeyPatch.context() as patch:
        if trial in PATCHES:
            PATCHES[trial](patch)
        yield


def _alternating_flip(patch: pytest.MonkeyPatch) -> None:
    """Each image is mirrored in every second epoch (Jordan 2024, "94 % on CIFAR-10 in 3.29 s")."""
    original = BatchLoader.draw_epoch

    def draw_epoch(batches: BatchLoader) -> tuple[Tensor, list[Tensor]]:
        order, draws = original(batches)
        rng = generator(batches.seed, "flip", 0)
        first = (torch.rand(len(batches.images), generator=rng) < 0.5).to(order.device)
        for place, augmentation in enumerate(batches.augmentations):
            if augmentation.name == "flip":
                draws[place] = first[order] ^ bool(batches.epoch % 2)
        return order, draws

    patch.setattr(BatchLoader, "draw_epoch", draw_epoch)


def _linear(patch: pytest.MonkeyPatch) -> None:
    """The rate rises for 10 % of the steps and falls along a line."""
    patch.setitem(SCHEDULES, "one-cycle", lambda step, steps: _ramp(step / steps, 0.1))


def _ramp(progress: float, summit: float, lowest: float = 1 / 25) -> float:
    if progress < summit:
        return lowest + (1 - lowest) * progress / summit
    return max(1e-6, 1 - (progress - summit) / (1 - summit))


def _averaged(patch: pytest.MonkeyPatch) -> None:
    """Tests see a running average of the weights and of BN's statistics.

    On a GPU it also has the steps that warm a capture up, three for each size of a batch.
    """
    step, averages = training.train_step, {}

    def exchange(network: nn.Module, *_: object) -> None:
        if not network.training:
            with torch.no_grad():
                for mean, tensor in averages[network]:
                    now = tensor.clone()
                    tensor.copy_(mean)
                    mean.copy_(now)

    def train_step(network: nn.Module, *arguments: object, **options: object) -> tuple:
        if network not in averages:
            tensors = network.state_dict(keep_vars=True).values()
            floats = [tensor for tensor in tensors if tensor.is_floating_point()]
            averages[network] = [(tensor.detach().clone(), tensor) for tensor in floats]
            network.register_forward_pre_hook(exchange)
            network.register_forward_hook(exchange)
        result = step(network, *arguments, **options)
        with torch.no_grad():
            means, tensors = zip(*averages[network], strict=True)
            torch._foreach_lerp_(means, [tensor.detach() for tensor in tensors], 1 - KEPT)
        return result

    patch.setattr(training, "train_step", train_step)


def _averaged_to_a_tenth(patch: pytest.MonkeyPatch) -> None:
    """The same with a rate that ends at a tenth, so that there is something to average."""
    one_cycle = SCHEDULES["one-cycle"]
    _averaged(patch)

    def schedule(step: int, steps: int) -> float:
        factor = one_cycle(step, steps)
        return factor if step < 0.3 * steps else 0.1 + 0.9 * factor

    patch.setitem(SCHEDULES, "one-cycle", schedule)


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "muon 0.05 centred, alternating flip": _alternating_flip,
    "muon 0.05 centred, linear": _linear,
    "muon 0.05 centred, averaged weights": _averaged,
    "muon 0.05 centred, averaged weights, to a tenth": _averaged_to_a_tenth,
}
