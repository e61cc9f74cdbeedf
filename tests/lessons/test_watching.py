"""`watch` against numbers computed from plain tensors, and that it leaves no trace."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

import normlab as nl
from normlab.engines import choice as engines
from normlab.optimizers import PLAIN_FACTOR
from normlab.recipes import make_optimizer


def batches(count: int, size: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images (size, 1, 12, 12) of four classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 4
    return [(torch.randn(size, 1, 12, 12, generator=generator), labels) for _ in range(count)]


def values_of(watched: nl.Watch, step: int, layer: str) -> dict[str, float]:
    frame = watched.frame()
    rows = frame[(frame["step"] == step) & (frame["layer"] == layer)]
    return dict(zip(rows["quantity"], rows["value"], strict=True))


def described(output: torch.Tensor) -> dict[str, float]:
    """Mean, standard deviation and percentiles of all values, by NumPy."""
    values = output.detach().double().numpy()
    numbers = {"mean": values.mean(), "std": values.std()}
    return numbers | {f"percentile_{p}": np.percentile(values, p) for p in (5, 25, 50, 75, 95)}


# --- the numbers -----------------------------------------------------------------------------


@pytest.fixture(params=["bn", "gn"])
def trained(request, tiny_network):
    """A network watched over five steps of plain SGD, and the same five steps by hand."""
    network, twin = tiny_network(request.param), tiny_network(request.param)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with nl.watch(network, every=2) as watched:
        nl.train_epoch(
            network,
            batches(5),
            optimizer,
            scheduler=scheduler,
            scheduler_steps="batch",
            l1=1e-2,
        )
    return watched, by_hand(twin, batches(5), l1=1e-2)


def by_hand(network: nn.Module, some: list, *, l1: float) -> list[dict]:
    """What each step of SGD with the rates 1/2, 1/4, 1/6, … meets, written out."""
    met = []
    for step, (images, labels) in enumerate(some):
        convolved = network.conv(images)
        normed = network.norm(convolved)
        pooled = network.pool(normed.clamp(min=0)).flatten(1)
        logits = network.linear(pooled)
        penalty = network.conv.weight.abs().sum() + network.linear.weight.abs().sum()
        weights = list(network.parameters())
        loss = F.cross_entropy(logits, labels) + l1 * penalty
        gradients = torch.autograd.grad(loss, weights)
        by_weight = dict(zip(map(id, weights), gradients, strict=True))
        rate = 0.5 / (1 + step)
        filters, last = network.conv.weight, network.linear.weight
        met.append(
            {
                "conv": described(convolved) | of_weights(filters, by_weight[id(filters)], rate),
                "linear": described(logits) | of_weights(last, by_weight[id(last)], rate),
                "norm": described(normed)
                | {
                    "weight_norm": network.norm.weight.square().sum().sqrt().item(),
                    "gradient_norm": by_weight[id(network.norm.weight)].norm().item(),
                }
                | running(network.norm),
            }
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.5 / (1 + step) * gradient
    return met


def of_weights(weight: torch.Tensor, gradient: torch.Tensor, rate: float) -> dict[str, float]:
    square = weight.square().sum().item()
    return {
        "weight_norm": square**0.5,
        "gradient_norm": gradient.square().sum().sqrt().item(),
        "small_weights": (weight.abs() < 1e-3).sum().item() / weight.numel(),
        "rate": rate,
        "effective_rate": rate / square,
    }


def running(norm: nn.Module) -> dict[str, float]:
    if not isinstance(norm, nn.BatchNorm2d):
        return {}
    return {
        "running_mean": norm.running_mean.mean().item(),
        "running_variance": norm.running_var.mean().item(),
    }


@pytest.mark.parametrize("layer", ["conv", "norm", "linear"])
def test_every_number_is_the_one_computed_by_hand(trained, layer):
    watched, met = trained
    for step in (0, 2, 4):
        due = pytest.approx(met[step][layer], rel=1e-4, abs=1e-6)
        assert values_of(watched, step, layer) == due


def test_only_the_steps_asked_for_are_recorded(trained):
    watched, _ = trained
    frame = watched.frame()
    assert watched.steps == 5
    assert list(frame.columns) == ["step", "layer", "kind", "quantity", "value"]
    assert sorted(set(frame["step"])) == [0, 2, 4]
    assert set(frame["quantity"]) <= set(nl.lessons.watching.QUANTITIES)
    assert list(dict.fromkeys(frame["layer"])) == ["conv", "norm", "linear"]
    assert set(frame["kind"][frame["layer"] == "conv"]) == {"convolution"}
    assert set(frame["kind"][frame["layer"] == "linear"]) == {"linear"}


def test_percentiles_of_a_large_output_come_from_a_fair_sample():
    torch.manual_seed(0)  # in another draw the sampled 5 % may lie further off
    network = nn.Sequential(nn.Conv2d(1, 20, 3), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(64, 1, 26, 26) * torch.linspace(0.1, 3, 26)  # darker to one side
    network(images)
    with nl.watch(network) as watched:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        expected = described(network[0](images))
        nl.train_epoch(network, [(images, torch.arange(64) % 4)], optimizer)
    found = values_of(watched, 0, "0")
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.1 * expected["std"]), name


# --- dead channels ---------------------------------------------------------------------------


class Student(nn.Module):
    """A student's network, whose second convolution has 2 of 5 channels that a ReLU makes 0."""

    def __init__(self, relu) -> None:
        super().__init__()
        self.relu = relu
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 4)
        with torch.no_grad():
            self.second.bias.copy_(torch.tensor([0.0, -1e3, 0.0, -1e3, 1e3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        x = self.relu(self.second(x)).mean((2, 3))
        return self.relu(self.head(x))  # has channels of its own


def one_step(network: nn.Module, **options) -> nl.Watch:
    watched = nl.watch(network, **options)
    nl.train_epoch(network, batches(1), torch.optim.SGD(network.parameters(), lr=1e-3))
    watched.close()
    return watched


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_dead_channels_are_found_behind_a_relu(relu):
    watched = one_step(Student(relu))
    assert values_of(watched, 0, "second")["dead"] == pytest.approx(2 / 5)
    assert "dead" not in values_of(watched, 0, "first")


@pytest.mark.parametrize("order", ["norm, ReLU", "ReLU, norm"])
def test_dead_channels_belong_to_the_convolution_wherever_the_norm_stands(order):
    convolution, norm, relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.0, 0.0, -1e3, 0.0]))
        convolution.bias.copy_(torch.tensor([0.0, -1e3, 0.0, 0.0]))
    middle = [norm, relu] if order == "norm, ReLU" else [relu, norm]
    network = nn.Sequential(convolution, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    watched = one_step(network)
    # The norm takes the bias of the convolution away, and its own comes too late for the ReLU.
    assert values_of(watched, 0, "0")["dead"] == pytest.approx(1 / 4)
    assert "dead" not in values_of(watched, 0, "2" if order == "ReLU, norm" else "1")


def test_a_network_of_linear_layers_is_watched_with_its_dead_units():
    first, last = nn.Linear(144, 6), nn.Linear(6, 4)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([0.0, -1e3, 0.0, -1e3, -1e3, 1e3]))
    watched = one_step(nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Dropout(0.1), last))
    assert values_of(watched, 0, "1")["dead"] == pytest.approx(3 / 6)
    assert values_of(watched, 0, "4")["weight_norm"] > 0
    assert "dead" not in values_of(watched, 0, "4")
    assert nl.plot_watch({"MLP": watched}, "dead", kind="linear").axes


