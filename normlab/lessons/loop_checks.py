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

from normlab.lessons.checking import Checked, Failed, Part, attempt, bound, checked, roles_by
from normlab.support.seeding import seeded

_role_of = roles_by(
    {
        "network": "model|net|network|module|m",
        "batches": "(train|training|test|testing|valid|val|data|eval)?(loader|dataloader|dl|iter)"
        "|(train|test|val)?(data|batches|set)|(data|train|test)(loader|iter)|iterator",
        "optimizer": "optimi[sz]er|opt|optim|updater|sgd",
        "loss": "criterion|loss|loss(fn|func|function)|objective|cost(fn|function)?",
        "device": "device|dev",
        "epoch": "(num|n)?epochs?|e",
        "scheduler": "(lr)?sched(uler)?",
        "rate": "lr|learningrate|rate",
        "factor": "l|l?lambdal?|lfactor|lam|weightdecay",
    }
)
_ORDER = ("network", "batches", "optimizer", "loss")
_SIZES = (4, 4, 2)  # of the batches: the last one is short
_RIGHT = (1, 2, 1)  # how many images of each are predicted correctly
_RATE = 1e-3
_DEFAULTS = ("loss", "rate", "scheduler")  # what a function knows by itself, if it does

# What may be minimised, or reported: the right one first.
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": F.cross_entropy,
    "softmax before cross-entropy": lambda z, y: F.cross_entropy(z.softmax(1), y),
    "softmax without logarithm": lambda z, y: F.nll_loss(z.softmax(1), y),
    "log-softmax missing": lambda z, y: F.nll_loss(z, y),
    "loss summed over the batch": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "squared error": lambda z, y: F.mse_loss(z.softmax(1), F.one_hot(y, z.shape[1]).float()),
}
_SENTENCES = {
    "no train()": "the network is not in training mode: call network.train() before the batches",
    "no eval()": "the network is not in evaluation mode in the test: call network.eval() before it",
    "mode not put back": "after the test the network stays in evaluation mode, and the training "
    "function does not call network.train(): from the second epoch on it trains in the wrong mode",
    "not every batch": "not every batch is used: does `return` or `break` stand within the loop?",
    "no backward": "gradients are never computed: call loss.backward() for each batch",
    "no step": "the weights never change: call optimizer.step() for each batch",
    "one step for all batches": "optimizer.step() is not called for each batch: it must stand "
    "within the loop",
    "step before backward": "optimizer.step() comes before backward(): it uses old gradients",
    "gradients cleared before the step": "gradients are cleared between backward() and step()",
    "no zero_grad": "gradients add up over the batches: call optimizer.zero_grad() before backward",
    "softmax before cross-entropy": "softmax is applied before cross-entropy, which applies it "
    "itself: give it the logits",
    "softmax without logarithm": "nll_loss is given softmax; it needs log_softmax",
    "log-softmax missing": "nll_loss is given logits; it needs log_softmax",
    "loss summed over the batch": "the loss is summed over the batch instead of averaged, so that "
    "steps are as many times longer as there are images in it",
    "squared error": "the squared error is minimised instead of the cross-entropy",
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
    "accuracy in percent": "accuracy is in percent; here it is a fraction from 0 to 1",
    "accuracy is a count": "the number of correct images is returned instead of their fraction",
    "unknown result": "neither the mean loss nor the accuracy is among what is returned",
}


@dataclass
class _Seen:
    """What was seen of one batch, which begins with that image; logits are before the step."""

    begin: int
    labels: Tensor
    logits: Tensor
    training: bool  # whether all layers were in training mode
    recorded: bool  # whether gradients were
    backward: int  # how many backward passes there had been before
    due: dict[str, Tensor]  # the gradient of each of _LOSSES


@dataclass
class _Step:
    """What was seen of one step: of which batch, with which gradient, after which passes."""

    seen: _Seen | None
    gradient: Tensor | None
    backward: int


