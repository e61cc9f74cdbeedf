"""`train_epoch` and `test_epoch` against plain loops in float64."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import normlab as nl
from normlab import test_epoch, train_epoch, train_step

IMAGES = torch.randn(12, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 1, 2])
BATCHES = list(zip(IMAGES.split(5), LABELS.split(5), strict=True))  # of 5, 5 and 2


def make_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log of the probability of the right class, for every image."""
    return logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]


def plain_loop(network, *, lrs, momentum=0.0, l1=0.0, smoothing=0.0):
    """Trains over `BATCHES` with gradients and updates written out; the sums over the images."""
    weights = list(network.parameters())
    speeds = [torch.zeros_like(weight) for weight in weights]
    loss_sum = right = penalty_sum = 0.0
    for (images, labels), lr in zip(BATCHES, lrs, strict=True):
        logits = network(images)
        losses = cross_entropies(logits, labels)
        uniform = sum(cross_entropies(logits, torch.full_like(labels, k)) for k in range(3)) / 3
        penalty = l1 * torch.stack([network[index].weight.abs().sum() for index in (0, 4)]).sum()
        total = ((1 - smoothing) * losses + smoothing * uniform).mean() + penalty
        gradients = torch.autograd.grad(total, weights)
        with torch.no_grad():
            for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
                speed.mul_(momentum).add_(gradient)
                weight -= lr * speed
        loss_sum += losses.sum().item()
        right += (logits.argmax(1) == labels).sum().item()
        penalty_sum += float(penalty.detach()) * len(labels)
    return loss_sum / 12, right / 12, penalty_sum / 12


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


@pytest.mark.parametrize("loader", [BATCHES, DataLoader(TensorDataset(IMAGES, LABELS), 5)])
@pytest.mark.parametrize(
    ("options", "plain_options"),
    [
        ({}, {}),
        ({"l1": 0.01}, {"l1": 0.01}),
        ({"l1": 0.01, "loss": smoothed}, {"l1": 0.01, "smoothing": 0.2}),
    ],
    ids=["plain", "l1", "l1 and label smoothing"],
)
def test_training_equals_a_plain_loop(options, plain_options, loader):
    network, reference = make_network(), make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    result = train_epoch(network, loader, optimizer, **options)
    loss, accuracy, penalty = plain_loop(reference, lrs=[0.2] * 3, momentum=0.9, **plain_options)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert result.accuracy == pytest.approx(accuracy, rel=1e-12)
    assert result.penalty == pytest.approx(penalty, rel=1e-12)
    assert result.images == 12


def test_a_step_gives_logits_of_before_it_and_its_penalty():
    network, reference = make_network(), make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    logits, penalty = train_step(network, *BATCHES[0], optimizer, l1=0.01)
    before = reference(BATCHES[0][0])
    weights = [reference[index].weight for index in (0, 4)]
    torch.testing.assert_close(logits, before.detach(), rtol=1e-12, atol=1e-12)
    assert not logits.requires_grad
    assert penalty.item() == pytest.approx(0.01 * sum(w.abs().sum().item() for w in weights))
    F.cross_entropy(before, BATCHES[0][1]).backward()
    expected = weights[1] - 0.2 * (weights[1].grad + 0.01 * weights[1].sign())
    torch.testing.assert_close(network[4].weight, expected, rtol=1e-12, atol=1e-12)


def test_in_mixed_precision_weights_logits_and_losses_are_in_float32():
    network = make_network().float()
    batch, seen = (IMAGES.float(), LABELS), []
    network[4].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)

    def loss(logits, labels):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    logits, _ = train_step(network, *batch, optimizer, loss=loss, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16, torch.float32]
    assert {weight.dtype for weight in (logits, *network.parameters())} == {torch.float32}
    train_epoch(network, [batch], optimizer, autocast=torch.bfloat16)
    assert seen[2] == torch.bfloat16


def test_a_scheduler_of_batches_moves_after_every_batch():
    network, reference = make_network(), make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.4)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train_epoch(network, BATCHES, optimizer, scheduler=halving, scheduler_steps="batch")
    plain_loop(reference, lrs=[0.4, 0.2, 0.1])
    torch.testing.assert_close(network[4].weight, reference[4].weight, rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=60), 3),
        (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1), 3),
        (lambda o: lr_scheduler.StepLR(o, 1), 1),
        (lambda o: lr_scheduler.MultiStepLR(o, [1]), 1),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.5), 1),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), 1),
    ],
)
def test_a_scheduler_is_stepped_as_it_counts(make, steps):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = make(optimizer)
    train_epoch(network, BATCHES, optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == steps


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_scheduler_of_plateaus_sees_what_training_gave(mode):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode)
    result = train_epoch(network, BATCHES, optimizer, scheduler=scheduler)
    assert scheduler.best == (result.loss if mode == "min" else result.accuracy)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),  # more than the 3 batches of an epoch
        lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    ],
)
def test_a_scheduler_that_may_count_either_is_asked_about(make):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    weights = network[4].weight.clone()
    scheduler = make(optimizer)
    with pytest.raises(ValueError, match="LR may count batches or epochs: say which by"):
        train_epoch(network, BATCHES, optimizer, scheduler=scheduler)
    assert torch.equal(network[4].weight, weights)
    train_epoch(network, BATCHES, optimizer, scheduler=scheduler, scheduler_steps="epoch")
    assert scheduler.last_epoch == 1


