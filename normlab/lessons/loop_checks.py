"""`check_loop`: whether a student's training and test loops are right, and what is wrong.

A small network is watched while they run: in which mode it is, and which gradients a step takes.
What they return is compared with what the usual mistakes would return.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from normlab.lessons import checking
from normlab.support.seeding import seeded

_SIZES = (4, 4, 2)  # of the batches: the last one is short
_WRONG = (0, 1, 1, 1, 0, 0, 1, 1, 0, 1)  # the images that are predicted wrongly
_RATE = 1e-3

# What may be minimised, or reported, instead of the cross-entropy.
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax before cross-entropy": lambda z, y: F.cross_entropy(z.softmax(1), y),
    "softmax without logarithm": lambda z, y: F.nll_loss(z.softmax(1), y),
    "log-softmax missing": F.nll_loss,
    "squared error": lambda z, y: F.mse_loss(z.softmax(1), F.one_hot(y, z.shape[1]).float()),
    "loss summed over the batch": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
}
# How the batches' means m may become one number instead of Σ(m · n) / Σn, by their sizes n.
_AVERAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "short last batch counted too much": lambda m, n: m.mean(),
    "short last batch counted as a whole one": lambda m, n: (m @ n) / (len(m) * n.max()),
    "sum divided by the number of batches": lambda m, n: (m @ n) / len(m),
    "batch means divided by the number of images": lambda m, n: m.sum() / n.sum(),
    "last batch only": lambda m, n: m[-1],
    "sum not divided": lambda m, n: m @ n,
    "batch means not divided": lambda m, n: m.sum(),
}
_SENTENCES = {
    "no train()": "the network is not in training mode: call network.train() before the batches",
    "no eval()": "the network is not in evaluation mode in the test: call network.eval() before it",
    "mode not put back": "after the test the network stays in evaluation mode, and the training "
    "function does not call network.train(): from the second epoch on it trains in the wrong mode",
    "not every batch": "not every batch is used: does `return` or `break` stand within the loop?",
    "no backward": "gradients are never computed: call loss.backward() for each batch",
    "no step": "the weights never change: call optimizer.step() for each batch",
    "one step for all batches": "optimizer.step() is not called for each batch, within the loop",
    "step before backward": "optimizer.step() comes before backward(): it uses old gradients",
    "gradients cleared before the step": "gradients are cleared between backward() and step()",
    "no zero_grad": "gradients add up over the batches: call optimizer.zero_grad() before backward",
    "softmax before cross-entropy": "cross-entropy applies softmax itself: give it the logits",
    "softmax without logarithm": "nll_loss is given softmax; it needs log_softmax",
    "log-softmax missing": "nll_loss is given logits; it needs log_softmax",
    "loss summed over the batch": "the loss is summed over the batch instead of averaged, so that "
    "steps are as many times longer as there are images in it",
    "squared error": "the squared error is taken instead of the cross-entropy",
    "unknown gradients": "the gradients of a step are not those of the mean cross-entropy of its "
    "batch, by none of the usual mistakes",
    "gradients recorded in the test": "gradients are recorded in the test, which costs memory and "
    "time: put it under torch.no_grad()",
    "weights changed in the test": "the test changes weights; it only measures",
    "short last batch counted too much": "the mean of the batches' means is taken, in which an "
    "image of the short last batch counts more than others: weight each by its number of images",
    "short last batch counted as a whole one": "the sum is divided by (number of batches · batch "
    "size), but the last batch has fewer images: divide by the number of images",
    "sum divided by the number of batches": "a sum over images is divided by the number of "
    "batches: divide it by the number of images",
    "batch means divided by the number of images": "the batches' means are summed and divided by "
    "the number of images: multiply each by its number of images first",
    "last batch only": "only the last batch is reported: sum over all of them",
    "sum not divided": "a sum is reported that is not divided by the number of images",
    "batch means not divided": "the batches' means are summed and not divided",
    "accuracy in percent": "accuracy is in percent; here it is a fraction from 0 to 1",
    "accuracy is a count": "the number of correct images is returned instead of their fraction",
    "unknown result": "neither the mean loss nor the accuracy is among what is returned",
}


@dataclass
class _Batch:
    """What was seen of one batch, which begins with that image; logits are before the step."""

    begin: int
    labels: Tensor
    logits: Tensor
    training: bool  # whether all layers were in training mode
    recorded: bool  # whether gradients were
    due: dict[str, Tensor]  # the gradient of the right loss, "", and of each of _LOSSES
    backward: bool = False  # whether gradients were computed after it


class _Watched:
    """A network and its batches, which take notes."""

    def __init__(self, *, training: bool) -> None:
        with seeded(5):
            layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
            self.network = nn.Sequential(nn.Flatten(), *layers)
            images = torch.randn(sum(_SIZES), 1, 2, 3)
        self.network.train(not training)  # as it should be when the labels are compared
        with torch.no_grad():
            guess = torch.cat([self.network(part) for part in images.split(_SIZES)]).argmax(1)
        self.network.train(training)
        self.data = TensorDataset(images, (guess + torch.tensor(_WRONG)) % 3)
        self.parameters = [*self.network.parameters()]
        self.before = _flat(self.parameters)
        self.batches: list[_Batch] = []
        self.steps: list[tuple[_Batch | None, bool, Tensor | None]] = []  # after backward, gradient
        self.error: checking.Failed | None = None

    @property
    def moved(self) -> bool:
        return not torch.equal(self.before, _flat(self.parameters))

    def run(self, function: Callable) -> "_Watched":
        """Calls a student's function and takes notes."""
        optimizer = torch.optim.SGD(self.parameters, lr=_RATE)
        values = {
            **{"network": self.network, "batches": DataLoader(self.data, batch_size=_SIZES[0])},
            **{"optimizer": optimizer, "loss": nn.CrossEntropyLoss(), "device": "cpu", "epoch": 1},
            **{"rate": _RATE, "factor": 0.0, "scheduler": LambdaLR(optimizer, lambda _: 1.0)},
        }
        roles = checking.roles_of(function, values, ("network", "batches", "optimizer", "loss"))
        hooks = (
            self.network.register_forward_hook(self._forward),
            self.parameters[0].register_post_accumulate_grad_hook(self._backward),
            register_optimizer_step_pre_hook(self._step),
        )
        try:
            self.result = checking.call(function, values, roles, "loss rate scheduler")
        except checking.Failed as error:
            self.error = error
        finally:
            for hook in hooks:
                hook.remove()
        return self

    def _forward(self, network: nn.Module, inputs: tuple, logits: Tensor) -> None:
        images, labels = self.data.tensors
        flat = inputs[0].detach().flatten(1)
        begin = int((images.flatten(1) - flat[0]).abs().sum(1).argmin())
        labels = labels[begin : begin + len(flat)]
        losses = {"": F.cross_entropy} | _LOSSES
        due = {
            name: _flat(
                torch.autograd.grad(loss(logits, labels), self.parameters, retain_graph=True)
            )
            for name, loss in losses.items()
            if logits.requires_grad
        }
        training = all(layer.training for layer in network.modules())
        recorded = torch.is_grad_enabled()
        self.batches.append(_Batch(begin, labels, logits.detach(), training, recorded, due))

    def _backward(self, _: Tensor) -> None:
        for batch in self.batches:
            batch.backward = True

    def _step(self, *_: object) -> None:
        gradients = [p.grad for p in self.parameters]
        whole = None if None in gradients else _flat(gradients)
        last = self.batches[-1] if self.batches else None
        self.steps.append((last, bool(last and last.backward), whole))


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def check_loop(train: Callable | None = None, test: Callable | None = None) -> checking.Checked:
    """Whether functions that train, or test, for an epoch are right.

    Args:
        train: takes a network, a `DataLoader` and an optimiser (and a loss, device, epoch, …), by
            their usual names or in this order.
        test: the same without an optimiser. Alone, a function must set its own mode; where both
            are given it is enough that the test puts it back.

    Where they return losses and accuracies these are compared with the mean cross-entropy and the
    fraction of correct images. The result is as that of `check_norm`.
    Raises `TypeError` if there is neither.
    """
    if train is None and test is None:
        raise TypeError("check_loop needs train=, a function, or test=, or both")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=_RATE).zero_grad()  # imports a lot:
    # that must neither count as the student's time nor be ended in the middle
    words = ("training" * (train is not None), "test" * (test is not None))
    found = (
        (part, {name: f"{_SENTENCES[name]}." for name in names})
        for part, names in _parts(train, test)
    )
    return checking.checked(f"{' and '.join(filter(None, words))} loop", found)


