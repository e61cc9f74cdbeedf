"""How a network is trained, as data: a recipe, its optimiser and its schedule."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from normlab.augment import parse_augmentation
from normlab.optimizers import Muon, centre_filters, filters
from normlab.support.checks import check_weights, number, one_of, whole_number

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("one-cycle", "cosine", "constant")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training beside the network and the data.

    Args:
        epochs: passes over the training images.
        batch_size: images in a step; the last batch of an epoch may be shorter.
        optimizer: "sgd" (with momentum), "adamw", or "muon" (`optimizers.Muon`).
        lr: learning rate; the highest one where the schedule changes it.
        momentum: of SGD and Muon; 0 turns it off. AdamW ignores it.
        nesterov: whether SGD's momentum looks ahead (Sutskever et al. 2013); Muon's always does.
        weight_decay: as `torch.optim` applies it, to all parameters; with Muon to filters alone.
        centred: whether the mean of every filter is kept at 0 (`optimizers.centre_filters`).
        schedule: "one-cycle" (up for 30 % of the steps, then down to nothing: Smith & Topin
            2018), "cosine" (Loshchilov & Hutter 2017), "constant"; it moves after every step.
        l1: factor of `l1_penalty` in the loss.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016).
        augment: names as for `parse_augmentation`, applied in order: "shift:2", "flip", "rotate".
        dtype: "float32", or "float64" for comparisons that must be exact.
        seed: of the order of images, the augmentation and the dropout.

    Raises `ValueError` or `TypeError` that names the value that is wrong.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    centred: bool = False
    schedule: str = "one-cycle"
    l1: float = 0.0
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ()
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nesterov", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        checked = {
            "epochs": whole_number(self.epochs, "epochs"),
            "batch_size": whole_number(self.batch_size, "batch_size"),
            "optimizer": one_of(self.optimizer, OPTIMIZERS, "optimizer"),
            "lr": number(self.lr, "lr", positive=True),
            "momentum": number(self.momentum, "momentum", below=1),
            "weight_decay": number(self.weight_decay, "weight_decay"),
            "schedule": one_of(self.schedule, SCHEDULES, "schedule"),
            "l1": number(self.l1, "l1"),
            "label_smoothing": number(self.label_smoothing, "label_smoothing", below=1),
            "augment": _checked_augment(self.augment),
            "dtype": one_of(self.dtype, DTYPES, "dtype"),
            "seed": whole_number(self.seed, "seed", least=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def replace(self, **changes: object) -> "Recipe":
        """The same recipe with some fields changed."""
        unknown = changes.keys() - self.__dataclass_fields__.keys()
        if unknown:
            one_of(sorted(unknown)[0], self.__dataclass_fields__, "field of a recipe")
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict:
        """The fields as JSON can hold them."""
        return asdict(self) | {"augment": list(self.augment)}


def _checked_augment(augment: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(augment, str):
        augment = (augment,)
    if not isinstance(augment, (tuple, list)):
        raise TypeError(f"augment must be names such as ('shift', 'flip'), not {augment!r}")
    kinds = [parse_augmentation(text).name for text in augment]
    if len(set(kinds)) < len(kinds):  # it would draw the same numbers twice
        raise ValueError(f"each augmentation can be there once, not {', '.join(augment)}")
    return tuple(augment)


def trained_parameters(network: nn.Module, recipe: Recipe) -> tuple[list[Tensor], list[Tensor]]:
    """What the recipe trains, and what of it are filters that Muon or centring changes.

    Raises `ValueError` if there is nothing to train, or nothing that can be trained in that way.
    """
    check_weights(network)
    parameters = [weight for weight in network.parameters() if weight.requires_grad]
    if not parameters:
        raise ValueError(f"{type(network).__name__} has no parameters to train")
    if any(weight.is_inference() for weight in parameters):
        raise ValueError(
            f"{type(network).__name__} was built under torch.inference_mode(), whose tensors have "
            "no gradients: build it outside"
        )
    return parameters, filters(network) if recipe.centred or recipe.optimizer == "muon" else []


def make_optimizer(
    network: nn.Module, recipe: Recipe, *, rate: Tensor | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters of the network; `ValueError` if it has none.

    A `rate` that is a tensor takes the place of the recipe's number, in a fused optimiser that
    reads it on its device.
    """
    parameters, banks = trained_parameters(network, recipe)
    optimizer = _build_optimizer(parameters, banks, recipe, rate)
    if recipe.centred:
        centre_filters(optimizer, banks)
    return optimizer


def _build_optimizer(
    parameters: list[Tensor], banks: list[Tensor], recipe: Recipe, rate: Tensor | None
) -> torch.optim.Optimizer:
    common = {"lr": recipe.lr if rate is None else rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "muon":
        chosen = {id(weight) for weight in banks}
        others = [weight for weight in parameters if id(weight) not in chosen]
        return Muon(banks, others, momentum=recipe.momentum, **common)
    common["fused"] = True if rate is not None else None
    if recipe.optimizer == "adamw":
        on_gpu = rate is not None and rate.is_cuda
        return torch.optim.AdamW(parameters, capturable=on_gpu, **common)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(parameters, momentum=recipe.momentum, nesterov=nesterov, **common)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, *, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler to step after every batch, for `steps` batches of which some are `done`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.lr
    factor = schedule_factor(recipe.schedule, steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)


def schedule_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """The learning rate of step 0, 1, … as a share of the recipe's."""
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":
        return lambda step: _cosine(1.0, 0.0, step / steps)
    lowest = 1 / 25  # the usual one-cycle: from 1/25 up in 30 % of the steps, down to 4e-6
    summit, last = max(0.3 * steps - 1, 1e-9), max(steps - 1, 1)

    def one_cycle(step: int) -> float:
        if step <= summit:
            return _cosine(lowest, 1.0, step / summit)
        return _cosine(1.0, lowest * 1e-4, min(1.0, (step - summit) / max(last - summit, 1e-9)))

    return one_cycle


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
