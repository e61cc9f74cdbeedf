"""The probe of a network: what it sees, what it overlooks, and that it leaves everything alone."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab as nl
from normlab.runs.folder import RunFolder
from normlab.runs.identity import LOGITS, differences, digest_of, identity
from normlab.runs.probe import LOGITS_APART, are_apart, probe

RECIPE = nl.Recipe(epochs=1, batch_size=32)
SLOPE = {"slope": 0.01}


def slope():
    return SLOPE["slope"]


class Own(nn.Module):
    """A network with everything that layers and weights do not show."""

    def __init__(self, slope=0.01, chance=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.dropout, self.linear = nn.Dropout2d(0.2), nn.Linear(8 * 12 * 12, 4)
        self.slope, self.chance = slope, chance

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.conv(x)), self.slope)
        x = self.linear(self.dropout(x).flatten(1)) * (1 + slope())
        return x + self.chance() if self.chance else x


def changed_attribute(network):
    network.slope = 0.2


def changed_global(network):
    SLOPE["slope"] = 0.2


def hooked(network):
    network.norm.register_forward_hook(lambda layer, inputs, output: 2 * output)


def hooked_in_training(network):
    network.norm.register_forward_hook(lambda layer, _, x: 2 * x if layer.training else x)


def hooked_gradient(network):
    network.conv.weight.register_hook(lambda gradient: 0 * gradient)


def hooked_sum_of_gradients(network):
    network.conv.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.zero_())


def hooked_backward_pass(network):
    network.norm.register_full_backward_hook(lambda layer, inputs, outputs: (0 * inputs[0],))


def frozen_by_gradient(network):
    network.conv.requires_grad_(False)


def frozen_by_mode(network):
    network.norm.eval()


SEEN_ONCE_TRAINED = [changed_attribute, changed_global, hooked]
IN_BACKWARD = [hooked_gradient, hooked_sum_of_gradients, hooked_backward_pass]
CHANGES = [*SEEN_ONCE_TRAINED, *IN_BACKWARD, hooked_in_training, frozen_by_gradient]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setitem(SLOPE, "slope", 0.01)


def fit(network, data, directory):
    recipe = RECIPE.replace(epochs=2)
    return nl.fit(network, data, recipe, directory=directory, device="cpu", progress=False)


def assert_refused(network, data, directory):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    said = r"something else \((frozen|gradient_hooks|logits_by_drawn_weights\.|its network pred)"
    with pytest.raises(ValueError, match=said):
        fit(network, data, directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_computes_something_else_is_another_run(tiny, tmp_path, change):
    run, network = fit(Own(), tiny, tmp_path), Own()
    change(network)
    assert_refused(network, tiny, tmp_path)
    SLOPE["slope"] = 0.01
    assert fit(Own(), tiny, tmp_path).history == run.history


@pytest.mark.parametrize("change", CHANGES)
def test_another_network_does_not_go_on_with_a_run(tiny, tmp_path, change, monkeypatch):
    def stop_after(save, *arguments):
        save(*arguments)
        raise KeyboardInterrupt

    save = RunFolder.save_epoch
    monkeypatch.setattr(RunFolder, "save_epoch", lambda *each: stop_after(save, *each))
    with pytest.raises(KeyboardInterrupt):
        fit(Own(), tiny, tmp_path)
    monkeypatch.undo()
    network = Own()
    change(network)
    assert_refused(network, tiny, tmp_path)


@pytest.mark.parametrize("change", SEEN_ONCE_TRAINED)
def test_the_trained_network_is_known_until_it_computes_something_else(tiny, tmp_path, change):
    run = fit(Own(), tiny, tmp_path)
    run.network.train()
    assert fit(run.network, tiny, tmp_path).history == run.history
    change(run.network)
    assert_refused(run.network, tiny, tmp_path)


def test_a_normalization_that_is_frozen_by_its_mode_is_seen(tiny):
    networks = Own(), Own()
    for network in networks:
        network.norm.requires_grad_(False)
    frozen_by_mode(networks[1])
    one, other = (identity(network, tiny, RECIPE) for network in networks)
    assert one["frozen"] == other["frozen"] == ["norm.weight", "norm.bias"]
    difference, *_ = differences(one, other)
    assert difference.startswith("logits_by_drawn_weights.training")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_network_gives_the_same_logits(tiny, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert not differences(identity(Own(), tiny, RECIPE), identity(Own(), tiny, RECIPE))
    finally:
        torch.set_num_threads(before)


def test_rounding_is_no_difference_and_a_hundredth_is_one():
    logits = [1.0, -0.5, 1e-9]
    assert not are_apart(logits, [value * (1 + LOGITS_APART / 2) for value in logits])
    assert not are_apart([0.0, 0.0], [0.0, 0.0])
    for other in ([1.01, -0.5, 0.0], [1.0, -0.5], [1.0, -0.5, "x"], None, 3, [1.0, -0.5, np.nan]):
        assert are_apart(logits, other)


def test_nothing_is_moved(tiny):
    network = Own().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert set(probe(network, tiny.input_shape, torch.float32)) == {"evaluation", "training"}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2][1].tolist()  # noqa: NPY002
    assert all(layer.training for layer in network.modules())


def test_the_precision_of_the_recipe_does_not_matter_much(tiny):
    one, other = (probe(Own(), tiny.input_shape, dtype) for dtype in (torch.float32, torch.float64))
    for mode in ("evaluation", "training"):
        assert one[mode] == pytest.approx(other[mode], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)]
)
def test_dropout_is_seen_without_chance(tiny, layer):
    network = Own()
    without = probe(network, tiny.input_shape, torch.float32)
    network.dropout = layer
    seen = probe(network, tiny.input_shape, torch.float32)
    assert seen["evaluation"] == without["evaluation"]
    assert are_apart(seen["training"], without["training"])


@pytest.mark.parametrize(
    "chance", [lambda: torch.rand(()), random.random, np.random.rand], ids=["torch", "python", "np"]
)
def test_of_what_depends_on_chance_nothing_is_said(tiny, chance):
    assert probe(Own(chance=chance), tiny.input_shape, torch.float32) == {}


def test_a_network_that_cannot_be_tried_is_trained_all_the_same(tiny, tmp_path):
    class Uncopied(Own):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one")

    nl.fit(Uncopied(), tiny, RECIPE, device="cpu", progress=False)
    network = Own(chance=lambda: torch.tensor(torch.inf))
    assert probe(network, tiny.input_shape, torch.float32) == {}


def test_what_lies_before_weights_that_begin_at_zero_is_seen(tiny):
    networks = Own(), Own(slope=0.2)
    for network in networks:
        nn.init.zeros_(network.linear.weight)
    one, other = (identity(network, tiny, RECIPE) for network in networks)
    assert "logits_by_drawn_weights.evaluation" in " ".join(differences(one, other))


def test_runs_of_earlier_versions_tell_no_logits(tiny):
    now = identity(Own(), tiny, RECIPE)
    then = {key: now[key] for key in now.keys() - {"frozen", "gradient_hooks", LOGITS}}
    assert differences(then, now) == []
    assert digest_of(then) == digest_of(now)
    network = Own()
    frozen_by_gradient(network)
    assert digest_of(identity(network, tiny, RECIPE)) != digest_of(now)


def test_a_run_that_tells_no_logits_is_asked_what_it_predicts(few_digits, tmp_path):
    def trained(hook=None):
        network = nl.build_network("mnist-l1", dropout=0.0, seed=0)
        if hook is not None:
            network[0][1].register_forward_hook(hook)
        recipe = RECIPE.replace(epochs=8, batch_size=16)  # until it is sure of something
        options = {"device": "cpu", "progress": False}
        return nl.fit(network, few_digits, recipe, directory=tmp_path / "run", **options)

    trained()
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    del config["is"][LOGITS], config["digest"]  # as earlier versions kept it
    file.write_text(json.dumps(config))
    assert trained().config["final_weights"] == config["final_weights"]
    with pytest.raises(ValueError, match="predicted otherwise"):
        trained(lambda layer, inputs, output: -output)