def test_linear_layers_have_their_channels_on_the_last_axis():
    first = nn.Linear(12, 5)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-1e3, 1.0, 1.0, 1.0, 1.0]))
    network = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 5, 4))  # (N, 1, 12, 5)
    assert values_of(one_step(network), 0, "0")["dead"] == pytest.approx(1 / 5)


def test_a_channel_that_one_image_wakes_is_not_dead():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.fill_(-5.0)
    images = torch.zeros(4, 1, 12, 12)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with nl.watch(network, every=1) as watched:
        nl.train_epoch(network, [(images, torch.arange(4))], optimizer)
        images[3, 0, 11, 7] = 6.0
        nl.train_epoch(network, [(images, torch.arange(4))], optimizer)
    assert values_of(watched, 0, "0")["dead"] == 1
    assert values_of(watched, 1, "0")["dead"] == 0


# --- which steps -----------------------------------------------------------------------------


def test_tests_and_forward_passes_without_a_step_do_not_count(tiny_network):
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with nl.watch(network, every=2) as watched:
        network(batches(1)[0][0])  # in training mode, but no step follows
        with pytest.raises(ValueError, match="nothing was recorded"):
            watched.frame()
        for _ in range(3):
            nl.train_epoch(network, batches(1), optimizer)
            nl.test_epoch(network, batches(2, seed=1))
    assert watched.steps == 3
    assert sorted(set(watched.frame()["step"])) == [0, 2]


