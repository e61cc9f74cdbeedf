"""An engine that computes something else is found out before it trains a run."""

import re
from contextlib import ExitStack

import pytest
import torch

import normlab as nl
from normlab.engines import choice
from normlab.engines.agreement import disagreement
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine, training_batches

RECIPE = nl.Recipe(
    epochs=20, batch_size=40, lr=0.02, weight_decay=0.01, augment=("shift:1", "flip")
)


@pytest.fixture
def tried(tiny, tiny_network):
    """`tried(kind, **changes)`: what is found out about an engine of a kind."""

    def disagree(kind, *, network=None, data=tiny, **changes):
        recipe = RECIPE.replace(**changes)
        network = network or tiny_network(dropout=0.2)
        batches = training_batches(data, recipe, torch.device("cpu"))
        return disagreement(kind(network, recipe, batches, data.loader(False, 30)))

    return disagree


# --- broken on purpose -----------------------------------------------------------------------


class FrozenRate(GraphEngine):
    """As if the learning rate were a number that the graph has learned by heart."""

    def prepare(self):
        self.schedule[:] = self.schedule[0]
        return super().prepare()


class OneMask(GraphEngine):
    """As if the generator were no part of the graph."""

    def capture(self, step):
        def replay():
            torch.manual_seed(0)
            step()

        super().capture(step)
        return replay


class MovedStatistics(GraphEngine):
    """Its warm-ups leave the running statistics where they have moved them."""

    def prepare(self):
        problem, moved = super().prepare(), self.network.norm
        moved.running_mean += 0.1
        return problem


class NoLastBatch(GraphEngine):
    """Trains on whole batches only."""

    def _capture_all(self):
        super()._capture_all()
        self._replays[0].pop()


class Neighbour(GraphEngine):
    """Takes the steps of the engine that was there first."""

    first = None

    def _train_step(self, size):
        Neighbour.first = Neighbour.first or self
        own = self.network, self.optimizer
        self.network, self.optimizer = Neighbour.first.network, Neighbour.first.optimizer
        super()._train_step(size)
        self.network, self.optimizer = own


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (FrozenRate, r"weights differ by \d+% of their change, most of all \w+\.weight"),
        (OneMask, "drops the same elements in every step"),
        (MovedStatistics, r"running statistics differ by .* norm\.running_mean"),
        (NoLastBatch, "differ by"),
        (Neighbour, r"differ by 1\d\d%"),
    ],
)
def test_a_broken_engine_is_found_out(kind, found, tried, tiny_network, monkeypatch):
    monkeypatch.setattr(Neighbour, "first", None)
    if kind is Neighbour:
        tried(kind)  # and that is the first
    assert re.search(found, tried(kind))


def test_what_is_in_an_engine_s_way_is_said(tried, monkeypatch):
    monkeypatch.setattr(GraphEngine, "prepare", lambda engine: "its step cannot be captured")
    assert tried(GraphEngine) == "its step cannot be captured"


# --- whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GraphEngine, CpuEngine])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_an_engine_that_is_right_agrees(kind, optimizer, tried):
    assert tried(kind, optimizer=optimizer, l1=1e-4, dtype="bfloat16") == ""


class Rounding(PlainEngine):
    """Adds in another order, so that the last digits of each gradient are others."""

    def collect(self, counted):
        def rounded(gradient):
            return gradient * (1 + 1e-6 * torch.randn_like(gradient))

        with ExitStack() as stack:
            for weight in self.network.parameters():
                stack.callback(weight.register_hook(rounded).remove)
            return super().collect(counted)


@pytest.mark.parametrize("name", ["mnist-l1", "cifar10-add"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_rounding_errors_are_no_disagreement(name, optimizer, tried, few_digits):
    """Those of BN on pictures with plain areas grow most."""
    network = nl.build_network(name, "bn", input_shape=few_digits.input_shape, seed=0)
    assert tried(Rounding, network=network, data=few_digits, optimizer=optimizer) == ""


def test_at_a_rate_that_explodes_nothing_is_compared(tried):
    assert tried(GraphEngine, lr=1e30) == ""


def test_the_run_itself_is_left_as_it_was(tiny, tiny_network, fit_with, monkeypatch):
    recipe = RECIPE.replace(epochs=2)
    alone = fit_with(GraphEngine, tiny, recipe, network=tiny_network(dropout=0.2))
    monkeypatch.setattr(choice, "TRIED_ON", ("cpu",))
    after = fit_with(GraphEngine, tiny, recipe, network=tiny_network(dropout=0.2))
    for name, value in alone.network.state_dict().items():
        assert torch.equal(value, after.network.state_dict()[name]), name


def test_the_plain_loop_trains_in_the_place_of_a_broken_engine(
    tiny, tiny_network, fit_with, assert_close, monkeypatch
):
    recipe = RECIPE.replace(epochs=2)
    plain = fit_with(PlainEngine, tiny, recipe, network=tiny_network())
    monkeypatch.setattr(choice, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(choice, "_fastest", lambda *_: (FrozenRate, "a test"))
    options = {"device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match=r"plain path: the cuda-graph engine disagrees .* weights"):
        run = nl.fit(tiny_network(), tiny, recipe, **options)
    assert run.config["from"]["engine"] == "plain"
    assert "disagrees" in run.config["from"]["because"]
    assert_close(run, plain, 1e-6)
    run = nl.fit(tiny_network(), tiny, recipe, engine="untried", **options)
    assert run.config["from"]["engine"] == "cuda-graph"
