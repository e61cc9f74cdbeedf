"""When torch's schedulers of the learning rate are stepped: after a batch, or after an epoch."""

import math
from collections.abc import Iterable
from operator import length_hint

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from normlab.support.checks import one_of

_BY_BATCH = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)
_BY_EPOCH = (
    *(lr_scheduler.StepLR, lr_scheduler.MultiStepLR, lr_scheduler.ExponentialLR),
    lr_scheduler.ReduceLROnPlateau,
)


def stepped_after(scheduler: LRScheduler, told: str | None, batches: Iterable) -> str:
    """Whether a scheduler is stepped after each "batch" or "epoch"; `ValueError` if unknown."""
    if told is not None:
        return one_of(told, ("batch", "epoch"), "scheduler_steps")
    kind = type(scheduler).__name__
    counted = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}.get(kind, "")
    short = getattr(scheduler, counted, math.inf) < length_hint(batches)
    if isinstance(scheduler, _BY_EPOCH) or short:
        return "epoch"
    if isinstance(scheduler, _BY_BATCH):
        return "batch"
    raise ValueError(
        f"{kind} may count batches or epochs: say which by scheduler_steps='batch' or 'epoch'"
    )