def test_accumulated_gradients_are_one_step(tiny_network):
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with nl.watch(network, every=1) as watched:
        for images, labels in batches(3):
            (F.cross_entropy(network(images), labels) / 3).backward()
        last = described(network.conv(images))
        expected = network.conv.weight.grad.norm().item()
        optimizer.step()
    assert watched.steps == 1
    found = values_of(watched, 0, "conv")
    assert found["gradient_norm"] == pytest.approx(expected, rel=1e-5)
    assert found["mean"] == pytest.approx(last["mean"], rel=1e-4)  # of the last pass


def test_two_optimizers_of_one_network_each_tell_their_rates():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 10), nn.Flatten())
    lengths = [layer.weight.norm().item() for layer in network[:2]]
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=lr)
        for layer, lr in zip(network[:2], (0.1, 0.3), strict=True)
    ]
    with nl.watch(network, every=1) as watched:
        for images, labels in batches(2):
            F.cross_entropy(network(images), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert watched.steps == 2
    for layer, rate in (("0", 0.1), ("1", 0.3)):
        found = values_of(watched, 0, layer)
        assert found["rate"] == pytest.approx(rate)
        assert found["weight_norm"] == pytest.approx(lengths[int(layer)], rel=1e-5)


def test_muons_other_weights_have_their_own_rate():
    network = nl.build_network("mnist-l1", "gn", dropout=0.0, seed=0)
    recipe = nl.Recipe(optimizer="muon", lr=0.02)
    images = torch.randn(4, 1, 28, 28)
    with nl.watch(network) as watched:
        nl.train_epoch(network, [(images, torch.arange(4))], make_optimizer(network, recipe))
    assert values_of(watched, 0, "0.0")["rate"] == pytest.approx(0.02)
    assert values_of(watched, 0, "8.1.0")["rate"] == pytest.approx(PLAIN_FACTOR * 0.02)


def test_each_watch_sees_its_own_network(tiny_network):
    one, other = tiny_network(seed=0), tiny_network(seed=1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (one, other)]
    with nl.watch(one, every=1) as first, nl.watch(other, every=1) as second:
        nl.train_epoch(one, batches(2), optimizers[0])
        nl.train_epoch(other, batches(3), optimizers[1])
        stranger = copy.deepcopy(one)
        nl.train_epoch(stranger, batches(1), torch.optim.SGD(stranger.parameters(), lr=0.1))
    assert (first.steps, second.steps) == (2, 3)


def test_frozen_weights_have_a_length_and_no_rate(tiny_network):
    network = tiny_network()
    network.conv.requires_grad_(False)
    optimizer = make_optimizer(network, nl.Recipe())
    with nl.watch(network) as watched:
        nl.train_epoch(network, batches(1), optimizer)
    found = values_of(watched, 0, "conv")
    assert found["weight_norm"] == pytest.approx(network.conv.weight.norm().item())
    assert not {"rate", "effective_rate", "gradient_norm"} & set(found)


def test_norms_without_scale_or_statistics_are_watched_too():
    norms = [nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.InstanceNorm2d(4)]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert set(values_of(one_step(network), 0, "1")) == set(described(torch.ones(2)))


# --- with fit --------------------------------------------------------------------------------

RECIPE = nl.Recipe(epochs=2, batch_size=32, lr=0.1, l1=1e-4)


def test_fit_on_the_cpu_is_watched_on_its_fast_path(tiny, tiny_network):
    network, twin = tiny_network(dropout=0.2), tiny_network(dropout=0.2)
    with nl.watch(network, every=2) as watched:
        run = nl.fit(network, tiny, RECIPE, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "cpu-channels-last"
    assert watched.steps == 6
    assert sorted(set(watched.frame()["step"])) == [0, 2, 4]
    with nl.watch(twin, every=2) as plain:
        nl.fit(twin, tiny, RECIPE, device="cpu", progress=False, engine="plain")
    ours, theirs = watched.frame(), plain.frame()
    before_dropout = ours["kind"] != "linear"  # whose draws differ
    first = (ours["step"] == 0) & before_dropout
    for name in ("std", "weight_norm"):
        chosen = first & (ours["quantity"] == name)
        assert ours["value"][chosen].to_numpy() == pytest.approx(
            theirs["value"][chosen].to_numpy(), rel=1e-4
        )


def test_a_watched_network_is_not_put_into_a_cuda_graph(tiny, tiny_network):
    network, train = tiny_network(), tiny.loader(batch_size=32)
    cuda = torch.device("cuda")
    assert engines._fastest(network, nl.Recipe(), train, cuda)[0] is engines.GraphEngine
    with nl.watch(network):
        kind, why = engines._fastest(network, nl.Recipe(), train, cuda)
    assert kind is engines.PlainEngine
    assert "calls no hooks" in why
    assert engines._fastest(network, nl.Recipe(), train, cuda)[0] is engines.GraphEngine


def test_a_captured_step_is_refused_in_one_sentence(tiny_network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    network = tiny_network()
    with nl.watch(network), pytest.raises(RuntimeError, match="cannot record inside a CUDA graph"):
        network(batches(1)[0][0])


# --- no trace --------------------------------------------------------------------------------


def hooks() -> list[int]:
    """How many hooks torch has for all modules and optimisers."""
    tables = [
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_hooks_always_called,
        torch_module._global_backward_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    return [*map(len, tables)]


def test_nothing_is_left_on_network_optimizer_or_torch(tiny_network):
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before, names = hooks(), list(network.state_dict())
    attributes = [set(vars(layer)) for layer in network.modules()]
    watched = nl.watch(network, every=1)
    nl.train_epoch(network, batches(2), optimizer)
    assert list(network.state_dict()) == names
    assert pickle.loads(pickle.dumps(network))  # also while it is watched
    watched.close()
    watched.close()  # does no harm
    assert hooks() == before
    assert [set(vars(layer)) for layer in network.modules()] == attributes
    for layer in network.modules():
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
    assert not any(weight._backward_hooks for weight in network.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    rows = len(watched.frame())
    nl.train_epoch(network, batches(1), optimizer)
    assert (len(watched.frame()), watched.steps) == (rows, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_nothing_behind(tiny_network, error):
    network, before = tiny_network(), hooks()

    def interrupt(*_):
        raise error

    handle = network.pool.register_forward_hook(interrupt)
    with pytest.raises(error), nl.watch(network) as watched:
        nl.train_epoch(network, batches(1), torch.optim.SGD(network.parameters(), lr=0.1))
    assert hooks() == before
    handle.remove()
    assert watched.steps == 0


def test_training_goes_on_after_an_interrupted_pass(tiny_network):
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    handle = network.pool.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with nl.watch(network, every=1) as watched:
        with pytest.raises(KeyboardInterrupt):
            nl.train_epoch(network, batches(1), optimizer)
        handle.remove()
        nl.train_epoch(network, batches(2), optimizer)
    assert sorted(set(watched.frame()["step"])) == [0, 1]


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_fit_gives_the_same_weights_with_and_without_a_watch(tiny, tiny_network, engine):
    runs = []
    for every in (None, 1):
        network = tiny_network(dropout=0.2)
        if every is not None:
            watched = nl.watch(network, every=every)
        runs.append(
            nl.fit(network, tiny, RECIPE, device="cpu", progress=False, engine=engine).network
        )
    watched.close()
    for name, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[1].state_dict()[name]), name


def test_a_loop_of_ones_own_draws_the_same_random_numbers(tiny_network):
    weights, states = [], []
    for every in (None, 1):
        network = tiny_network(dropout=0.3)
        optimizer = make_optimizer(network, nl.Recipe(optimizer="adamw", lr=0.01))
        watched = nl.watch(network, every=every) if every else None
        torch.manual_seed(5)
        nl.train_epoch(network, batches(4), optimizer)
        states.append(torch.get_rng_state())
        weights.append(torch.cat([weight.detach().flatten() for weight in network.parameters()]))
        if watched is not None:
            watched.close()
    assert torch.equal(*weights)
    assert torch.equal(*states)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.ReLU(), {}, "ReLU has no parameters, so that there is no training to watch"),
        (nn.BatchNorm1d(2), {}, "BatchNorm1d has no convolution or linear layer to watch"),
        (nn.Conv2d(1, 1, 1), {"every": 0}, "every must be at least 1, not 0"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_hooks(network, options, message):
    before = hooks()
    with pytest.raises(ValueError, match=f"^{message}$"):
        nl.watch(network, **options)
    assert hooks() == before


def test_a_network_by_its_name_is_no_network():
    with pytest.raises(TypeError, match="must be a Module, not 'mnist-l1'"):
        nl.watch("mnist-l1")
