"""`check_loop` and `check_penalty`: whether a student's loops and L1 penalty are right.

A small network is watched while a loop runs: in which mode it is, and which gradients a step takes.
What is returned is compared with what the usual mistakes would return.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from normlab.lessons import checking
from normlab.lessons.checking import Failed, Mistakes, explanations, places, said
from normlab.penalties import l1_penalty, penalised_weights
from normlab.support.seeding import seeded

# --- loops --------------------------------------------------------------------------------------

_SIZES = (4, 4, 2)  # of the batches: the last one is short
_WRONG = (0, 1, 1, 1, 0, 0, 1, 1, 0, 1)  # the images that are predicted wrongly
_RATE = 1e-3

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of logits and labels
    "": F.cross_entropy,
    "softmax before cross-entropy": lambda z, y: F.cross_entropy(z.softmax(1), y),
    "softmax without logarithm": lambda z, y: F.nll_loss(z.softmax(1), y),
    "log-softmax missing": F.nll_loss,
    "squared error": lambda z, y: F.mse_loss(z.softmax(1), F.one_hot(y, z.shape[1]).float()),
    "loss summed over the batch": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
}
# How the means m of batches of n images become one number.
_AVERAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda m, n: (m @ n) / n.sum(),
    "short last batch counted too much": lambda m, n: m.mean(),
    "short last batch counted as a whole one": lambda m, n: (m @ n) / (len(m) * n.max()),
    "sum divided by the number of batches": lambda m, n: (m @ n) / len(m),
    "batch means divided by the number of images": lambda m, n: m.sum() / n.sum(),
    "last batch only": lambda m, n: m[-1],
    "sum not divided": lambda m, n: m @ n,
    "batch means not divided": lambda m, n: m.sum(),
}


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


_REPORTED = (  # a loss, or an accuracy
    places(measure=_LOSSES, average=_AVERAGES, unit={"": 1}),
    places(measure={"": _accuracy}, average=_AVERAGES, unit={"": 1, "accuracy in percent": 100}),
)


@dataclass
class _Batch:
    """What was seen of one batch, which begins with that image; logits are before the step."""

    begin: int
    labels: Tensor
    logits: Tensor
    training: bool  # whether all layers were in training mode
    recorded: bool  # whether gradients were
    due: dict[str, Tensor]  # the gradient of each of _LOSSES
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
        self.steps: list[tuple[_Batch | None, Tensor | None]] = []  # after which, the gradient
        self.error: Failed | None = None

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
        losses = _LOSSES if logits.requires_grad else {}
        grad = torch.autograd.grad
        due = {
            name: _flat(grad(loss(logits, labels), self.parameters, retain_graph=True))
            for name, loss in losses.items()
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
        after = self.batches[-1] if self.batches and self.batches[-1].backward else None
        self.steps.append((after, whole))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
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
    words = ["training"] * (train is not None) + ["test"] * (test is not None)
    return checking.checked(f"{' and '.join(words)} loop", _loop_parts(train, test))


def _loop_parts(train: Callable | None, test: Callable | None) -> Iterator[tuple[str, Mistakes]]:
    own_mode = True
    if train is not None:
        watched = _Watched(training=False).run(train)
        own_mode = all(batch.training for batch in watched.batches if batch.recorded)
        if test is None:
            yield "training: mode", said("no train()", when=not own_mode)
        steps = _steps(watched)
        if watched.error is not None and steps != ["step before backward"]:
            raise watched.error
        yield "training: steps", said(*steps)
        yield from _returned("training", watched)
    if test is not None:
        watched = _Watched(training=True).run(test)
        if watched.error is not None:
            raise watched.error
        if not own_mode:
            put_back = watched.network.training
            yield "mode after the test", said("mode not put back", when=not put_back)
        training = any(batch.training for batch in watched.batches)
        yield "test: mode", said("no eval()", when=training)
        recorded = any(batch.recorded for batch in watched.batches)
        yield "test: no gradients", said("gradients recorded in the test", when=recorded)
        changed = watched.moved or watched.steps
        yield "test: weights", said("weights changed in the test", when=changed)
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
    for batch, gradient in watched.steps:
        if batch is None:
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


def _returned(what: str, watched: _Watched) -> Iterator[tuple[str, Mistakes]]:
    """Whether all batches are used, and what is returned of them."""
    first = {batch.begin: batch for batch in reversed(watched.batches)}
    every = len(first) == len(_SIZES) or watched.error is not None
    yield f"{what}: every batch", said("not every batch", when=not every)
    numbers = [] if watched.error else [*_numbers(watched.result)]
    if numbers and every and first:
        batches = [first[begin] for begin in sorted(first)]
        yield f"{what}: what is returned", said(*_results(numbers, batches, what))


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
    sizes = torch.tensor([float(len(each.labels)) for each in batches])
    table = []
    for at, wrong in (row for each in _REPORTED for row in explanations(each)):
        means = torch.stack([at["measure"](each.logits, each.labels) for each in batches])
        number = at["unit"] * float(at["average"](means, sizes))
        table.append((number, at["measure"], [each.name for each in wrong.values()]))
    table.sort(key=lambda row: len(row[-1]))  # few mistakes first
    counted = any(abs(number - sum(_SIZES)) < 1e-6 for number in numbers)
    found, known = [], False
    for number in numbers:
        near = [row for row in table if abs(row[0] - number) <= 1e-4 * abs(row[0])]
        known |= bool(near)
        _, measure, names = near[0] if near else (0, None, [])
        if names == ["sum not divided"]:
            names = [] if counted else ["accuracy is a count"] if measure is _accuracy else names
        found += names
    return found if known or what == "training" else ["unknown result"]


# --- the L1 penalty ----------------------------------------------------------------------------

_FACTOR, _LOSS = 0.3, 2.5


def _of_layers(network: nn.Module) -> list[Tensor]:
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def _named(text: str) -> Callable[[nn.Module], list[Tensor]]:
    return lambda net: [p for name, p in net.named_parameters() if text in name]


_PENALTIES = places(
    counted={
        "": penalised_weights,
        "biases and norm scales counted": lambda net: [*net.parameters()],
        "biases counted": _of_layers,
        "norm scales counted": _named("weight"),
        "biases only": _named("bias"),
        "linear layers missing": lambda net: [p for p in net.parameters() if p.dim() == 4],
        "convolutions missing": lambda net: [p for p in net.parameters() if p.dim() == 2],
        "first layer only": lambda net: penalised_weights(net)[:1],
        "last layer only": lambda net: penalised_weights(net)[-1:],
        "last parameter only": lambda net: [*net.parameters()][-1:],
    },
    summed={
        "": lambda ws: sum(w.abs().sum() for w in ws),
        "mean instead of sum": lambda ws: sum(w.abs().mean() for w in ws),
        "mean of all instead of sum": lambda ws: torch.cat([*map(torch.flatten, ws)]).abs().mean(),
        "squares": lambda ws: sum(w.square().sum() for w in ws),
        "root of squares": lambda ws: sum(w.norm() for w in ws),
        "root of all squares": lambda ws: torch.stack([w.norm() for w in ws]).norm(),
        "mean of squares": lambda ws: sum(w.square().mean() for w in ws),
        "no absolute value": lambda ws: sum(w.sum() for w in ws),
        "absolute value of the sum": lambda ws: sum(w.sum().abs() for w in ws),
        "largest weight": lambda ws: sum(w.abs().max() for w in ws),
    },
    added={"": 0.0, "data's loss included": _LOSS},
)


def check_penalty(candidate: Callable) -> checking.Checked:
    """Whether an L1 penalty is right: the sum of |w| over convolution and linear layers.

    Args:
        candidate: a function of a network (or of its parameters) and, where it takes one, of the
            factor, by their usual names or in this order. It returns the penalty alone, as a
            tensor that is differentiable. A factor may also be written inside.

    The result is as that of `check_norm`.
    """
    return checking.checked("L1 penalty", _penalty_parts(candidate))


def _penalty_parts(candidate: Callable) -> Iterator[tuple[str, Mistakes]]:
    networks = [_network(2), _network(7)]  # so that a mean differs from a sum by no fixed factor
    before = [_flat(network.parameters()) for network in networks]
    given = []
    for network in networks:
        values = {
            **{"network": network, "parameters": [*network.parameters()], "factor": _FACTOR},
            **{"named": [*network.named_parameters()], "loss": torch.tensor(_LOSS)},
        }
        roles = checking.roles_of(candidate, values, ("network", "factor"))
        given.append(checking.call(candidate, values, roles))
    numbers = [checking.as_numbers(each) for each in given]
    if any(value is None or value.numel() != 1 for value in numbers):
        raise Failed(f"the penalty must be one number, not {given[0]!r:.60}")
    mistakes, due = _value([*map(float, numbers)], networks, "factor" in roles.values())
    yield "value", mistakes
    yield "gradients", _penalty_gradients(given[0], due, [*networks[0].parameters()])
    after = [_flat(network.parameters()) for network in networks]
    same = all(map(torch.equal, before, after))
    yield "weights unchanged", said("weights changed", when=not same)


def _network(channels: int) -> nn.Sequential:
    layers = (nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 1))
    heads = (nn.Flatten(), nn.Linear(4, channels + 1), nn.Linear(channels + 1, 3))
    network = nn.Sequential(*layers, *heads)
    with seeded(channels):
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.3)
    return network


def _value(
    given: list[float], networks: list[nn.Module], takes_factor: bool
) -> tuple[Mistakes, Tensor | None]:
    """The mistakes in a penalty of these values, and what it should be for the first network."""
    right = l1_penalty(networks[0]).item()
    for at, wrong in explanations(_PENALTIES, 3):
        sums = [at["summed"](at["counted"](network)) for network in networks]
        factors = [(g - at["added"]) / s.item() for g, s in zip(given, sums, strict=True)]
        if abs(factors[0] - factors[1]) > 1e-4 * abs(factors[0]) or abs(factors[0]) < 1e-12:
            continue
        example = f"It gives {sums[0].item() + at['added']:.3g} where {right:.3g} is right"
        found = {each.name: f"{each.sentence}. {example}." for each in wrong.values()}
        if takes_factor and abs(factors[0] - _FACTOR) > 1e-3:
            text = f"the penalty is {factors[0]:.3g} times the sum where the factor is {_FACTOR}"
            found["factor"] = text
        return found, factors[0] * sums[0]
    text = f"the penalty is {given[0]:.3g} where {right:.3g} is right (times its factor)"
    return {"unknown": f"{text}, by none of the usual mistakes"}, None


def _penalty_gradients(given: object, due: Tensor | None, weights: list[Tensor]) -> Mistakes:
    """Whether the penalty can be minimised."""
    if not (isinstance(given, Tensor) and given.requires_grad):
        return said("detached")
    if due is None:
        return {"unknown": "the penalty is wrong, and so are its gradients"}
    options = {"allow_unused": True, "materialize_grads": True}
    found = _flat(checking.attempt(torch.autograd.grad, given.sum(), weights, **options))
    right = _flat(torch.autograd.grad(due, weights, **options))
    return said("detached", when=not torch.allclose(found, right, rtol=1e-3, atol=1e-5))
