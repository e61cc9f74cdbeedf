"""Steps that are captured: what they leave behind, and what no graph can be made of."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normlab as nl
from normlab import optimizers, training
from normlab.data import BatchLoader
from normlab.engines import choice, cuda_graph
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine
from normlab.recipes import make_optimizer
from normlab.support import filter_banks


def test_a_network_that_cannot_be_captured_takes_the_plain_path(
    few_digits, fit_with, assert_close, monkeypatch, tmp_path
):
    def refuse(engine, step):
        step()  # a warm-up has moved weights and running statistics by then
        raise RuntimeError("operation not permitted when stream is capturing")

    recipe = nl.Recipe(epochs=2, batch_size=32)
    plain = fit_with(PlainEngine, few_digits, recipe)
    monkeypatch.setattr(choice, "_fastest", lambda *_: (GraphEngine, "a test"))
    monkeypatch.setattr(GraphEngine, "capture", refuse)
    network = nl.build_network("mnist-l1", dropout=0.0, seed=1)
    with pytest.warns(UserWarning, match=r"takes the plain path: .*not permitted"):
        run = nl.fit(network, few_digits, recipe, directory=tmp_path, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "plain"
    assert "not permitted" in run.config["from"]["because"]
    assert_close(run, plain, 1e-6)


def test_a_last_batch_of_one_is_explained_when_it_is_captured(digits, fit_with):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
    )  # 28×28 to 1×1
    data = digits.subset(train=33, test=10)
    with pytest.raises(ValueError, match=r"no variance: use a batch_size other than 32$"):
        fit_with(GraphEngine, data, nl.Recipe(batch_size=32), network=network)


@pytest.fixture
def sent_down_the_plain_path(few_digits, fit_with, assert_close, monkeypatch):
    """Trains what no graph can be made of; the plain loop must have given the same."""

    def train(network, because):
        plain = fit_with(PlainEngine, few_digits, RECIPE, network=copy.deepcopy(network))
        monkeypatch.setattr(choice, "_fastest", lambda *_: (GraphEngine, "a test"))
        with pytest.warns(UserWarning, match=f"takes the plain path: .*{because}"):
            run = nl.fit(network, few_digits, RECIPE, device="cpu", progress=False)
        assert run.config["from"]["engine"] == "plain"
        assert_close(run, plain, 1e-12)

    return train


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
def test_state_that_a_forward_assigns_anew_is_no_part_of_a_graph(name, sent_down_the_plain_path):
    network = own_network(lambda norm, var: setattr(norm, name, mean(getattr(norm, name), var)))
    sent_down_the_plain_path(network, rf"give 1\.{name} a new value")


def test_a_count_in_python_is_no_part_of_a_graph(sent_down_the_plain_path):
    network = own_network(lambda norm, var: setattr(norm, "steps", norm.steps + 1))
    sent_down_the_plain_path(network, r"give 1\.steps a new value")


@pytest.mark.parametrize("name", ["var", "plain"])
def test_state_that_a_forward_changes_in_place_begins_as_it_was(
    name, few_digits, fit_with, assert_close
):
    def update(norm, var):
        getattr(norm, name).mul_(0.9).add_(var, alpha=0.1)

    runs = [
        fit_with(kind, few_digits, RECIPE, network=own_network(update))
        for kind in (GraphEngine, PlainEngine)
    ]
    states = [getattr(run.network[1], name) for run in runs]
    torch.testing.assert_close(*states)
    assert_close(*runs, 1e-3)


def test_the_cause_of_a_failed_capture_is_said_and_not_its_end(
    sent_down_the_plain_path, monkeypatch
):
    """torch.cuda.graph raises an error of its own when it is left by one."""

    def capture(engine, step):
        try:
            raise TypeError("a student's error\nand where it was")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(GraphEngine, "capture", capture)
    network = own_network(lambda *_: None)
    sent_down_the_plain_path(network, "graph: a student's error$")


@pytest.mark.parametrize("hidden", [False, True])
def test_a_memory_that_is_full_in_a_capture_is_one_sentence(
    hidden, few_digits, fit_with, monkeypatch
):
    def capture(engine, step):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        finally:
            if hidden:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(GraphEngine, "capture", capture)
    with pytest.raises(RuntimeError, match=r"memory of cpu is too small .* smaller batch_size"):
        fit_with(GraphEngine, few_digits, RECIPE)


@pytest.mark.parametrize(("version", "again"), [("2.11.0", False), ("2.12.0+cu130", True)])
def test_before_torch_2_12_none_is_captured_after_a_failed_one(
    version, again, few_digits, monkeypatch
):
    def engine():
        network, batches = nl.build_network("mnist-l1", seed=0), few_digits.loader(batch_size=32)
        return GraphEngine(network, RECIPE, batches, batches)

    def fail(engine, step):
        raise RuntimeError("operation not permitted\nand more")

    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert engine().prepare() == ""
    with monkeypatch.context() as patch:
        patch.setattr(GraphEngine, "capture", fail)
        assert engine().prepare().endswith("in a CUDA graph: operation not permitted")
    found = engine().prepare()
    assert found == "" if again else "before 2.12 can make no other" in found


def test_a_network_whose_earlier_gradients_are_held_is_explained(sent_down_the_plain_path):
    network = own_network(lambda *_: None)
    loss = network(torch.rand(2, 1, 28, 28)).sum()
    loss.backward()  # a loop by hand, whose last loss is still a variable
    sent_down_the_plain_path(network, r"part of another computation.*del loss")
    del loss
    assert not cuda_graph._held_by_others(network)


def test_one_warning_of_torch_is_silenced_in_the_warm_ups(recwarn):
    with cuda_graph._warming_up():
        warnings.warn("This instance was constructed with capturable=True or some", stacklevel=1)
        warnings.warn("another one", stacklevel=1)
    assert [str(each.message) for each in recwarn] == ["another one"]


def test_nothing_of_the_graphs_is_kept_by_gradients(few_digits, fit_with):
    run = fit_with(GraphEngine, few_digits, RECIPE)
    assert all(weight.grad is None for weight in run.network.parameters())


def test_an_optimiser_whose_rate_is_a_number_is_no_part_of_a_graph(
    sent_down_the_plain_path, monkeypatch
):
    def plain_sgd(weights, banks, lr, recipe):
        return torch.optim.SGD(weights, float(lr), recipe.momentum)

    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", plain_sgd)
    network = own_network(lambda *_: None)
    sent_down_the_plain_path(network, "takes no learning rate from the device")


# --- on a GPU that is not there --------------------------------------------------------------


class OnTheDevice(TorchDispatchMode):
    """Fails where a step waits for the device or has tensors elsewhere."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))  # to read a number of a pretended tensor raises
        everything = tree_leaves((args, kwargs, output))
        assert {x.device.type for x in everything if isinstance(x, torch.Tensor)} <= {"cuda"}
        return output


