"""`check_penalty`: whether a student's L1 penalty is right, and which mistakes it has if not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.lessons import checking
from normlab.penalties import l1_penalty, penalised_weights
from normlab.support.seeding import seeded

_FACTOR, _LOSS = 0.3, 2.5


@dataclass(frozen=True)
class _Penalty:
    """How a penalty without its factor is computed; the defaults are right."""

    counted: Callable[[nn.Module], list[Tensor]] = penalised_weights
    summed: Callable[[list[Tensor]], Tensor] = lambda ws: sum(w.abs().sum() for w in ws)
    loss: float = 0.0  # what is added

    def __call__(self, network: nn.Module) -> Tensor:
        return self.summed(self.counted(network))


def _named(text: str) -> Callable[[nn.Module], list[Tensor]]:
    return lambda net: [p for name, p in net.named_parameters() if text in name]


def _of_dimensions(number: int) -> Callable[[nn.Module], list[Tensor]]:
    return lambda net: [p for p in net.parameters() if p.dim() == number]


def _with_biases(network: nn.Module) -> list[Tensor]:
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [parameter for layer in layers for parameter in layer.parameters()]


_COUNTED = {
    "biases and norm scales counted": (
        "biases, and scales and shifts of norms, are counted, too",
        lambda net: [*net.parameters()],
    ),
    "biases counted": ("the biases of convolutions and linear layers count, too", _with_biases),
    "norm scales counted": ("scales of norms, called weight as others, count", _named("weight")),
    "biases only": ("the biases are counted instead of the weights", _named("bias")),
    "linear layers missing": ("only convolutions are counted", _of_dimensions(4)),
    "convolutions missing": ("only linear layers are counted", _of_dimensions(2)),
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
_SUMMED = {
    "mean instead of sum": (
        "each layer's mean is taken",
        lambda ws: sum(w.abs().mean() for w in ws),
    ),
    "mean of all instead of sum": ("the mean of all is taken", lambda ws: _flat(ws).abs().mean()),
    "squares": ("squares are summed, which is L2", lambda ws: sum(w.square().sum() for w in ws)),
    "root of squares": ("the L2 norm of each layer is taken", lambda ws: sum(w.norm() for w in ws)),
    "root of all squares": ("the L2 norm of all is taken", lambda ws: _flat(ws).norm()),
    "mean of squares": ("squares are averaged", lambda ws: sum(w.square().mean() for w in ws)),
    "no absolute value": ("weights are summed and cancel", lambda ws: sum(w.sum() for w in ws)),
    "absolute value of the sum": (
        "the absolute value is taken of each layer's sum instead of each weight",
        lambda ws: sum(w.sum().abs() for w in ws),
    ),
    "largest weight": ("the largest |w| is taken", lambda ws: sum(w.abs().max() for w in ws)),
}
_MISTAKES = [
    *checking.mistakes_at("counted", _COUNTED),
    *checking.mistakes_at("summed", _SUMMED),
    *checking.mistakes_at("loss", {"data's loss included": ("the data's loss is included", _LOSS)}),
]
_RULE = "the penalty is the sum of |w| over the weights of convolutions and linear layers"


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def check_penalty(candidate: Callable) -> checking.Checked:
    """Whether an L1 penalty is right: the sum of |w| over convolution and linear layers.

    Args:
        candidate: a function of a network (or of its parameters) and, where it takes one, of the
            factor, by their usual names or in this order. It returns the penalty alone, as a
            tensor that is differentiable. A factor may also be written inside.

    The result is as that of `check_norm`.
    """
    return checking.checked("L1 penalty", _parts(candidate))


def _parts(candidate: Callable) -> Iterator[tuple[str, dict[str, str]]]:
    networks = _networks()
    before = [_flat([*network.parameters()]).detach() for network in networks]
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
        raise checking.Failed(f"the penalty must be one number, not {given[0]!r:.60}")
    mistakes, due = _value([*map(float, numbers)], networks, "factor" in roles.values())
    yield "value", mistakes
    yield "gradients", _gradients(given[0], due, [*networks[0].parameters()])
    after = [_flat([*network.parameters()]).detach() for network in networks]
    text = "the weights of the network are changed by the call; a penalty only reads them"
    same = all(map(torch.equal, before, after))
    yield "weights unchanged", {} if same else {"weights changed": text}


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


def _value(
    given: list[float], networks: list[nn.Module], takes_factor: bool
) -> tuple[dict[str, str], Tensor | None]:
    """The mistakes in a penalty of these values, and what it should be for the first network."""
    right = l1_penalty(networks[0]).item()
    for penalty, mistakes in checking.explanations(_Penalty(), _MISTAKES, 3):
        sums = [penalty(network) for network in networks]
        factors = [(g - penalty.loss) / s.item() for g, s in zip(given, sums, strict=True)]
        if abs(factors[0] - factors[1]) > 1e-4 * abs(factors[0]) or abs(factors[0]) < 1e-12:
            continue
        example = f"It gives {sums[0].item():.3g} where {right:.3g} is right for a small network."
        found = {each.name: f"{each.sentence}; {_RULE}. {example}" for each in mistakes}
        if takes_factor and abs(factors[0] - _FACTOR) > 1e-3:
            text = f"the penalty is {factors[0]:.3g} times the sum where the factor is {_FACTOR}"
            found["factor"] = text
        return found, factors[0] * sums[0]
    text = f"the penalty is {given[0]:.3g} where {right:.3g} is right (times its factor)"
    return {"unknown": f"{text}, by none of the usual mistakes"}, None


def _gradients(given: object, due: Tensor | None, weights: list[Tensor]) -> dict[str, str]:
    """Whether the penalty can be minimised."""
    if not (isinstance(given, Tensor) and given.requires_grad):
        text = "the penalty has no gradient (.item(), .data, detach or no_grad): it is a number, "
        return {"detached": text + "which training cannot lower"}
    if due is None:
        return {"unknown": "the penalty is wrong, and so are its gradients"}
    options = {"allow_unused": True, "materialize_grads": True}
    found = _flat(checking.attempt(torch.autograd.grad, given.sum(), weights, **options))
    right = _flat(torch.autograd.grad(due, weights, **options))
    if torch.allclose(found, right, rtol=1e-3, atol=1e-5):
        return {}
    return {"detached": "parts of the penalty have no gradient: some of it is detached"}