def test_an_optimiser_of_another_network_is_refused():
    network, other = make_network(), make_network()
    with pytest.raises(ValueError, match="holds none of the parameters of this Sequential"):
        train_epoch(network, BATCHES, torch.optim.SGD(other.parameters(), lr=0.1))


def test_parameters_that_the_optimiser_leaves_out_are_named():
    network = make_network()
    optimizer = torch.optim.SGD(network[4].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="leaves out .* of the .* parameters .* '0.weight' first"):
        train_epoch(network, BATCHES, optimizer)
    network[:4].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epoch(network, BATCHES, optimizer)


def test_gradients_from_before_the_epoch_do_not_count():
    network, reference = make_network(), make_network()
    cross_entropies(network(IMAGES), LABELS).sum().backward()
    network[1].reset_running_stats()
    train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.2))
    plain_loop(reference, lrs=[0.2] * 3)
    torch.testing.assert_close(network[0].weight, reference[0].weight, rtol=1e-12, atol=1e-12)


def test_training_is_in_training_mode_whatever_the_mode_before():
    network, reference = make_network().eval(), make_network()
    train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.1))
    plain_loop(reference, lrs=[0.1] * 3)
    torch.testing.assert_close(network[1].running_var, reference[1].running_var)


@pytest.mark.parametrize("loader", [BATCHES, DataLoader(TensorDataset(IMAGES, LABELS), 5)])
def test_testing_counts_every_image_once_in_evaluation_mode(loader):
    network = make_network()
    network(2 * IMAGES + 1)  # so that running and batch statistics differ
    result = test_epoch(network, loader)
    with torch.no_grad():
        logits = network.eval()(IMAGES)
    right = sum(row.index(max(row)) == y for row, y in zip(logits.tolist(), LABELS, strict=True))
    assert result.loss == pytest.approx(cross_entropies(logits, LABELS).mean().item(), rel=1e-12)
    assert result.accuracy == right / 12
    assert result.penalty == 0
    assert result.images == 12


def test_untrained_loss_is_in_nats():
    network = make_network()
    nn.init.zeros_(network[4].weight)
    nn.init.zeros_(network[4].bias)
    assert test_epoch(network, BATCHES).loss == pytest.approx(math.log(3), rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_testing_changes_nothing_in_the_network(training):
    network = make_network().train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    test_epoch(network, BATCHES)
    assert all(layer.training is training for layer in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_testing_keeps_a_layer_that_was_frozen_in_evaluation_mode():
    network = make_network().train()
    network[1].eval()
    test_epoch(network, BATCHES)
    assert [layer.training for layer in network] == [True, False, True, True, True]


def broken_batches():
    yield BATCHES[0]
    raise ConnectionError("the disk is gone")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("batches", "error"),
    [(broken_batches, ConnectionError), (lambda: [(IMAGES[:, :, :3], LABELS)], RuntimeError)],
    ids=["loader fails", "network fails"],
)
def test_mode_is_restored_when_testing_fails(batches, error, training):
    network = make_network().train(training)
    with pytest.raises(error):
        test_epoch(network, batches())
    assert all(layer.training is training for layer in network.modules())


def test_no_batches_are_an_error():
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no batches"):
        train_epoch(network, [], optimizer)
    with pytest.raises(ValueError, match="no batches"):
        test_epoch(network, iter(()))


def test_network_without_parameters_can_be_tested():
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten())
    expected = (network(IMAGES).argmax(1) == LABELS).double().mean().item()
    assert test_epoch(network, BATCHES).accuracy == pytest.approx(expected)


@pytest.mark.parametrize("factor", [-1e-5, float("nan")])
def test_a_factor_of_the_penalty_that_is_none_is_refused_before_the_first_step(factor):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="l1 must be"):
        train_epoch(network, BATCHES, optimizer, l1=factor)
    assert torch.equal(network[0].weight, make_network()[0].weight)


# --- modes -----------------------------------------------------------------------------------


def frozen_network():
    """Its batch normalization is frozen: evaluation mode, and nothing of it to be trained."""
    network = make_network()
    network[1].eval().requires_grad_(False)
    network[1].running_mean.fill_(0.5)
    return network


