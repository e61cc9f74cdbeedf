"""What the search tries and no recipe can say, as changes of the library while a block lasts.

`PATCHES` has a trial's name and the function that changes the library for it. None of them gained
anything, so `Recipe` does not have them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from normlab import training
from normlab.data import BatchLoader
from normlab.penalties import WEIGHT_LAYERS
from normlab.recipes import SCHEDULES, _one_cycle
from normlab.support.seeding import generator

Patch = Callable[[pytest.MonkeyPatch], None]

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


def _rise(part: float) -> Patch:
    """The rate rises for this part of the steps, not for 30 %."""
    schedule = partial(_one_cycle, rising=part)
    return lambda patch: patch.setitem(SCHEDULES, "one-cycle", schedule)


def _layer_rate(place: int, factor: float) -> Patch:
    """The layer at this place takes steps that are `factor` times as long: its rate, times that.

    A filter's initial mean, which centring removes in the first step, is multiplied by 1 − `factor`
    in each instead; so for centred filters `factor` must be below 1.
    """

    def change(patch: pytest.MonkeyPatch) -> None:
        step = training.train_step

        def train_step(network: nn.Module, *arguments: object, **options: object) -> tuple:
            layers = [layer for layer in network.modules() if isinstance(layer, WEIGHT_LAYERS)]
            weights = [weight.detach() for weight in layers[place].parameters()]
            before = [weight.clone() for weight in weights]
            result = step(network, *arguments, **options)
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(torch.lerp(old, weight, factor))
            return result

        patch.setattr(training, "train_step", train_step)

    return change


def _mean_of_the_end(patch: pytest.MonkeyPatch) -> None:
    """In the last quarter tests see the mean of the weights after each of its steps so far."""
    one_cycle, lengths = SCHEDULES["one-cycle"], set()

    def schedule(step: int, steps: int) -> float:
        lengths.add(steps)  # of the training, and of the short ones that compare two engines
        return one_cycle(step, steps)

    patch.setitem(SCHEDULES, "one-cycle", schedule)
    _averaged(patch, lambda taken: 1 / (taken - 0.75 * max(lengths)).clamp(min=1))


def _averaged(
    patch: pytest.MonkeyPatch,
    share: Callable[[Tensor], Tensor | float] = lambda taken: 1 - KEPT,
) -> None:
    """Tests see an average of the weights and of BN's statistics: by default a running one.

    `share` says what part of it the weights are after so many steps. On a GPU these count the steps
    that warm a capture up, too, three for each size of a batch.
    """
    step, averages, taken = training.train_step, {}, {}

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
            taken[network] = torch.zeros((), device=floats[0].device)
            network.register_forward_pre_hook(exchange)
            network.register_forward_hook(exchange)
        result = step(network, *arguments, **options)
        with torch.no_grad():
            taken[network] += 1
            for mean, tensor in averages[network]:
                mean.lerp_(tensor.detach(), share(taken[network]))
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


PATCHES: dict[str, Patch] = {
    "muon 0.05 centred, alternating flip": _alternating_flip,
    "muon 0.05 centred, linear": _linear,
    "muon 0.05 centred, rise of a twentieth": _rise(0.05),
    "muon 0.05 centred, rise of a half": _rise(0.5),
    "muon 0.05 centred, first layer 0.5": _layer_rate(0, 0.5),
    "muon 0.05 centred, last layer 0.5": _layer_rate(-1, 0.5),
    "muon 0.05 centred, last layer 2": _layer_rate(-1, 2.0),
    "muon 0.05 centred, averaged weights": _averaged,
    "muon 0.05 centred, averaged weights, to a tenth": _averaged_to_a_tenth,
    "muon 0.05 centred, mean of the end": _mean_of_the_end,
}
