"""`check_penalty`: whether a student's L1 penalty is right, and which mistakes it has if not."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from normlab.lessons.checking import Checked, Failed, Part, attempt, bound, checked, roles_by
from normlab.lessons.student_code import as_numbers
from normlab.penalties import l1_penalty, penalised_weights
from normlab.support.seeding import seeded

_role_of = roles_by(
    {
        "network": "model|net|network|module|m",
        "parameters": "params?|parameters|weights|ws?",
        "named": "namedparam(eter)?s",
        "loss": "loss|dataloss|cost|crossentropy|celoss",
        "factor": "l|lambda|lam|lambd|lmbda|lmbd|lambda(l|_)?|factor|strength|alpha|coeff?(icient)?"
        "|λ|regularization|reg|weightdecay|llambda|lambdal|lfactor|penalty",
    }
)
_FACTOR, _LOSS = 0.3, 2.5

# What is summed over: the right one first.
_CHOSEN: dict[str, tuple[str, Callable[[nn.Module], list[Tensor]]]] = {
    "": ("", penalised_weights),
    "biases and norm scales counted": (
        "biases, and scales and shifts of norms, are counted, too",
        lambda net: [*net.parameters()],
    ),
    "biases counted": (
        "the biases of convolutions and linear layers are counted, too",
        lambda net: [p for layer in net if not _is_norm(layer) for p in layer.parameters()],
    ),
    "norm scales counted": (
        "the scales of norms are counted, too: they are called weight like the others",
        lambda net: [layer.weight for layer in net if hasattr(layer, "weight")],
    ),
    "biases only": (
        "the biases are counted instead of the weights",
        lambda net: [layer.bias for layer in net if hasattr(layer, "bias")],
    ),
    "linear layers missing": (
        "only convolutions are counted",
        lambda net: [p for p in penalised_weights(net) if p.dim() == 4],
    ),
    "convolutions missing": (
        "only linear layers are counted",
        lambda net: [p for p in penalised_weights(net) if p.dim() == 2],
    ),
    "first layer only": (
        "only the first layer is counted: does `return` stand within the loop?",
        lambda net: penalised_weights(net)[:1],
    ),
    "last layer only": (
        "only the last layer is counted: is the sum set to zero, or assigned, within the loop?",
        lambda net: penalised_weights(net)[-1:],
    ),
    "last parameter only": (
        "only the last parameter is counted: is the sum assigned within the loop?",
        lambda net: [*net.parameters()][-1:],
    ),
}
# How it is summed: the right one first.
_SUMMED: dict[str, tuple[str, Callable[[list[Tensor]], Tensor]]] = {
    "": ("", lambda weights: sum(w.abs().sum() for w in weights)),
    "mean instead of sum": (
        "the mean of |w| of each layer is taken instead of the sum",
        lambda weights: sum(w.abs().mean() for w in weights),
    ),
    "mean of all instead of sum": (
        "the mean of all |w| is taken instead of the sum",
        lambda weights: torch.cat([w.abs().flatten() for w in weights]).mean(),
    ),
    "squares": (
        "squares are summed, which is L2 (weight decay)",
        lambda weights: sum(w.square().sum() for w in weights),
    ),
    "root of squares": (
        "the root of the sum of squares is taken for each layer, which is its L2 norm",
        lambda weights: sum(w.norm() for w in weights),
    ),
    "root of all squares": (
        "the root of the sum of all squares is taken, which is the L2 norm",
        lambda weights: torch.cat([w.flatten() for w in weights]).norm(),
    ),
    "mean of squares": (
        "the mean of squares is taken",
        lambda weights: sum(w.square().mean() for w in weights),
    ),
    "no absolute value": (
        "the weights are summed without their absolute value, so that they cancel",
        lambda weights: sum(w.sum() for w in weights),
    ),
    "absolute value of the sum": (
        "the absolute value is taken of each layer's sum instead of each weight",
        lambda weights: sum(w.sum().abs() for w in weights),
    ),
    "largest weight": (
        "the largest |w| of each layer is taken instead of the sum",
        lambda weights: sum(w.abs().max() for w in weights),
    ),
}


def _sum(chosen: str, summed: str, network: nn.Module, factor: float) -> Tensor:
    return factor * _SUMMED[summed][1](_CHOSEN[chosen][1](network))


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d)


def check_penalty(candidate: Callable) -> Checked:
    """Whether an L1 penalty is right: the sum of |w| over convolution and linear layers.

    Args:
        candidate: a function of a network (or of its parameters) and, where it takes one, of the
            factor, by their usual names or in this order. It returns the penalty alone, as a
            tensor that is differentiable. A factor may also be written inside.

    The result is as that of `check_norm`.
    """
    return checked("L1 penalty", _parts(candidate))


def _networks() -> list[nn.Sequential]:
    """Two of other sizes, so that a mean differs from a sum by no fixed factor."""
    with seeded(3):
        made = [
            nn.Sequential(
                *(nn.Conv2d(1, c, 3), nn.BatchNorm2d(c), nn.Conv2d(c, 4, 1), nn.Flatten()),
                *(nn.Linear(4, c + 1), nn.Linear(c + 1, 3)),
            )
            for c in (2, 7)
        ]
        for network in made:
            for parameter in network.parameters():
                nn.init.normal_(parameter, 0.3)
    return made


def _called(candidate: Callable, network: nn.Module) -> object:
    values = {
        **{"network": network, "parameters": [*network.parameters()], "factor": _FACTOR},
        **{"named": [*network.named_parameters()], "loss": torch.tensor(_LOSS)},
    }
    arguments = bound(candidate, values, _role_of, ("network", "factor"))
    return attempt(candidate, *arguments.args, **arguments.kwargs)


def _takes(candidate: Callable, role: str) -> bool:
    """Whether an argument of this role is given to the function."""
    values = dict.fromkeys(("network", "parameters", "named", "loss", "factor"), "")
    values[role] = role
    return role in bound(candidate, values, _role_of, ("network", "factor")).arguments.values()


def _parts(candidate: Callable) -> Iterator[Part]:
    networks = _networks()
    before = [[p.detach().clone() for p in network.parameters()] for network in networks]
    given = [_called(candidate, network) for network in networks]
    values = [as_numbers(each) for each in given]
    if any(value is None or value.numel() != 1 for value in values):
        raise Failed(f"the penalty must be one number, not {given[0]!r:.60}")
    numbers = torch.cat([value.flatten() for value in values])
    mistakes, due = _value(numbers, networks, _takes(candidate, "factor"))
    yield Part("value", mistakes)
    yield Part("gradients", _gradients(given, due, networks))
    same = all(
        torch.equal(p, old)
        for network, olds in zip(networks, before, strict=True)
        for p, old in zip(network.parameters(), olds, strict=True)
    )
    text = "the weights of the network are changed by the call; a penalty only reads them"
    yield Part("weights unchanged", {} if same else {"weights changed": text})


def _value(
    numbers: Tensor, networks: list[nn.Module], takes_factor: bool
) -> tuple[dict[str, str], Callable | None]:
    """The mistakes in a penalty of these values, and the sum that they follow."""
    for loss, chosen, summed in product((0.0, _LOSS), _CHOSEN, _SUMMED):
        due = partial(_sum, chosen, summed)
        values = torch.stack([due(network, 1.0).detach().double() for network in networks])
        first, second = ((numbers - loss) / values).tolist()
        if abs(first - second) > 1e-4 * abs(first) or abs(first) < 1e-12:
            continue
        found = {name: texts[name][0] for name, texts in ((chosen, _CHOSEN), (summed, _SUMMED))}
        found.pop("", None)
        right = "the penalty is the sum of |w| over the weights of convolutions and linear layers"
        example = f"{float(l1_penalty(networks[0]).detach()):.3g} for a small network"
        found = {
            name: f"{text}; {right}. It gives {float(values[0]):.3g} where {example} is right."
            for name, text in found.items()
        }
        if loss:
            found["data's loss included"] = "the data's loss is included; return the penalty alone"
        if takes_factor and abs(first - _FACTOR) > 1e-3:
            text = f"the penalty is {first:.3g} times the sum where the factor is {_FACTOR}"
            found["factor"] = text
        return found, partial(due, factor=first)
    due = float(l1_penalty(networks[0]).detach())
    text = f"the penalty is {float(numbers[0]):.3g} where {due:.3g} is right (times its factor)"
    return {"unknown": f"{text}, by none of the usual mistakes"}, None


def _gradients(given: list, due: Callable | None, networks: list[nn.Module]) -> dict[str, str]:
    """Whether the penalty can be minimised."""
    if not (isinstance(given[0], Tensor) and given[0].requires_grad):
        text = "the penalty has no gradient (.item(), .data, detach or no_grad): it is a number, "
        return {"detached": text + "which training cannot lower"}
    if due is None:
        return {"unknown": "the penalty is wrong, and so are its gradients"}
    weights = [*networks[0].parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    found = attempt(torch.autograd.grad, given[0].sum(), weights, **options)
    expected = torch.autograd.grad(due(networks[0]), weights, **options)
    if all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True)
    ):
        return {}
    return {"detached": "parts of the penalty have no gradient: some of it is detached"}