def test_a_frozen_layer_keeps_mode_and_statistics_in_training():
    network, reference = frozen_network(), frozen_network()
    train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for images, labels in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        optimizer.step()
    assert [layer.training for layer in network] == [True, False, True, True, True]
    assert torch.equal(network[1].running_mean, torch.full((4,), 0.5, dtype=torch.float64))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_what_lies_in_a_frozen_part_is_frozen_too():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
    network = nn.Sequential(body.eval().requires_grad_(False), nn.Flatten(), nn.Linear(64, 3))
    network = network.double()
    train_epoch(network, BATCHES, torch.optim.SGD(network[2].parameters(), lr=0.1))
    assert not any(layer.training for layer in body.modules())
    assert body[1].num_batches_tracked == 0
    assert network.training
    assert network[2].training


def test_statistics_without_parameters_cannot_be_frozen():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False).eval().requires_grad_(False)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm2d\) is in evaluation mode, but"):
        train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.1))
    assert not network[1].running_mean.any()


@pytest.mark.parametrize("half", ["eval", "requires_grad_"])
def test_a_layer_that_is_frozen_by_half_is_trained_in_training_mode(half):
    network = make_network()
    network[1].eval() if half == "eval" else network[1].requires_grad_(False)
    train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.1))
    assert network[1].training
    assert network[1].num_batches_tracked == 3


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_needs_no_gradients_switched_on(off):
    network, reference = make_network(), make_network()
    with off():
        result = train_epoch(network, BATCHES, torch.optim.SGD(network.parameters(), lr=0.1))
        assert not torch.is_grad_enabled()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    assert result.loss == train_epoch(reference, BATCHES, optimizer).loss
    assert torch.equal(network[0].weight, reference[0].weight)


# --- batches and numbers that are none -------------------------------------------------------


def test_what_is_no_number_is_never_right():
    network = make_network()
    broken = [(torch.full_like(IMAGES, torch.nan), torch.zeros_like(LABELS))]
    tested = test_epoch(network, broken)
    trained = train_epoch(network, broken, torch.optim.SGD(network.parameters(), lr=0.1))
    for result in (tested, trained):
        assert math.isnan(result.loss)
        assert result.accuracy == 0


def test_one_image_that_is_no_number_leaves_the_others_right():
    network = make_network().eval()
    guess = network(IMAGES).argmax(1)
    images = IMAGES.clone()
    images[3] = torch.nan
    guess[3] = 0  # what argmax makes of NaN
    assert test_epoch(network, [(images, guess)]).accuracy == 11 / 12


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES, LABELS, LABELS, LABELS), r"must be \(images, labels\), not a tuple of 4"),
        ([IMAGES], r"must be \(images, labels\), not a list of 1"),
        (IMAGES, r"must be \(images, labels\), not a Tensor of 12"),
        ({"image": IMAGES, "label": LABELS}, r"must be \(images, labels\), not a dict of 2"),
        (7, r"must be \(images, labels\), not a int"),
        ((IMAGES.byte(), LABELS), "must be floats, not torch.uint8: images / 255"),
        ((IMAGES.permute(0, 2, 3, 1), LABELS), r"\(12, 6, 6, 1\) with the channels last"),
        ((IMAGES, LABELS.tolist()), "must be a Tensor, not "),
        ((IMAGES, LABELS.float()), r"int64 of shape \(12,\), .* not torch.float32 of shape"),
        ((IMAGES, F.one_hot(LABELS)), r"int64 of shape \(12,\), .* of shape \(12, 3\)"),
        ((IMAGES, LABELS[:5]), r"int64 of shape \(12,\), .* of shape \(5,\)"),
    ],
)
def test_a_batch_that_is_no_images_and_labels_is_one_sentence(batch, message):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        train_epoch(network, [batch], optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        test_epoch(network, [batch])
    assert torch.equal(network[0].weight, make_network()[0].weight)


def test_the_layer_before_a_view_is_named_with_functional_pooling_too():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            return F.avg_pool2d(self.conv(x), 2).view(-1, 3)  # (B, 3, 4, 4), (B, 3, 2, 2)

    with pytest.raises(
        ValueError, match=r"\(20, 3\) for B = 5: after layer 'conv' .* \(5, 3, 4, 4\)"
    ):
        test_epoch(Cut().double(), BATCHES)


def test_numpy_and_other_floats_are_taken():
    wanted = test_epoch(make_network().float(), [(IMAGES.float(), LABELS)])
    for images, labels in ((IMAGES, LABELS), (IMAGES.numpy(), LABELS.numpy().astype(np.uint8))):
        found = test_epoch(make_network().float(), [(images, labels)])
        assert (found.loss, found.accuracy) == (wanted.loss, wanted.accuracy)


def test_a_softmax_at_the_end_is_noticed(tiny):
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.Softmax(1))
    with pytest.warns(UserWarning, match="Sequential seems to return probabilities"):
        nl.fit(network, tiny, nl.Recipe(epochs=1), progress=False)
