"""What is added touches one file of the library: each test adds something in one place."""

import pytest
import torch

import normlab as nl
from normlab import optimizers, recipes
from normlab.engines import choice
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine

# --- optimisers and schedules ----------------------------------------------------------------


@pytest.fixture(params=[PlainEngine, CpuEngine, GraphEngine])
def engine(request, monkeypatch):
    """Each engine in turn is the one that `fit` takes."""
    monkeypatch.setattr(choice, "_fastest", lambda *_: (request.param, "a test"))
    return request.param


def test_an_optimiser_is_an_entry_in_a_table(engine, tiny, tiny_network, monkeypatch):
    def nadam(weights, banks, lr, recipe):
        return torch.optim.NAdam(weights, lr, weight_decay=recipe.weight_decay)

    monkeypatch.setitem(optimizers.OPTIMIZERS, "nadam", nadam)
    recipe = nl.Recipe(epochs=3, batch_size=16, optimizer="nadam", lr=0.01, centred=True)
    run = nl.fit(tiny_network(), tiny, recipe, device="cpu", progress=False)
    assert run.config["from"]["engine"] == engine.name
    assert run.last["test_accuracy"] > 0.8
    with pytest.raises(ValueError, match="did you mean 'nadam'"):
        nl.Recipe(optimizer="nadm")


def test_a_schedule_is_an_entry_in_a_table(engine, tiny, tiny_network, monkeypatch):
    monkeypatch.setitem(recipes.SCHEDULES, "linear", lambda step, steps: 1 - step / steps)
    recipe = nl.Recipe(epochs=3, batch_size=32, schedule="linear", lr=0.09)
    run = nl.fit(tiny_network(), tiny, recipe, device="cpu", progress=False)
    rates = [row["lr"] for row in run.history]
    assert rates == pytest.approx([0.07, 0.04, 0.01])  # of the steps 2, 5 and 8 of 9
    assert run.config["from"]["engine"] == engine.name