@pytest.fixture
def pretended(monkeypatch):
    """`pretended(kind, name, norm, recipe)`: an engine on CUDA tensors without a driver or values.

    Missing are the way back through the network, and what torch cannot do without values: fused
    optimisers, and the checks of their arguments.
    """

    def make_with_a_number(network, recipe, rate):
        optimizer = make_optimizer(network, recipe)
        whole = {"capturable": True, "foreach": True}
        named = {"sgd": {"fused": True}, "adam": whole, "adamw": whole}
        for group in optimizer.param_groups:
            group |= {"lr": rate, **named.get(recipe.optimizer, {})}
        return optimizer

    def make(kind, name, norm, recipe):
        shape = nl.NETWORKS[name].input_shape
        with torch.device("cuda"):
            network = nl.build_network(name, norm, dropout=0.1, seed=0)
            images, labels = torch.zeros(50, *shape, dtype=torch.uint8), torch.arange(50) % 10
        layout = cuda_graph.layout_for(recipe) if kind is GraphEngine else torch.contiguous_format
        for layer in network.modules():  # `to` cannot do it with pretended tensors
            if isinstance(layer, nn.Conv2d):
                layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=layout))

        def backward(loss):
            for weight in network.parameters():
                weight.grad = torch.empty_like(weight)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        statistics = {"mean": [0.5] * shape[0], "std": [0.5] * shape[0]}
        options = {"batch_size": 20, "memory_format": layout, **statistics}
        train = BatchLoader(images, labels, augment=recipe.augment, shuffle=True, **options)
        return kind(network, recipe, train, BatchLoader(images, labels, **options))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(cuda_graph, "_generator_of", lambda device: torch.default_generator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *arguments, **options: None)
    monkeypatch.setattr(cuda_graph, "make_optimizer", make_with_a_number)
    filter_banks.cached_batch.cache_clear()
    with FakeTensorMode():
        yield make
    filter_banks.cached_batch.cache_clear()


SEEN = [
    ("sgd", "float32"),
    ("adam", "float32"),
    ("adamw", "float32"),
    ("muon", "float32"),
    ("muon", "bfloat16"),
]
PRETENDED = nl.Recipe(
    batch_size=20, weight_decay=0.1, l1=1e-4, augment=("shift:1", "rotate", "flip")
)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln-elementwise"])
@pytest.mark.parametrize("name", nl.NETWORKS)
def test_a_captured_step_on_a_gpu_waits_for_nothing(name, norm, pretended):
    # The precision is the forward pass's, whose optimiser does not see it.
    for optimizer, dtype in SEEN:
        recipe = PRETENDED.replace(
            optimizer=optimizer, dtype=dtype, centred="adam" not in optimizer
        )
        engine = pretended(GraphEngine, name, norm, recipe)
        with OnTheDevice():
            engine._train_step(20)
            engine._test_step(10)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln-elementwise"])
def test_norms_on_a_gpu_compute_as_the_recipe_says_of_mixed_precision(norm, pretended):
    engine = pretended(GraphEngine, "mnist-l1", norm, PRETENDED.replace(dtype="bfloat16"))
    kinds = set()
    for layer in engine.network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_hook(lambda *call: kinds.add(call[-1].dtype))
    engine._train_step(20)
    assert kinds == {torch.bfloat16 if norm == "bn" else torch.float32}


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("name", nl.NETWORKS)
def test_the_plain_loop_on_a_gpu_waits_for_nothing_within_an_epoch(
    name, optimizer, pretended, monkeypatch
):
    recipe = PRETENDED.replace(optimizer=optimizer, centred=True)
    engine = pretended(PlainEngine, name, "bn", recipe)
    draws = engine.batches.draw_epoch()  # before the first step; and the results after the last
    monkeypatch.setattr(engine.batches, "draw_epoch", lambda: draws)
    monkeypatch.setattr(engine.tests, "draw_epoch", lambda: (draws[0], []))
    monkeypatch.setattr(training, "epoch_result", lambda sums, started: len(sums))
    monkeypatch.setattr(engine, "random_state", nullcontext)
    with OnTheDevice():
        assert engine.collect(iter) == (3, 3)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.cpu()])
def test_a_read_by_the_host_would_be_found(read, pretended, monkeypatch):
    engine = pretended(GraphEngine, "mnist-l1", "bn", PRETENDED)
    engine.network[0].register_forward_hook(lambda layer, given, output: read(output) and None)
    with OnTheDevice(), pytest.raises((AssertionError, RuntimeError)):
        engine._train_step(20)
