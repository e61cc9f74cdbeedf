"""The fast ways through an epoch compute what the plain one computes."""

import copy
import math
import warnings
from unittest.mock import Mock, call

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.engines import choice as engines
from normlab.engines import cuda_graph as graphs
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.dropout import dropout, quick_dropout
from normlab.engines.plain import CpuEngine, PlainEngine
from normlab.norms import NORMS

# Without a GPU the graph's step is called instead of replayed: its bookkeeping (places, learning
# rates, sums, short batches, what the warm-ups leave behind) is the same.
FAST = (CpuEngine, GraphEngine)


@pytest.fixture
def few_digits(digits):
    """90 images: batches of 32 end with a short one."""
    return digits.subset(train=90, test=40)


def fit_with(kind, monkeypatch, data, recipe, *, network=None, **options):
    monkeypatch.setattr(engines, "_fastest", lambda *_: (kind, "a test"))
    network = network or nl.build_network("mnist-l1", dropout=0.0, seed=1)
    run = nl.fit(network, data, recipe, device="cpu", progress=False, **options)
    assert run.config["from"]["engine"] == kind.name
    return run


def floating(network):
    """Weights and running statistics; not BN's count of batches, which would outweigh them."""
    return [value for value in network.state_dict().values() if value.is_floating_point()]


