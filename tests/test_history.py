"""Histories of a loop of one's own: every way in which students keep them, in plots and runs."""

import math

import numpy as np
import pytest

import normlab as nl
from normlab.history import COLUMNS, runs_of


def result(loss: float, accuracy: float, *, penalty: float = 0.0) -> nl.EpochResult:
    return nl.EpochResult(loss, accuracy, penalty, images=10, seconds=1.5)


TRAIN, TEST = (
    [result(2.0, 0.3, penalty=0.1), result(1.0, 0.6)],
    [result(2.2, 0.2), result(1.5, 0.5)],
)


def test_a_history_has_the_rows_of_a_run():
    history = nl.History()
    history.add(TRAIN[0], TEST[0], lr=0.1)
    row = history.add(TRAIN[1], TEST[1])
    assert row is history[1]
    assert [tuple(row) for row in history] == [COLUMNS] * 2
    assert list(history[0].values()) == [1, 2.0, 0.3, 2.2, 0.2, 0.1, 0.1, 3.0]
    assert (row["epoch"], row["test_accuracy"]) == (2, 0.5)
    assert math.isnan(row["lr"])


def test_without_a_test_what_it_would_give_is_not_known():
    row = nl.History().add(TRAIN[0])
    assert math.isnan(row["test_loss"])
    assert math.isnan(row["test_accuracy"])
    assert row["seconds"] == 1.5


LISTS = {
    "train_loss": [2.0, 1.0],
    "train_accuracy": [0.3, 0.6],
    "test_loss": [2.2, 1.5],
    "test_accuracy": [0.2, 0.5],
}


@pytest.mark.parametrize(
    "kept",
    [
        list(zip(TRAIN, TEST, strict=True)),
        {"train": TRAIN, "test": TEST},
        {"test": TEST, "train": TRAIN},
        LISTS,
        {
            "train_losses": [2, 1],
            "train_acc": [0.3, 0.6],
            "val_loss": [2.2, 1.5],
            "val_accs": [0.2, 0.5],
        },
        {
            "loss": [2, 1],
            "acc": [0.3, 0.6],
            "valid_loss": [2.2, 1.5],
            "testing_accuracy": [0.2, 0.5],
        },
        LISTS | {"train_accuracy": [30, 60], "test_accuracy": [20.0, 50.0]},
        {name: np.array(values) for name, values in LISTS.items()},
        [{name: values[epoch] for name, values in LISTS.items()} for epoch in range(2)],
    ],
)
def test_what_students_keep_becomes_a_history(kept):
    [run] = runs_of(kept)
    frame = run.frame()
    assert frame["epoch"].tolist() == [1, 2]
    for name, values in LISTS.items():
        assert frame[name].tolist() == values, name


def test_histories_of_several_seeds_are_several_runs():
    one, other = nl.History.of(LISTS), {name: values[::-1] for name, values in LISTS.items()}
    assert [len(runs_of(each)) for each in (one, [one, one], [one, other], [other, other])] == [
        1,
        2,
        2,
        2,
    ]
    assert [run.last["test_loss"] for run in runs_of([one, other])] == [1.5, 2.2]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"train_loss": [1.0], "beauty": [2.0]}, "unknown quantity of a history 'beauty'"),
        (
            {"train_loss": [1.0, 2.0], "test_loss": [1.0]},
            "must have a value for each epoch: train_loss has 2, test_loss has 1",
        ),
    ],
)
def test_what_is_no_history_is_refused_in_one_sentence(kept, words):
    with pytest.raises(ValueError, match=words):
        nl.History.of(kept)


def test_histories_are_drawn_like_runs(tiny, tiny_network):
    run = nl.fit(tiny_network(), tiny, nl.Recipe(epochs=2, batch_size=32), progress=False)
    drawn = [
        nl.plot_curves({"a": each}, "test_loss").axes[0].lines[0].get_ydata().tolist()
        for each in (run, nl.History.of(run.history), run.history)
    ]
    assert drawn[0] == drawn[1] == drawn[2] == [row["test_loss"] for row in run.history]
    figure = nl.plot_loss_and_accuracy({"mine": run.history, "theirs": run})
    assert figure.axes[0].get_title() == f"Test loss, {tiny.source}"
    assert nl.plot_curves({"a": run.history}).axes[0].get_title() == "Test loss"


def test_a_quantity_that_no_epoch_has_is_named():
    with pytest.raises(ValueError, match="the history of 'mine' holds no test_loss"):
        nl.plot_curves({"mine": {"train_loss": [2.0, 1.0]}})


def test_a_run_from_a_history_knows_its_network(tiny, tiny_network):
    network = tiny_network()
    run = nl.Run.from_history(LISTS, network, source="my images")
    assert run.parameters == sum(weight.numel() for weight in network.parameters())
    assert (run.last["test_accuracy"], run.best["epoch"]) == (0.5, 2)
    found = nl.find_mistakes(run, tiny)
    assert found.total == nl.find_mistakes(network, tiny).total > 0
    assert nl.plot_curves({"mine": run}).axes[0].get_title() == "Test loss, my images"
    assert "test_accuracy=0.5000" in repr(run)


def test_what_is_drawn_needs_labels_and_all_quantities():
    with pytest.raises(ValueError, match="the history of 'mine' holds no test_accuracy"):
        nl.plot_loss_and_accuracy({"mine": {"train_loss": [2.0], "test_loss": [2.0]}})
    for wrong in (nl.History.of(LISTS), 7):
        with pytest.raises(TypeError, match="what to plot must be a Mapping"):
            nl.plot_curves(wrong)
    with pytest.raises(TypeError, match=r"a run or a history is needed for each label, not 2\.0"):
        nl.plot_curves({"a": 2.0})