def _parts(train: Callable | None, test: Callable | None) -> Iterator[tuple[str, list[str]]]:
    """What is looked at, each with the names of its mistakes."""
    own_mode = True
    if train is not None:
        watched = _Watched(training=False).run(train)
        own_mode = all(batch.training for batch in watched.batches if batch.recorded)
        if test is None:
            yield "training: mode", ["no train()"] * (not own_mode)
        steps = _steps(watched)
        if watched.error is not None and steps != ["step before backward"]:
            raise watched.error
        yield "training: steps", steps
        yield from _returned("training", watched)
    if test is not None:
        watched = _Watched(training=True).run(test)
        if watched.error is not None:
            raise watched.error
        if not own_mode:
            yield "mode after the test", ["mode not put back"] * (not watched.network.training)
        recorded = any(batch.recorded for batch in watched.batches)
        training = any(batch.training for batch in watched.batches)
        yield "test: mode", ["no eval()"] * training
        yield "test: no gradients", ["gradients recorded in the test"] * recorded
        changed = watched.moved or bool(watched.steps)
        yield "test: weights", ["weights changed in the test"] * changed
        yield from _returned("test", watched)


def _steps(watched: _Watched) -> list[str]:
    """The mistakes in the steps of an optimiser."""
    if not any(batch.backward for batch in watched.batches):
        return ["no backward"]
    if not watched.steps:
        return ["no step"] * (not watched.moved)  # weights may be moved by hand
    if len(watched.steps) < len({batch.begin for batch in watched.batches}):
        return ["one step for all batches"]
    before = torch.zeros(())
    for batch, after_backward, gradient in watched.steps:
        if not after_backward:
            return ["step before backward"]
        if gradient is None or not gradient.any():
            return ["gradients cleared before the step"]
        found = [name for name, each in batch.due.items() if _along(gradient, each)]
        added = [name for name, each in batch.due.items() if _along(gradient, each + before)]
        if not found and added:
            return ["no zero_grad", *filter(None, added[:1])]
        if not found:  # another loss may be meant, such as one with smoothed labels
            near = torch.cosine_similarity(gradient, batch.due[""], 0) > 0.5
            return [] if near else ["unknown gradients"]
        if found[0]:
            return found[:1]
        before = gradient
    return []