class _Watched:
    """A network and its batches, which take notes."""

    def __init__(self, *, training: bool) -> None:
        with seeded(5):
            layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
            self.network = nn.Sequential(nn.Flatten(), *layers)
            images = torch.randn(sum(_SIZES), 1, 2, 3)
        self.network.train(not training)  # as it should be when the labels are compared
        labels = []
        for part, right in zip(images.split(_SIZES), _RIGHT, strict=True):
            with torch.no_grad():
                guess = self.network(part).argmax(1)
            labels.append((guess + (torch.arange(len(part)) >= right)) % 3)
        self.network.train(training)
        self.data = TensorDataset(images, torch.cat(labels))
        self.loader = DataLoader(self.data, batch_size=_SIZES[0])
        self.parameters = [*self.network.parameters()]
        self.seen: list[_Seen] = []
        self.steps: list[_Step] = []
        self.backward = 0
        self.result: object = None
        self.error: Failed | None = None
        self.weights = self._flat(self.parameters)

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([each.detach().flatten() for each in tensors])

    @property
    def moved(self) -> bool:
        return not torch.equal(self.weights, self._flat(self.parameters))

    def run(self, function: Callable) -> "_Watched":
        """Calls a student's function and takes notes."""
        optimizer = torch.optim.SGD(self.parameters, lr=_RATE)
        values = {
            **{"network": self.network, "batches": self.loader, "optimizer": optimizer},
            **{"loss": nn.CrossEntropyLoss(), "device": torch.device("cpu"), "epoch": 1},
            **{"rate": _RATE, "factor": 0.0, "scheduler": LambdaLR(optimizer, lambda _: 1.0)},
        }
        arguments = bound(function, values, _role_of, _ORDER, if_needed=_DEFAULTS)
        hooks = (
            self.network.register_forward_hook(self._forward),
            self.parameters[0].register_post_accumulate_grad_hook(self._backward),
            register_optimizer_step_pre_hook(self._step),
        )
        try:
            self.result = attempt(function, *arguments.args, **arguments.kwargs)
        except Failed as error:
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
        due = {}
        if logits.requires_grad:
            for name, loss in _LOSSES.items():
                found = torch.autograd.grad(
                    loss(logits, labels), self.parameters, retain_graph=True
                )
                due[name] = self._flat(found)
        training = all(layer.training for layer in network.modules())
        recorded = torch.is_grad_enabled()
        self.seen.append(
            _Seen(begin, labels, logits.detach(), training, recorded, self.backward, due)
        )

    def _backward(self, _: Tensor) -> None:
        self.backward += 1

    def _step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for p in self.parameters]
        whole = None if None in gradients else self._flat(gradients)
        self.steps.append(_Step(self.seen[-1] if self.seen else None, whole, self.backward))


def check_loop(train: Callable | None = None, test: Callable | None = None) -> Checked:
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
    return checked(f"{' and '.join(filter(None, words))} loop", _parts(train, test))


def _parts(train: Callable | None, test: Callable | None) -> Iterator[Part]:
    if train is not None:
        watched = _Watched(training=False).run(train)
        own_mode = all(seen.training for seen in watched.seen if seen.recorded)
        if test is None:
            yield _part("training: mode", [] if own_mode else ["no train()"])
        steps = _steps(watched)
        if watched.error is not None and steps != ["step before backward"]:
            raise watched.error
        yield _part("training: steps", steps)
        yield from _returned("training", watched)
    if test is not None:
        watched = _Watched(training=True).run(test)
        if watched.error is not None:
            raise watched.error
        if train is not None and not own_mode:
            back = watched.network.training
            yield _part("mode after the test", [] if back else ["mode not put back"])
        mode = any(seen.training for seen in watched.seen)
        yield _part("test: mode", ["no eval()"] if mode else [])
        recorded = any(seen.recorded for seen in watched.seen)
        yield _part("test: no gradients", ["gradients recorded in the test"] if recorded else [])
        changed = watched.moved or watched.steps
        yield _part("test: weights", ["weights changed in the test"] if changed else [])
        yield from _returned("test", watched)


def _part(name: str, mistakes: list[str]) -> Part:
    return Part(name, {each: f"{_SENTENCES[each]}." for each in mistakes})


