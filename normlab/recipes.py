"""How a network is trained, as data: a recipe and its schedule."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from normlab.augment import parse_augmentation
from normlab.optimizers import BY_FILTER, OPTIMIZERS, centralize_gradients, filters
from normlab.penalties import L1_OVER
from normlab.support.checks import number, one_of, whole_number
from normlab.support.tensor_checks import trained_parameters

# What weights and images are kept in. "bfloat16" is mixed precision: its weights are in float32.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}

PATIENCE = 3  # epochs without a lower training loss, after which "plateau" lowers the rate


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training beside the network and the data.

    Args:
        epochs: passes over the training images.
        batch_size: images in a step; the last batch of an epoch may be shorter.
        optimizer: "sgd" (with momentum), "adam", "adamw", or "muon" (`optimizers.Muon`).
        lr: learning rate; the highest one where the schedule changes it.
        momentum: of SGD and Muon; 0 turns it off. Adam and AdamW ignore it.
        nesterov: whether SGD's momentum looks ahead (Sutskever et al. 2013); Muon's always does.
        weight_decay: as `torch.optim` applies it, to all parameters; with Muon to filters alone.
        centred: gradient centralization, which keeps the mean of every filter at 0 (Yong et al.
            2020; `optimizers.centralize_gradients`).
        schedule: "one-cycle" (up for 30 % of the steps, then down to nothing: Smith & Topin
            2018), "warm-up" (the same, up for 10 %), "cosine" (Loshchilov & Hutter 2017), "step" (a
            tenth from half of the steps on, a hundredth from three quarters on: He et al. 2016),
            "constant"; they change after every step. "plateau" divides a constant rate by 10 after
            3 epochs without a new lowest training loss (`ReduceLROnPlateau` with patience=2).
        l1: factor of `l1_penalty` in the loss.
        l1_over: what that sums over: "weights" of convolutions and linear layers, or "all".
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016).
        augment: names as for `parse_augmentation`, applied in order: "shift:2", "flip", "rotate".
        dtype: "float32" on every device, without TF32; "float64" for comparisons that must be
            exact; "bfloat16" for mixed precision in training, while weights, loss and tests stay in
            float32. It treats norms differently: on a GPU GN and LN then compute in float32, but BN
            in bfloat16 with statistics in float32.
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
    l1_over: str = "weights"

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
            "l1_over": one_of(self.l1_over, L1_OVER, "l1_over"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate at `step`, from 0 on, of a training of `steps` steps."""
        return self.lr * SCHEDULES[self.schedule](step, steps)

    def plateau_factor(self, losses: Sequence[float]) -> float:
        """What the learning rates are multiplied by after epochs of these training losses."""
        scale, best, waited = 1.0, math.inf, 0
        for loss in losses if self.schedule == "plateau" else ():
            waited = 0 if loss < best * (1 - 1e-4) else waited + 1
            best = loss if waited == 0 else best
            if waited == PATIENCE:
                scale, waited = scale / 10, 0
        return scale

    def replace(self, **changes: object) -> "Recipe":
        """The same recipe with some fields changed."""
        for name in changes:
            one_of(name, self.__dataclass_fields__, "field of a recipe")
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


def make_optimizer(
    network: nn.Module, recipe: Recipe, *, rate: Tensor | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser for the network's parameters; `ValueError` if none can be trained.

    `rate` replaces the recipe's learning rate by a tensor on the device, as CUDA graphs need it.
    """
    by_filter = recipe.centred or recipe.optimizer in BY_FILTER
    weights, banks = trained_parameters(network), filters(network) if by_filter else []
    rate = recipe.lr if rate is None else rate
    optimizer = OPTIMIZERS[recipe.optimizer](weights, banks, rate, recipe)
    if recipe.centred:
        centralize_gradients(optimizer, banks)
    return optimizer


def _one_cycle(step: int, steps: int, rising: float = 0.3) -> float:
    """Rises from 1/25 to 1 in a part of the steps, then falls to 4e-6."""
    lowest, summit, last = 1 / 25, max(rising * steps - 1, 1e-9), max(steps - 1, 1)
    if step <= summit:
        return _half_cosine(lowest, 1.0, step / summit)
    return _half_cosine(1.0, lowest * 1e-4, min(1.0, (step - summit) / max(last - summit, 1e-9)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES = {  # each gives the factor of the recipe's rate at a step, from 0 on, of so many steps
    "one-cycle": _one_cycle,
    "warm-up": lambda step, steps: _one_cycle(step, steps, rising=0.1),
    "cosine": lambda step, steps: _half_cosine(1.0, 0.0, step / steps),
    "step": lambda step, steps: 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps)),
    **dict.fromkeys(("constant", "plateau"), lambda step, steps: 1.0),
}
OPEN_ENDED = {"constant", "plateau"}  # do not depend on how many steps there will be