def assert_close(one, other, tolerance):
    for mine, theirs in zip(one.history, other.history, strict=True):
        for key in ("train_loss", "test_loss", "penalty", "lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-15), key
        for key in ("train_accuracy", "test_accuracy"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-9)
    mine, theirs = (
        torch.cat([value.flatten() for value in floating(run.network)]) for run in (one, other)
    )
    assert (mine - theirs).norm() < tolerance * theirs.norm()


@pytest.fixture(scope="module")
def noise():
    """22 + 10 noisy images: without plain areas, in which max pooling has ties to break.

    Layouts break ties differently, and element-wise scales feel which pixel got the gradient.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 1, 16, 16), generator=random, dtype=torch.uint8)
    labels = torch.arange(32) % 10
    parts = (images[:22], labels[:22], images[22:], labels[22:])
    return nl.Dataset("noise", *parts, tuple("abcdefghij"), "noise")


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("l1", [0.0, 1e-4])
def test_fifty_steps_in_float64_agree_with_the_plain_loop(kind, norm, l1, noise, monkeypatch):
    # A rate at which training is stable: elsewhere rounding errors grow with every step.
    recipe = nl.Recipe(epochs=17, batch_size=8, lr=0.01, l1=l1, augment=("flip",), dtype="float64")
    runs = []
    for way in (kind, PlainEngine):
        # Norm before ReLU: after it, instance norm and global pooling leave nothing to learn.
        network = nl.build_network(
            "cifar10-norms", norm, dropout=0.0, input_shape=noise.input_shape, seed=1
        )
        runs.append(fit_with(way, monkeypatch, noise, recipe, network=network))
    assert 17 * 3 >= 50
    assert_close(*runs, 1e-9)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.05},
        {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.1, "centred": True},
        {"centred": True, "weight_decay": 0.1},
        {"nesterov": True, "weight_decay": 5e-4, "schedule": "cosine"},
        {"momentum": 0.0, "schedule": "constant", "label_smoothing": 0.1},
    ],
)
def test_every_optimizer_and_schedule_agrees(kind, changes, few_digits, monkeypatch):
    augment = ("shift:2", "rotate")
    recipe = nl.Recipe(epochs=4, batch_size=32, augment=augment, dtype="float64").replace(**changes)
    runs = [fit_with(way, monkeypatch, few_digits, recipe) for way in (kind, PlainEngine)]
    assert_close(*runs, 1e-9)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "in"])
def test_three_steps_in_float32_agree(kind, norm, few_digits, monkeypatch):
    """Without IN, of which this network leaves nothing but rounding errors to learn from."""
    recipe = nl.Recipe(epochs=1, batch_size=32, lr=0.01)
    runs = []
    for way in (kind, PlainEngine):
        network = nl.build_network("mnist-l1", norm, dropout=0.0, seed=1)
        runs.append(fit_with(way, monkeypatch, few_digits, recipe, network=network))
    assert_close(*runs, 1e-3)


@pytest.mark.parametrize("kind", FAST)
def test_an_interrupted_run_resumes_to_the_same_weights(kind, few_digits, monkeypatch, tmp_path):
    recipe = nl.Recipe(epochs=3, batch_size=32, optimizer="adamw", lr=0.01, augment=("shift:1",))
    whole = fit_with(kind, monkeypatch, few_digits, recipe)

    def stop_after_two(folder, network, optimizer, history):
        save(folder, network, optimizer, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    save = nl.runs.folder.RunFolder.save_epoch
    monkeypatch.setattr(nl.runs.folder.RunFolder, "save_epoch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit_with(kind, monkeypatch, few_digits, recipe, directory=tmp_path)
    monkeypatch.setattr(nl.runs.folder.RunFolder, "save_epoch", save)
    resumed = fit_with(kind, monkeypatch, few_digits, recipe, directory=tmp_path)
    for name, value in resumed.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[name]), name


def final_losses(kind, monkeypatch, data, dropout):
    """Training losses of ten seeds."""
    losses = []
    for seed in range(10):
        recipe = nl.Recipe(epochs=4, batch_size=32, seed=seed)
        network = nl.build_network("mnist-l1", dropout=dropout, seed=seed)
        run = fit_with(kind, monkeypatch, data, recipe, network=network)
        losses.append(run.last["train_loss"])
    return torch.tensor(losses)


def assert_statistically_equal(fast, plain):
    error = math.sqrt((fast.var() + plain.var()) / 10)
    assert abs(fast.mean() - plain.mean()) < 4 * error
    assert not torch.equal(fast, plain)  # it did compute in another way


def test_dropout_in_the_fast_loop_trains_as_well_as_the_plain_one(digits, monkeypatch):
    data = digits.subset(train=120, test=20)
    fast, plain = (
        final_losses(kind, monkeypatch, data, dropout=0.2) for kind in (CpuEngine, PlainEngine)
    )
    assert_statistically_equal(fast, plain)


def test_half_precision_trains_as_well_as_the_plain_loop(digits, monkeypatch):
    """The CPU's autocast stands in for the GPU's: the same casts at the same places."""
    data = digits.subset(train=120, test=20)
    plain = final_losses(PlainEngine, monkeypatch, data, dropout=0.0)
    monkeypatch.setattr(graphs, "_half_precision", lambda *_: (torch.bfloat16, 1.0))
    assert_statistically_equal(final_losses(GraphEngine, monkeypatch, data, dropout=0.0), plain)


@pytest.mark.parametrize(
    ("capability", "dtype", "scale"),
    [((7, 5), torch.float16, 1024.0), ((8, 0), torch.bfloat16, 1.0), ((9, 0), torch.bfloat16, 1.0)],
)
def test_a_gpu_computes_in_the_half_precision_that_it_is_built_for(
    capability, dtype, scale, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda")
    assert graphs._half_precision(gpu, nl.Recipe()) == (dtype, scale)
    assert graphs._half_precision(gpu, nl.Recipe(dtype="float64")) == (None, 1.0)
    context = graphs._autocast(gpu, dtype)
    assert context.keywords == {"device_type": "cuda", "dtype": dtype, "cache_enabled": False}


@pytest.mark.parametrize("probability", [0.02, 0.05, 0.3, 0.5, 0.9])
def test_the_mask_drops_at_its_rate_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    count = 2**20
    x = dropout(torch.ones(count), probability)
    dropped = (x == 0).float().mean().item()
    error = math.sqrt(probability * (1 - probability) / count)
    assert dropped == pytest.approx(probability, abs=4 * error + 2**-16)
    assert x[x != 0].unique().item() == pytest.approx(1 / (1 - probability), rel=1e-4)


def test_the_masks_elements_are_independent():
    torch.manual_seed(0)
    count, p = 2**20, 0.25
    keep = (dropout(torch.ones(count), p) != 0).double()
    centred = (keep - keep.mean()) / keep.std()
    # Lags within one draw of 64 bits (1 to 3), across draws, and across the rows of an image.
    for lag in (1, 2, 3, 4, 5, 8, 32, 1024):
        correlation = (centred[:-lag] * centred[lag:]).mean().abs().item()
        assert correlation < 5 / math.sqrt(count), lag
    for lane in range(4):  # none of the four elements of a draw has another rate
        rate = 1 - keep[lane::4].mean().item()
        assert rate == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / (count / 4)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_dropout_is_its_mask(layout):
    torch.manual_seed(0)
    x = torch.rand(4, 6, 5, 5).contiguous(memory_format=layout).requires_grad_()
    y = dropout(x, 0.4)
    y.backward(torch.full_like(y, 2.0))
    kept = y != 0
    assert torch.allclose(x.grad, kept * 2 / 0.6, rtol=1e-4)
    assert torch.allclose(y, kept * x / 0.6, rtol=1e-4)
    assert 0.3 < 1 - kept.float().mean() < 0.5


class DroppingInPlace(nn.Module):
    """Uses the tensor that went into its dropout, and not what the dropout returned."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = 2 * x
        self.layer(y)
        return y


def test_dropout_in_place_changes_what_it_is_given():
    torch.manual_seed(0)
    x = torch.ones(64, 32, 4, 4, requires_grad=True)
    network = DroppingInPlace(nn.Dropout(0.4, inplace=True))
    with quick_dropout(network):
        y = network(x)
    y.sum().backward()
    assert 0.3 < (y == 0).float().mean() < 0.5
    assert torch.allclose(x.grad, y.detach(), rtol=1e-4)


@pytest.mark.parametrize("probability", [0.999995, 1.0])
def test_a_layer_that_drops_about_everything_is_torch_s(probability):
    layer = nn.Dropout(probability)
    with quick_dropout(layer):
        assert (layer(torch.ones(1000)) == 0).float().mean() > 0.99


def test_dropout_is_put_back_after_training(few_digits):
    network = nl.build_network("mnist-l1", dropout=0.2, seed=0)
    nl.fit(network, few_digits, nl.Recipe(epochs=1), device="cpu", progress=False)
    assert all("forward" not in vars(layer) for layer in network.modules())


class Viewing(nn.Module):
    """As students write it: `.view` does not work on channels-last tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4 * 26 * 26, 10)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(x.size(0), -1))


def test_a_network_that_cannot_run_channels_last_takes_the_plain_path(few_digits):
    recipe = nl.Recipe(epochs=1)
    run = nl.fit(Viewing(), few_digits, recipe, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "plain"
    assert "view" in run.config["from"]["because"]


@pytest.mark.parametrize("kind", FAST)
def test_the_layout_is_changed_once_and_changed_back_after_errors_too(
    kind, few_digits, monkeypatch
):
    network = nl.build_network("mnist-l1", dropout=0.0, seed=1)
    layouts, move = [], network.to

    def to(**options):
        layouts.extend(filter(None, [options.get("memory_format")]))
        return move(**options)

    monkeypatch.setattr(network, "to", to)
    fit_with(kind, monkeypatch, few_digits, nl.Recipe(epochs=2), network=network)
    assert layouts == [torch.channels_last, torch.contiguous_format]
    monkeypatch.setattr(kind, "collect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_with(kind, monkeypatch, few_digits, nl.Recipe(epochs=2), network=network)
    assert layouts == [torch.channels_last, torch.contiguous_format] * 2
    assert all(weight.is_contiguous() for weight in network.parameters())


def test_apple_s_gpus_take_the_plain_path(few_digits):
    kind, why = engines._fastest(Viewing(), few_digits.loader(batch_size=32), torch.device("mps"))
    assert kind is PlainEngine
    assert why == "there is no faster way on mps"


class TooLarge(Viewing):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


def test_a_network_too_large_for_the_trial_is_not_sent_down_the_plain_path(few_digits):
    batches = few_digits.loader(batch_size=32)
    with pytest.raises(torch.OutOfMemoryError):
        engines.make_engine("auto", TooLarge(), nl.Recipe(), batches, batches)


def test_the_path_is_recorded_and_can_be_chosen(few_digits, tmp_path):
    network = nl.build_network("mnist-l1", seed=0)
    recipe = nl.Recipe(epochs=1)
    fast = nl.fit(network, few_digits, recipe, device="cpu", progress=False)
    assert fast.config["from"]["engine"] == "cpu-channels-last"
    assert fast.config["from"]["computes_in"] == "float32"
    plain = nl.fit(network, few_digits, recipe, device="cpu", progress=False, engine="plain")
    assert plain.config["from"]["engine"] == "plain"
    with pytest.raises(ValueError, match=r"unknown engine 'plane'.*did you mean 'plain'"):
        nl.fit(network, few_digits, recipe, device="cpu", progress=False, engine="plane")


def test_half_precision_is_recorded(few_digits, monkeypatch):
    monkeypatch.setattr(graphs, "_half_precision", lambda *_: (torch.bfloat16, 1.0))
    run = fit_with(GraphEngine, monkeypatch, few_digits, nl.Recipe(epochs=1))
    assert run.config["from"]["computes_in"] == "bfloat16"


def test_a_scaled_loss_is_scaled_back(few_digits, monkeypatch):
    """With a loss scale the steps are the same: it is taken out of the gradients again."""
    recipe = nl.Recipe(epochs=2, batch_size=32, dtype="float64")
    plain = fit_with(PlainEngine, monkeypatch, few_digits, recipe)
    monkeypatch.setattr(graphs, "_half_precision", lambda *_: (None, 1024.0))
    scaled = fit_with(GraphEngine, monkeypatch, few_digits, recipe)
    assert_close(scaled, plain, 1e-9)


def test_a_network_that_cannot_be_captured_takes_the_plain_path(few_digits, monkeypatch, tmp_path):
    def refuse(engine, step):
        step()  # a warm-up has moved weights and running statistics by then
        raise RuntimeError("operation not permitted when stream is capturing")

    recipe = nl.Recipe(epochs=2, batch_size=32)
    plain = fit_with(PlainEngine, monkeypatch, few_digits, recipe)
    monkeypatch.setattr(engines, "_fastest", lambda *_: (GraphEngine, "a test"))
    monkeypatch.setattr(GraphEngine, "capture", refuse)
    network = nl.build_network("mnist-l1", dropout=0.0, seed=1)
    with pytest.warns(UserWarning, match=r"takes the plain path: .*not permitted"):
        run = nl.fit(network, few_digits, recipe, directory=tmp_path, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "plain"
    assert "not permitted" in run.config["from"]["because"]
    assert_close(run, plain, 1e-6)


def test_a_last_batch_of_one_is_explained_when_it_is_captured(digits, monkeypatch):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
    )  # 28×28 to 1×1
    data = digits.subset(train=33, test=10)
    with pytest.raises(ValueError, match=r"no variance: use a batch_size other than 32$"):
        fit_with(GraphEngine, monkeypatch, data, nl.Recipe(batch_size=32), network=network)


def sent_down_the_plain_path(network, data, monkeypatch, because):
    """Trains what no graph can be made of; the plain loop must have given the same."""
    plain = fit_with(PlainEngine, monkeypatch, data, RECIPE, network=copy.deepcopy(network))
    monkeypatch.setattr(engines, "_fastest", lambda *_: (GraphEngine, "a test"))
    with pytest.warns(UserWarning, match=f"takes the plain path: .*{because}"):
        run = nl.fit(network, data, RECIPE, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "plain"
    assert_close(run, plain, 1e-12)


RECIPE = nl.Recipe(epochs=2, batch_size=32)


class OwnNorm(nn.Module):
    """A running variance as students write it: `update` gets the module and a batch's variance."""

    def __init__(self, update):
        super().__init__()
        self.register_buffer("var", torch.ones(1, 4, 1, 1))
        self.plain = torch.ones(1, 4, 1, 1)
        self.late, self.steps = None, 0
        self.update = update

    def forward(self, x):
        if self.training:
            self.update(self, x.detach().var((0, 2, 3), keepdim=True))
        scale = self.late if self.late is not None else self.plain
        return x / (self.var * scale + self.steps).sqrt()


def own_network(update):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 5, stride=4), OwnNorm(update), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * 36, 10))