def _along(given: Tensor, due: Tensor) -> bool:
    """Whether gradients are the same, or shorter as after clipping; a small penalty may be in."""
    factor = float(given @ due / (due @ due))
    near = (given - factor * due).abs().max() <= 0.02 * (factor * due).abs().max()
    return bool(near) and 0 < factor < 1.02


# --- what is returned ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reported:
    """How batches become one number; the defaults are right for a loss."""

    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    average: Callable[[Tensor, Tensor], Tensor] = lambda m, n: (m @ n) / n.sum()
    unit: float = 1.0

    def __call__(self, batches: list[_Batch]) -> float:
        means = torch.stack([self.loss(each.logits, each.labels) for each in batches])
        sizes = torch.tensor([float(len(each.labels)) for each in batches])
        return self.unit * float(self.average(means, sizes))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def _ways(**places: dict[str, object]) -> list[checking.Mistake]:
    return [
        checking.Mistake(name, _SENTENCES[name], {place: value})
        for place, values in places.items()
        for name, value in values.items()
    ]


_OF_A_LOSS = _ways(loss=_LOSSES, average=_AVERAGES)
_OF_ACCURACY = _ways(average=_AVERAGES, unit={"accuracy in percent": 100.0})


def _returned(what: str, watched: _Watched) -> Iterator[tuple[str, list[str]]]:
    """Whether all batches are used, and what is returned of them."""
    first = {batch.begin: batch for batch in reversed(watched.batches)}
    every = len(first) == len(_SIZES) or watched.error is not None
    yield f"{what}: every batch", ["not every batch"] * (not every)
    numbers = [] if watched.error else [*_numbers(watched.result)]
    if numbers and every and first:
        batches = [first[begin] for begin in sorted(first)]
        yield f"{what}: what is returned", _results(numbers, batches, what)


def _numbers(value: object) -> Iterator[float]:
    """The numbers in what was returned; longer lists are histories, and left out."""
    if isinstance(value, Tensor) and value.numel() == 1:
        yield float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield float(value)
    elif is_dataclass(value):
        value = tuple(getattr(value, each.name) for each in fields(value))
    elif isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple) or (isinstance(value, list) and len(value) < 3):
        for each in value:
            yield from _numbers(each)


def _results(numbers: list[float], batches: list[_Batch], what: str) -> list[str]:
    """The mistakes that give these numbers."""
    ways = [
        *checking.explanations(_Reported(), _OF_A_LOSS),
        *checking.explanations(_Reported(_accuracy), _OF_ACCURACY),
    ]
    table = [(way(batches), way.loss, [each.name for each in some]) for way, some in ways]
    table.sort(key=lambda row: len(row[-1]))  # few mistakes first
    counted = any(abs(number - sum(_SIZES)) < 1e-6 for number in numbers)
    found, known = [], False
    for number in numbers:
        near = [row for row in table if abs(row[0] - number) <= 1e-4 * abs(row[0])]
        known |= bool(near)
        _, loss, names = near[0] if near else (0, None, [])
        if names == ["sum not divided"]:
            names = [] if counted else ["accuracy is a count"] if loss is _accuracy else names
        found += names
    return found if known or what == "training" else ["unknown result"]
