"""Correct loops and penalties pass, and wrong ones hear the name of their mistake."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab as nl

pytestmark = pytest.mark.usefixtures("enough_time")


RIGHT, WRONG = [], []


def right(part):
    return lambda function: RIGHT.append((part, function)) or function


def wrong(part, *names):
    return lambda function: WRONG.append((part, names, function)) or function


right("train")(nl.train_epoch)
right("test")(nl.test_epoch)


# --- correct loops ----------------------------------------------------------------------------


@right("train")
def train_of_the_examples(model, device, train_loader, optimizer, epoch):
    model.train()
    for _, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = F.log_softmax(model(data), dim=1)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()


@right("train")
def train_clears_at_the_end(net, loader, criterion, optimizer):
    net.train()
    total = correct = seen = 0
    for images, labels in loader:
        outputs = net(images)
        loss = criterion(outputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        net.zero_grad()
        total += loss.item() * len(labels)
        correct += (outputs.argmax(1) == labels).sum().item()
        seen += len(labels)
    return {"loss": total / seen, "accuracy": correct / seen}


@right("train")
def train_own_optimizer(network, batches, lr=0.01):
    network.train(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    losses = []
    for x, y in batches:
        loss = nn.CrossEntropyLoss()(network(x), y)
        loss = loss + 1e-5 * nl.l1_penalty(network)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@right("train")
def train_by_hand(net, train_iter, loss, updater):
    net.train()
    metric = [0.0, 0.0, 0]
    for X, y in train_iter:
        y_hat = net(X)
        l = loss(y_hat, y)  # noqa: E741
        updater.zero_grad()
        l.mean().backward()
        updater.step()
        metric[0] += float(l.detach()) * len(y)
        metric[1] += float((y_hat.argmax(axis=1) == y).sum())
        metric[2] += y.numel()
    return metric[0] / metric[2], metric[1] / metric[2]


@right("train")
def train_smoothed_with_a_schedule(model, loader, optimizer, scheduler):
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x.flatten(1)), y).backward()
        optimizer.step()
        scheduler.step()


@right("train")
def fit_and_test(model, train_loader, test_loader, optimizer, epochs):
    for epoch in range(epochs):
        train_of_the_examples(model, "cpu", train_loader, optimizer, epoch)
        measure_of_the_examples(model, "cpu", test_loader)


@right("test")
def measure_of_the_examples(model, device, test_loader):
    model.eval()
    test_loss = correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data.to(device))
            test_loss += F.cross_entropy(output, target, reduction="sum").item()
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    test_loss /= len(test_loader.dataset)
    return test_loss, correct / len(test_loader.dataset)


@right("test")
@torch.inference_mode()
def measure_counts(net, loader):
    net.eval()
    correct, total = 0, 0
    for x, y in loader:
        correct += (net(x).max(1)[1] == y).sum()
        total += y.size(0)
    net.train()
    return correct, total


@right("test")
def measure_prints(model, dataloader, loss_fn):
    model.eval()
    with torch.no_grad():
        outputs = [(model(x), y) for x, y in dataloader]
    logits, labels = (torch.cat(each) for each in zip(*outputs, strict=True))
    print(loss_fn(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item())


# --- wrong ones -------------------------------------------------------------------------------


def trained(net, loader, optimizer, before=(), after=(), loss=F.cross_entropy):
    """A loop with the orders given around `backward`: for short variants of it."""
    calls = {"zero": optimizer.zero_grad, "step": optimizer.step}
    for x, y in loader:
        value = loss(net(x), y)
        for each in before:
            calls[each]()
        value.backward()
        for each in after:
            calls[each]()


@wrong("train", "no train()")
def no_train(net, loader, optimizer):
    trained(net, loader, optimizer, ["zero"], ["step"])


@wrong("train", "no zero_grad")
def no_zero_grad(model, train_loader, optimizer):
    model.train()
    for x, y in train_loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@wrong("train", "step before backward")
def step_first(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, ["step", "zero"], [])


@wrong("train", "step before backward")
def step_of_old_gradients(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, ["zero", "step"], [])


@wrong("train", "gradients cleared before the step")
def cleared(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, [], ["zero", "step"])


@wrong("train", "no step")
def no_step(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, ["zero"], [])


@wrong("train", "no backward")
def no_backward(net, loader, optimizer):
    net.train()
    for x, _ in loader:
        optimizer.zero_grad()
        net(x)
        optimizer.step()


@wrong("train", "one step for all batches")
def step_outside(net, loader, optimizer):
    net.train()
    optimizer.zero_grad()
    for x, y in loader:
        F.cross_entropy(net(x), y).backward()
    optimizer.step()


@wrong("train", "not every batch")
def returns_early(net, loader, optimizer):
    net.train()
    for x, y in loader:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


@wrong("train", "softmax before cross-entropy")
def softmax_first(net, loader, optimizer, criterion):
    net.train()
    trained(net, loader, optimizer, ["zero"], ["step"], lambda z, y: criterion(z.softmax(1), y))


@wrong("train", "softmax without logarithm")
def nll_of_softmax(net, loader, optimizer):
    net.train()
    loss = lambda z, y: F.nll_loss(F.softmax(z, 1), y)  # noqa: E731
    trained(net, loader, optimizer, ["zero"], ["step"], loss)


@wrong("train", "log-softmax missing")
def nll_of_logits(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, ["zero"], ["step"], F.nll_loss)


@wrong("train", "loss summed over the batch")
def summed(net, loader, optimizer):
    net.train()
    loss = nn.CrossEntropyLoss(reduction="sum")
    trained(net, loader, optimizer, ["zero"], ["step"], loss)


@wrong("train", "short last batch counted too much")
def mean_of_means(net, loader, optimizer):
    net.train()
    total = 0.0
    for x, y in loader:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@wrong("train", "accuracy in percent", "batch means divided by the number of images")
def percent(net, loader, optimizer):
    net.train()
    total = correct = 0.0
    for x, y in loader:
        out = net(x)
        loss = F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        correct += (out.argmax(1) == y).sum().item()
    return total / len(loader.dataset), 100.0 * correct / len(loader.dataset)


@wrong("train", "unknown gradients")
def uphill(net, loader, optimizer):
    net.train()
    trained(net, loader, optimizer, ["zero"], ["step"], lambda z, y: -F.cross_entropy(z, y))


@wrong("train", "error")
def raises(net, loader, optimizer):
    net.train()
    for x, y in loader:
        F.cross_entropy(net(x), y.float().unsqueeze(1)).backward()


@wrong("test", "no eval()")
def no_eval(net, loader):
    with torch.no_grad():
        return sum((net(x).argmax(1) == y).sum().item() for x, y in loader) / len(loader.dataset)


@wrong("test", "gradients recorded in the test")
def with_gradients(net, loader):
    net.eval()
    return sum((net(x).argmax(1) == y).sum().item() for x, y in loader) / len(loader.dataset)


def measured(net, loader, summary, each=lambda logits, y: (logits.argmax(1) == y).sum().item()):
    net.eval()
    with torch.no_grad():
        return summary([each(net(x), y) for x, y in loader], loader)


@wrong("test", "sum divided by the number of batches")
def correct_by_batches(net, loader):
    return measured(net, loader, lambda found, loader: sum(found) / len(loader))


@wrong("test", "accuracy is a count")
def correct_count(net, loader):
    return measured(net, loader, lambda found, loader: sum(found))


@wrong("test", "short last batch counted as a whole one")
def times_batch_size(net, loader):
    whole = lambda found, loader: sum(found) / (len(loader) * loader.batch_size)  # noqa: E731
    return measured(net, loader, whole)


@wrong("test", "short last batch counted too much", "accuracy in percent")
def mean_accuracy(net, loader):
    mean = lambda found, loader: 100 * torch.stack(found).mean()  # noqa: E731
    return measured(net, loader, mean, lambda z, y: (z.argmax(1) == y).float().mean())


@wrong("test", "last batch only")
def last_batch(net, loader):
    last = lambda found, loader: found[-1]  # noqa: E731
    return measured(net, loader, last, lambda z, y: (z.argmax(1) == y).float().mean().item())


@wrong("test", "softmax before cross-entropy")
def loss_of_softmax(net, loader):
    mean = lambda found, loader: sum(found) / len(loader.dataset)  # noqa: E731
    loss = lambda z, y: F.cross_entropy(z.softmax(1), y, reduction="sum").item()  # noqa: E731
    return measured(net, loader, mean, loss)


@wrong("test", "weights changed in the test", "gradients recorded in the test")
def trains_in_the_test(net, loader):
    net.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in loader:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


@wrong("test", "unknown result")
def nonsense(net, loader):
    return measured(net, loader, lambda found, loader: 12345.678)


# --- penalties --------------------------------------------------------------------------------

right("penalty")(nl.l1_penalty)


@right("penalty")
def by_layers(model):
    return sum(
        m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    )


@right("penalty")
def by_dimensions(net, lambda_l1):
    total = 0
    for p in net.parameters():
        if p.dim() > 1:
            total = total + p.abs().sum()
    return lambda_l1 * total


@right("penalty")
def of_parameters(params, lam=1e-3):
    return lam * torch.cat([p.flatten() for p in params if p.ndim in (2, 4)]).norm(1)


@right("penalty")
def factor_inside(network):
    l1 = torch.tensor(0.0)
    for layer in network.children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            l1 += torch.norm(layer.weight, p=1)
    return 5e-4 * l1


@right("penalty")
def positional(a, b):
    return b * sum((w * w.sign()).sum() for n, w in a.named_parameters() if w.dim() >= 2)


@right("penalty")
def loss_function(m, factor):
    zero = nn.L1Loss(reduction="sum")
    return factor * sum(zero(w, torch.zeros_like(w)) for w in m.parameters() if len(w.shape) > 1)


class Penalty(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, model):
        return self.factor * nl.l1_penalty(model)


right("penalty")(Penalty(0.01))


@wrong("penalty", "biases and norm scales counted")
def all_parameters(model, l1):
    return l1 * sum(p.abs().sum() for p in model.parameters())


@wrong("penalty", "norm scales counted")
def by_name(model):
    return sum(p.abs().sum() for name, p in model.named_parameters() if "weight" in name)


@wrong("penalty", "biases counted")
def with_biases(model):
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(m.weight.abs().sum() + m.bias.abs().sum() for m in layers)


@wrong("penalty", "linear layers missing")
def convolutions(model):
    return sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.Conv2d))


@wrong("penalty", "mean instead of sum")
def means(model, lam):
    return lam * sum(p.abs().mean() for p in model.parameters() if p.dim() > 1)


@wrong("penalty", "squares")
def squares(model):
    return 0.5 * sum((p**2).sum() for p in model.parameters() if p.dim() > 1)


@wrong("penalty", "root of squares", "biases and norm scales counted")
def default_norm(model, lambda1):
    return lambda1 * sum(torch.norm(p) for p in model.parameters())


@wrong("penalty", "no absolute value")
def cancelling(model):
    return sum(p.sum() for p in model.parameters() if p.dim() > 1)


@wrong("penalty", "data's loss included")
def with_loss(loss, model, lam):
    return loss + lam * nl.l1_penalty(model)


@wrong("penalty", "detached")
def item(model):
    return sum(p.abs().sum().item() for p in model.parameters() if p.dim() > 1)


@wrong("penalty", "detached")
def data(model, alpha):
    return alpha * sum(p.data.abs().sum() for p in model.parameters() if p.dim() > 1)


@wrong("penalty", "detached", "biases and norm scales counted")
def numpy(model):
    return sum(np.abs(p.detach().numpy()).sum() for p in model.parameters())


@wrong("penalty", "factor")
def unused_factor(model, factor):
    return nl.l1_penalty(model)


@wrong("penalty", "first layer only")
def returned_in_loop(model):
    total = 0
    for p in model.parameters():
        if p.dim() > 1:
            total += p.abs().sum()
            return total


@wrong("penalty", "last layer only")
def assigned_in_loop(model):
    for p in model.parameters():
        if p.dim() > 1:
            total = p.abs().sum()
    return total


@wrong("penalty", "weights changed")
def in_place(model):
    for p in model.parameters():
        p.data.abs_()
    return nl.l1_penalty(model)


@wrong("penalty", "error")
def no_number(model):
    return [p.abs() for p in model.parameters()]


@wrong("penalty", "error")
def typo(model):
    return sum(p.absolute_value() for p in model.parameters())


@wrong("penalty", "unknown")
def logarithm(model):
    return torch.log(1 + nl.l1_penalty(model))


# --- what is said of them ---------------------------------------------------------------------


def check(part, function):
    return nl.check_penalty(function) if part == "penalty" else nl.check_loop(**{part: function})


def test_correct_ones_pass():
    results = [(function, check(part, function)) for part, function in RIGHT]
    assert [(function, result) for function, result in results if not result] == []


def test_every_mistake_is_named():
    unnamed = []
    for part, names, function in WRONG:
        result = check(part, function)
        if result or {*result.mistakes} != {*names}:
            unnamed.append((function, names, result))
    assert unnamed == []


def test_the_mode_may_be_set_by_either_function():
    assert nl.check_loop(train_of_the_examples, measure_of_the_examples)
    assert nl.check_loop(no_train, measure_counts)
    result = nl.check_loop(no_train, measure_of_the_examples)
    assert [*result.mistakes] == ["mode not put back"]


def test_one_function_is_needed():
    with pytest.raises(TypeError, match="check_loop needs train="):
        nl.check_loop()