def mean(old, new):
    return new if old is None else 0.9 * old + 0.1 * new


@pytest.mark.parametrize("name", ["var", "plain", "late"])
def test_state_that_a_forward_assigns_anew_is_no_part_of_a_graph(name, few_digits, monkeypatch):
    network = own_network(lambda norm, var: setattr(norm, name, mean(getattr(norm, name), var)))
    sent_down_the_plain_path(network, few_digits, monkeypatch, rf"give 1\.{name} a new value")


def test_a_count_in_python_is_no_part_of_a_graph(few_digits, monkeypatch):
    network = own_network(lambda norm, var: setattr(norm, "steps", norm.steps + 1))
    sent_down_the_plain_path(network, few_digits, monkeypatch, r"give 1\.steps a new value")


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_are_no_part_of_a_graph(register, few_digits, monkeypatch):
    network = own_network(lambda *_: None)
    getattr(network[2], f"register_{register}")(lambda *_: None)
    sent_down_the_plain_path(network, few_digits, monkeypatch, "have hooks")


@pytest.mark.parametrize("name", ["var", "plain"])
def test_state_that_a_forward_changes_in_place_begins_as_it_was(name, few_digits, monkeypatch):
    def update(norm, var):
        getattr(norm, name).mul_(0.9).add_(var, alpha=0.1)

    runs = [
        fit_with(kind, monkeypatch, few_digits, RECIPE, network=own_network(update))
        for kind in (GraphEngine, PlainEngine)
    ]
    states = [getattr(run.network[1], name) for run in runs]
    torch.testing.assert_close(*states)
    assert_close(*runs, 1e-3)


