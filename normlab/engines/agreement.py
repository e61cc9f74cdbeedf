"""Whether an engine computes what the plain loop computes, tried out before it trains a run."""

import math
from contextlib import closing
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data import BatchLoader
from normlab.engines.plain import PlainEngine
from normlab.support.module_state import copied

# How far an engine may end from the plain loop: as a part of how far that moved in the same epoch,
# or as a multiple of how far rounding errors alone take it, whichever is more.
TOLERANCE, ROUNDING = 0.05, 5

EPOCHS = 3  # of two batches each, a whole one and one as short as the run's last

Numbers = dict[str, dict[str, Tensor]]
"""The tensors of an engine by kind and by name."""


def disagreement(engine: PlainEngine) -> str:
    """What engines of this kind compute otherwise than the plain loop, in a phrase; "" if nothing.

    Both train copies of the engine's network in float32, on its device and on the first images of
    its run. After every epoch of two steps their weights, running statistics, optimiser states and
    results are compared, and then made the same again, since rounding errors grow with the steps.
    How far these go is seen from a second plain loop, with its tensors laid out channels last: with
    batch normalization a single step in float32 may be uncertain by some percent.

    Dropout layers change nothing here, since each engine draws masks in a way of its own; but no
    engine may draw the same mask in every step.
    """
    plain = _on_a_copy(PlainEngine, engine)
    rounded = _on_a_copy(PlainEngine, engine, torch.channels_last)
    with closing(_on_a_copy(type(engine), engine)) as trial:
        trial.layout = engine.layout
        if problem := trial.prepare():
            return problem
        for epoch in range(EPOCHS):
            before = _copies(_tensors(plain))
            after = [_trained(each, epoch) for each in (plain, rounded, trial)]
            if problem := _largest_difference(before, *after):
                return f"the {engine.name} engine disagrees with the plain loop: {problem}"
            for follower in (rounded, trial):
                _make_equal(follower, plain)
        steps = EPOCHS * trial.steps
        for masks in _tensors(trial)["masks"].values():
            if masks.any() and ((masks == 0) | (masks == steps)).all():
                return f"the {engine.name} engine drops the same elements in every step"
    return ""


def _on_a_copy(
    kind: type[PlainEngine],
    engine: PlainEngine,
    layout: torch.memory_format = torch.contiguous_format,
) -> PlainEngine:
    """An engine of a kind for a copy of another's network, and for a few images of its run."""
    network = copied(engine.network).to(dtype=torch.float32, memory_format=layout)
    for layer in list(network.modules()):
        for name, part in layer.named_children():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                setattr(layer, name, _CountedMasks(part).to(engine.device))
    recipe = engine.recipe.replace(epochs=EPOCHS, dtype="float32")
    return kind(network, recipe, *(_first(each, layout) for each in (engine.batches, engine.tests)))


def _first(batches: BatchLoader, layout: torch.memory_format) -> BatchLoader:
    """The first batch of a run, and after it as many images as its last one has."""
    order, _ = replace(batches, epoch=0).draw_epoch()
    first = order[: batches.batch_size + len(order) % batches.batch_size]
    images, labels = batches.images[first], batches.labels[first]
    options = {"dtype": torch.float32, "memory_format": layout, "epoch": 0}
    return replace(batches, images=images, labels=labels, **options)


class _CountedMasks(nn.Module):
    """Stands for a dropout layer: hands on what it gets, and counts what would have been dropped.

    The count is of masks of a fixed size, so that a CUDA graph finds it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.probability, self.training = layer.p, layer.training
        self.register_buffer("dropped", torch.zeros(4096))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.dropped += F.dropout(torch.ones_like(self.dropped), self.probability) == 0
        return x


def _trained(engine: PlainEngine, epoch: int) -> Numbers:
    """What an engine holds after an epoch, and what came out of it."""
    train, test = engine.do_epoch(epoch)
    losses = {"loss": train.loss, "penalty": train.penalty, "test loss": test.loss}
    counts = {"images": train.images, "test images": test.images}
    results = {"losses": losses, "counts of images": counts}
    made = {kind: {k: torch.tensor(v) for k, v in each.items()} for kind, each in results.items()}
    return _copies(_tensors(engine) | made)


def _tensors(engine: PlainEngine) -> Numbers:
    found: Numbers = {"weights": dict(engine.network.named_parameters())}
    found |= {"running statistics": {}, "masks": {}, "optimiser state": {}, "counts of steps": {}}
    for name, value in engine.network.named_buffers():
        kind = "running statistics" if value.is_floating_point() else "counts of steps"
        found["masks" if name.endswith(".dropped") else kind][name] = value
    for name, weight in found["weights"].items():
        for key, value in engine.optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                kind = "optimiser state" if value.dim() else "counts of steps"
                found[kind][f"{name} ({key})"] = value
    return found


def _copies(numbers: Numbers) -> Numbers:
    """In float64, on the CPU."""
    return {
        kind: {name: value.detach().to("cpu", torch.float64, copy=True) for name, value in each}
        for kind, each in ((kind, named.items()) for kind, named in numbers.items())
    }


@torch.no_grad()
def _make_equal(follower: PlainEngine, leader: PlainEngine) -> None:
    mine, theirs = _tensors(follower), _tensors(leader)
    for kind in mine.keys() - {"masks"}:
        for name, value in mine[kind].items():
            value.copy_(theirs[kind][name])


def _largest_difference(before: Numbers, plain: Numbers, rounded: Numbers, tried: Numbers) -> str:
    """The kind of numbers that is too far from the plain loop's, and its farthest tensor."""
    found = {}
    for kind in plain.keys() - {"masks"}:
        parts = [_distances(plain[kind], each.get(kind, {})) for each in (before, rounded, tried)]
        change, rounding, apart = (math.hypot(*part.values()) for part in parts)
        size = math.hypot(*_distances(plain[kind], {}).values())
        allowed = max(TOLERANCE * change, ROUNDING * rounding, 1e-6 * size)
        if math.isfinite(change) and not apart <= allowed:  # as NaN is not
            name = max(parts[-1], key=parts[-1].get)
            share = apart / max(change, 1e-30)
            found[share] = f"{kind} differ by {share:.0%} of their change, most of all {name}"
    return found[max(found)] if found else ""


def _distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """How far the tensors of the same names are apart; one that is not there counts as 0."""
    return {name: float((value - other.get(name, 0.0)).norm()) for name, value in one.items()}