def _steps(watched: _Watched) -> list[str]:
    """The mistakes in the steps of an optimiser."""
    batches = len({seen.begin for seen in watched.seen})
    if not watched.backward:
        return ["no backward"]
    if not watched.steps:
        return [] if watched.moved else ["no step"]  # weights may be moved by hand
    if len(watched.steps) < batches:
        return ["one step for all batches"]
    before = torch.zeros(())
    for step in watched.steps:
        if step.seen is None or step.backward == step.seen.backward:
            return ["step before backward"]
        if step.gradient is None or not step.gradient.any():
            return ["gradients cleared before the step"]
        due = step.seen.due
        found = [name for name, each in due.items() if _along(step.gradient, each)]
        added = [name for name, each in due.items() if _along(step.gradient, each + before)]
        if not found and added:
            return ["no zero_grad", *filter(None, added[:1])]
        if not found:  # another loss may be meant, such as one with smoothed labels
            near = torch.cosine_similarity(step.gradient, due[""], 0) > 0.5
            return [] if near else ["unknown gradients"]
        if found[0]:
            return found[:1]
        before = step.gradient
    return []


def _along(given: Tensor, due: Tensor) -> bool:
    """Whether gradients are the same, or shorter as after clipping; a small penalty may be in."""
    factor = float(given @ due / (due @ due))
    near = (given - factor * due).abs().max() <= 0.02 * (factor * due).abs().max()
    return bool(near) and 0 < factor < 1.02


def _returned(what: str, watched: _Watched) -> Iterator[Part]:
    """Whether all batches are used, and what is returned of them."""
    first = {seen.begin: seen for seen in reversed(watched.seen)}
    every = len(first) == len(_SIZES) or watched.error is not None
    yield _part(f"{what}: every batch", [] if every else ["not every batch"])
    numbers = [*_numbers(watched.result)]
    if numbers and every and first:
        seen = [first[begin] for begin in sorted(first)]
        yield _part(f"{what}: what is returned", _results(numbers, seen, what))


def _numbers(value: object) -> Iterator[float]:
    """The numbers in what was returned; longer lists are histories, and left out."""
    if isinstance(value, Tensor) and value.numel() == 1:
        yield float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield float(value)
    elif is_dataclass(value):
        yield from _numbers(tuple(getattr(value, each.name) for each in fields(value)))
    elif isinstance(value, dict):
        yield from _numbers(tuple(value.values()))
    elif isinstance(value, tuple) or (isinstance(value, list) and len(value) < 3):
        for each in value:
            yield from _numbers(each)


def _results(numbers: list[float], seen: list[_Seen], what: str) -> list[str]:
    """The mistakes that give these numbers."""
    sizes = torch.tensor([float(len(each.labels)) for each in seen])
    right = torch.tensor([float((s.logits.argmax(1) == s.labels).sum()) for s in seen])
    table = []
    for name, loss in _LOSSES.items():
        if name != "loss summed over the batch":
            means = torch.stack([loss(each.logits, each.labels) for each in seen])
            table += _averages(means, sizes, [name] if name else [])
    for value, names in _averages(right / sizes, sizes, []):
        names = ["accuracy is a count"] if names == ["sum not divided"] else names
        table += [(value, names), (100 * value, [*names, "accuracy in percent"])]
    counted = any(abs(each - float(sizes.sum())) < 1e-6 for each in numbers)
    found, known = [], False
    for number in numbers:
        near = [names for value, names in table if abs(value - number) <= 1e-4 * abs(value)]
        best = min(near, key=len, default=None)
        known |= best is not None
        excused = counted and best in (["accuracy is a count"], ["sum not divided"])
        found += [] if best is None or excused else best
    return found if known or what == "training" else ["unknown result"]


def _averages(means: Tensor, sizes: Tensor, names: list[str]) -> list[tuple[float, list[str]]]:
    """What right and wrong ways to average the batches' means give, with their mistakes."""
    sums, batches, images = means * sizes, len(means), sizes.sum()
    ways = (
        (sums.sum() / images, []),
        (means.mean(), ["short last batch counted too much"]),
        (sums.sum() / (batches * sizes.max()), ["short last batch counted as a whole one"]),
        (sums.sum() / batches, ["sum divided by the number of batches"]),
        (means.sum() / images, ["batch means divided by the number of images"]),
        (means[-1], ["last batch only"]),
        (sums.sum(), ["sum not divided"]),
        (means.sum(), ["sum not divided"]),
    )
    return [(float(value), [*names, *more]) for value, more in ways]
