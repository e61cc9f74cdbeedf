"""`find_rate` against a loop written out, and its suggestion against made-up curves."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import nn

import normlab as nl
from normlab.lessons.range_test import _judged

RECIPE = nl.Recipe(batch_size=32, weight_decay=1e-3, l1=1e-3, label_smoothing=0.1, seed=3)


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def judged(rates, losses) -> nl.RateTest:
    return _judged(RECIPE, list(rates), list(losses))


# --- the test itself -------------------------------------------------------------------------


def test_losses_are_those_of_a_plain_loop(tiny, tiny_network):
    found = nl.find_rate(
        tiny_network(), tiny, RECIPE, lowest=0.01, highest=1, steps=20, device="cpu"
    )
    assert found.rates == pytest.approx([0.01 * 100 ** (step / 19) for step in range(20)])
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1, momentum=0.9, weight_decay=1e-3)
    loader = tiny.loader(batch_size=32, seed=3)
    expected = []
    while len(expected) < 20:
        for images, labels in loader:
            logits = network(images)
            expected.append(F.cross_entropy(logits, labels).item())
            penalty = network.conv.weight.abs().sum() + network.linear.weight.abs().sum()
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1) + 1e-3 * penalty
            optimizer.param_groups[0]["lr"] = 0.01 * 100 ** ((len(expected) - 1) / 19)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert found.losses == pytest.approx(expected[:20], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_network_and_random_state_stay_as_they_are(tiny, tiny_network, optimizer):
    network = tiny_network(dropout=0.2).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    recipe = nl.Recipe(batch_size=32, optimizer=optimizer, centred=True)
    state = torch.get_rng_state()
    found = nl.find_rate(network, tiny, recipe, steps=60, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in network.parameters())
    assert 1e-4 < found.suggestion < 10
    torch.rand(3)
    again = nl.find_rate(network, tiny, recipe, steps=60, device="cpu")
    assert again == found


def test_frozen_layers_stay_frozen_and_gradients_need_not_be_on(tiny, tiny_network):
    def frozen():
        network = tiny_network()
        network.norm.eval().requires_grad_(False)
        network.norm.register_forward_hook(lambda layer, *_: modes.add(layer.training))
        return network

    modes, recipe = set(), nl.Recipe(batch_size=32)
    expected = nl.find_rate(frozen(), tiny, recipe, steps=20, device="cpu")
    with torch.inference_mode():
        found = nl.find_rate(frozen(), tiny, recipe, steps=20, device="cpu")
    assert modes == {False}
    assert found.losses == expected.losses
    assert len(set(found.losses)) == len(found.losses)  # it trained


def test_short_last_batches_are_left_out(tiny, tiny_network):
    # 96 images in batches of 40: the third batch, of 16, would be noisier.
    recipe = nl.Recipe(batch_size=40)
    with pytest.warns(UserWarning, match="never fell"):
        found = nl.find_rate(tiny_network(), tiny, recipe, lowest=1e-9, highest=1e-8, steps=20)
    loader = tiny.loader(batch_size=40)
    network = tiny_network().train()  # does not move at such rates
    losses = [F.cross_entropy(network(x), y).item() for _ in range(10) for x, y in loader]
    kept = [loss for place, loss in enumerate(losses) if place % 3 != 2]
    assert found.losses == pytest.approx(kept[:20], rel=1e-4)


def test_a_batch_larger_than_the_data_is_all_of_it(tiny, tiny_network):
    found = nl.find_rate(tiny_network(), tiny, nl.Recipe(batch_size=500), steps=20)
    assert len(found.rates) > 5


def test_it_stops_where_the_loss_diverges(tiny, tiny_network):
    # Labels that nothing in the images tells: such a loss is not brought to 0 before it diverges.
    labels = tiny.train_labels[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    data = dataclasses.replace(tiny, train_labels=labels)
    found = nl.find_rate(tiny_network(), data, nl.Recipe(batch_size=32), highest=1e6, steps=100)
    assert found.diverged_at is not None
    assert found.diverged_at < 1e6
    assert np.median(found.losses[-5:]) > found.losses[0]
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 100
    assert all(map(math.isfinite, found.losses))


def test_the_suggestion_trains(tiny, tiny_network):
    recipe = nl.Recipe(epochs=4, batch_size=16)
    found = nl.find_rate(tiny_network(), tiny, recipe, steps=100, device="cpu")
    run = nl.fit(
        tiny_network(),
        tiny,
        recipe.replace(lr=found.suggestion),
        device="cpu",
        progress=False,
    )
    assert run.last["test_accuracy"] > 0.9


# --- the suggestion --------------------------------------------------------------------------


def test_the_suggestion_is_where_nine_tenths_of_the_fall_are_made():
    rates = np.geomspace(1e-4, 10, 101)  # 20 to a decade
    falling = np.interp(np.log10(rates), [-3, -1, 0, 1], [2.0, 1.0, 1.0, 5.0])
    # Nine tenths of the way from 10⁻³ to 10⁻¹ on the logarithmic axis.
    assert judged(rates, falling).suggestion == pytest.approx(10**-1.2, rel=0.15)


def test_a_lone_spike_changes_nothing():
    rates = np.geomspace(1e-4, 10, 101)
    losses = np.interp(np.log10(rates), [-3, -1, 0, 1], [2.0, 1.0, 1.0, 5.0])
    spiked = losses.copy()
    spiked[[20, 45, 58]] = [40.0, 0.0, 30.0]
    assert judged(rates, spiked).suggestion == pytest.approx(
        judged(rates, losses).suggestion, rel=0.15
    )


def test_smoothing_is_a_centred_running_median():
    losses = np.random.default_rng(0).uniform(1, 2, 60) * np.linspace(2, 1, 60)
    expected = pd.Series(losses).rolling(9, center=True, min_periods=1).median()
    assert judged(np.geomspace(1e-3, 1, 60), losses).smoothed == pytest.approx(expected.tolist())


def test_a_loss_that_never_falls_gives_no_suggestion_and_a_warning():
    rates = np.geomspace(1e-4, 1, 50)
    with pytest.warns(UserWarning, match=r"the loss never fell from 2\.3 .* try another `lowest`"):
        found = judged(rates, np.full(50, 2.3))
    assert found.suggestion is None
    assert found.diverged_at is None


def test_the_end_of_a_diverging_test_is_not_part_of_the_curve():
    rates = np.geomspace(1e-4, 1, 50)
    losses = [*np.linspace(2, 1, 30), math.inf]
    found = judged(rates, losses)
    assert found.diverged_at == rates[30]
    assert len(found.losses) == 30


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 1, "highest": 0.1}, "lowest must be below highest.*: not 1 and 0.1"),
        ({"lowest": 1, "highest": 1}, "lowest must be below highest"),
        ({"lowest": 0}, "lowest must be greater than 0"),
        ({"highest": math.inf}, "highest must be a finite number"),
        ({"steps": 5}, "steps must be at least 20, not 5"),
    ],
)
def test_rates_that_do_not_grow_are_refused(tiny, tiny_network, options, message):
    with pytest.raises(ValueError, match=message):
        nl.find_rate(tiny_network(), tiny, **options)


def test_a_loss_that_is_no_number_from_the_start_is_refused(tiny, tiny_network):
    network = tiny_network()
    with torch.no_grad():
        network.linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan before the first step, whatever the"):
        nl.find_rate(network, tiny, nl.Recipe(batch_size=32))


def test_what_cannot_be_trained_is_refused(tiny, tiny_network):
    with pytest.raises(ValueError, match="Flatten has no parameters to train"):
        nl.find_rate(nn.Flatten(), tiny)
    with pytest.raises(ValueError, match="must return logits of shape"):
        nl.find_rate(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), tiny)
    with pytest.raises(TypeError, match="a recipe must be a Recipe"):
        nl.find_rate(tiny_network(), tiny, 0.1)


# --- the picture -----------------------------------------------------------------------------


def test_each_label_has_a_curve_with_its_suggestion_marked():
    rates = np.geomspace(1e-4, 10, 101)
    falling = np.interp(np.log10(rates), [-3, -1, 0, 1], [2.0, 1.0, 1.0, 30.0])
    with pytest.warns(UserWarning, match="never fell"):
        flat = judged(rates, np.full(101, 2.3))
    found = judged(rates, falling)
    ax = nl.plot_rates({"BN": found, "no norm": flat}).axes[0]
    _, texts = ax.get_legend_handles_labels()
    assert texts == [f"BN: {found.suggestion:g}", "no norm: none"]
    curve = next(line for line in ax.lines if line.get_label() == texts[0])
    assert curve.get_ydata() == pytest.approx(found.smoothed)
    (marked,) = curve.get_markevery()
    assert curve.get_xdata()[marked] == pytest.approx(found.suggestion, rel=0.06)
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[1] < 5  # what diverges leaves the frame


def test_a_norm_has_its_colour_whatever_stands_beside_it():
    rates = np.geomspace(1e-4, 10, 101)
    found = judged(rates, np.geomspace(2, 1, 101))

    def colours(*labels):
        ax = nl.plot_rates(dict.fromkeys(labels, found)).axes[0]
        curves = [line for line in ax.lines if not line.get_label().startswith("_")]
        return {line.get_label().partition(":")[0]: line.get_color() for line in curves}

    few, more = colours("none, He", "GN"), colours("BN", "GN", "LN", "none, He")
    assert few == {label: more[label] for label in few}
    assert len(set(more.values())) == 4


def test_a_result_draws_itself():
    rates = np.geomspace(1e-4, 10, 101)
    found = judged(rates, np.geomspace(2, 1, 101))
    figure, ax = pyplot.subplots()
    assert found.plot(ax=ax, title="Mine") is figure
    assert ax.get_title() == "Mine"
    with pytest.raises(ValueError, match="no range tests to plot"):
        nl.plot_rates({})