def test_the_cause_of_a_failed_capture_is_said_and_not_its_end(few_digits, monkeypatch):
    """torch.cuda.graph raises an error of its own when it is left by one."""

    def capture(engine, step):
        try:
            raise TypeError("a student's error\nand where it was")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(GraphEngine, "capture", capture)
    network = own_network(lambda *_: None)
    sent_down_the_plain_path(network, few_digits, monkeypatch, "graph: a student's error$")


def test_a_memory_that_is_full_in_a_capture_is_known(few_digits, monkeypatch):
    def capture(engine, step):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(GraphEngine, "capture", capture)
    with pytest.raises(RuntimeError, match=r"the memory of cpu is too small"):
        fit_with(GraphEngine, monkeypatch, few_digits, RECIPE)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_generator_takes_part_in_no_capture_after_a_failed_one(error, monkeypatch):
    generator = Mock()
    generator.graphsafe_set_state.side_effect = error
    monkeypatch.setattr(torch.cuda, "default_generators", (Mock(), generator))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    graphs._leave_capture(torch.device("cuda"))
    graphs._leave_capture(torch.device("cuda:1"))
    graphs._leave_capture(torch.device("cpu"))
    fresh = generator.clone_state.return_value
    assert generator.graphsafe_set_state.call_args_list == [call(fresh), call(fresh)]


def test_one_warning_of_torch_is_silenced_in_the_warm_ups(recwarn):
    with graphs._warming_up():
        warnings.warn("This instance was constructed with capturable=True or some", stacklevel=1)
        warnings.warn("another one", stacklevel=1)
    assert [str(each.message) for each in recwarn] == ["another one"]


def test_nothing_of_the_graphs_is_kept_by_gradients(few_digits, monkeypatch):
    run = fit_with(GraphEngine, monkeypatch, few_digits, RECIPE)
    assert all(weight.grad is None for weight in run.network.parameters())


def test_a_full_gpu_is_said_in_one_sentence(few_digits, monkeypatch):
    def refuse(engine, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(engines, "_fastest", lambda *_: (GraphEngine, "a test"))
    monkeypatch.setattr(GraphEngine, "capture", refuse)
    network = nl.build_network("mnist-l1", dropout=0.0, seed=1)
    with pytest.raises(RuntimeError, match=r"memory of cpu is too small .* smaller batch_size"):
        nl.fit(network, few_digits, nl.Recipe(epochs=1), device="cpu", progress=False)
