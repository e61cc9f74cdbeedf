"""Correct penalties pass, and wrong ones hear the name of their mistake."""

import numpy as np
import pytest
import torch
from torch import nn

import normlab as nl
from normlab.lessons import checking


@pytest.fixture(autouse=True)
def enough_time(monkeypatch):
    """No test depends on how fast the machine is."""
    monkeypatch.setattr(checking, "SECONDS", 60)


RIGHT, WRONG = [nl.l1_penalty], []


def right(function):
    RIGHT.append(function)
    return function


def wrong(*names):
    return lambda function: WRONG.append((names, function)) or function


@right
def by_layers(model):
    return sum(
        m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    )


@right
def by_dimensions(net, lambda_l1):
    total = 0
    for p in net.parameters():
        if p.dim() > 1:
            total = total + p.abs().sum()
    return lambda_l1 * total


@right
def of_parameters(params, lam=1e-3):
    return lam * torch.cat([p.flatten() for p in params if p.ndim in (2, 4)]).norm(1)


@right
def factor_inside(network):
    l1 = torch.tensor(0.0)
    for layer in network.children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            l1 += torch.norm(layer.weight, p=1)
    return 5e-4 * l1


@right
def positional(a, b):
    return b * sum((w * w.sign()).sum() for n, w in a.named_parameters() if w.dim() >= 2)


@right
def loss_function(m, factor):
    zero = nn.L1Loss(reduction="sum")
    return factor * sum(zero(w, torch.zeros_like(w)) for w in m.parameters() if len(w.shape) > 1)


class Penalty(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, model):
        return self.factor * nl.l1_penalty(model)


RIGHT.append(Penalty(0.01))


@wrong("biases and norm scales counted")
def all_parameters(model, l1):
    return l1 * sum(p.abs().sum() for p in model.parameters())


@wrong("norm scales counted")
def by_name(model):
    return sum(p.abs().sum() for name, p in model.named_parameters() if "weight" in name)


@wrong("biases counted")
def with_biases(model):
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(m.weight.abs().sum() + m.bias.abs().sum() for m in layers)


@wrong("linear layers missing")
def convolutions(model):
    return sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.Conv2d))


@wrong("mean instead of sum")
def means(model, lam):
    return lam * sum(p.abs().mean() for p in model.parameters() if p.dim() > 1)


@wrong("squares")
def squares(model):
    return 0.5 * sum((p**2).sum() for p in model.parameters() if p.dim() > 1)


@wrong("root of squares", "biases and norm scales counted")
def default_norm(model, lambda1):
    return lambda1 * sum(torch.norm(p) for p in model.parameters())


@wrong("no absolute value")
def cancelling(model):
    return sum(p.sum() for p in model.parameters() if p.dim() > 1)


@wrong("data's loss included")
def with_loss(loss, model, lam):
    return loss + lam * nl.l1_penalty(model)


@wrong("detached")
def item(model):
    return sum(p.abs().sum().item() for p in model.parameters() if p.dim() > 1)


@wrong("detached")
def data(model, alpha):
    return alpha * sum(p.data.abs().sum() for p in model.parameters() if p.dim() > 1)


@wrong("detached", "biases and norm scales counted")
def numpy(model):
    return sum(np.abs(p.detach().numpy()).sum() for p in model.parameters())


@wrong("factor")
def unused_factor(model, factor):
    return nl.l1_penalty(model)


@wrong("first layer only")
def returned_in_loop(model):
    total = 0
    for p in model.parameters():
        if p.dim() > 1:
            total += p.abs().sum()
            return total


@wrong("last layer only")
def assigned_in_loop(model):
    for p in model.parameters():
        if p.dim() > 1:
            total = p.abs().sum()
    return total


@wrong("weights changed")
def in_place(model):
    for p in model.parameters():
        p.data.abs_()
    return nl.l1_penalty(model)


@wrong("error")
def no_number(model):
    return [p.abs() for p in model.parameters()]


@wrong("error")
def typo(model):
    return sum(p.absolute_value() for p in model.parameters())


@wrong("unknown")
def logarithm(model):
    return torch.log(1 + nl.l1_penalty(model))


@pytest.mark.parametrize("function", RIGHT, ids=lambda function: getattr(function, "__name__", ""))
def test_correct_penalties_pass(function):
    result = nl.check_penalty(function)
    assert result, str(result)


@pytest.mark.parametrize(("names", "function"), WRONG, ids=lambda v: getattr(v, "__name__", ""))
def test_a_mistake_is_named(names, function):
    result = nl.check_penalty(function)
    assert {*result.mistakes} == {*names}, str(result)
    assert not result
