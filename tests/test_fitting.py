"""`fit`: what it computes, that it computes it again, and that it goes on after an interruption."""

import errno
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

import normlab as nl
from normlab.engines import choice as engines
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine
from normlab.runs.folder import RunFolder
from normlab.support.locks import InUse

AUGMENT = ("shift:1", "flip")
RECIPE = nl.Recipe(epochs=3, batch_size=16, lr=0.1)


def fit(network, data, recipe=RECIPE, directory=None, **options):
    """`fit` on the CPU, where equal runs are equal bit for bit, and silent."""
    return nl.fit(
        network, data, recipe, directory=directory, device="cpu", progress=False, **options
    )


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same_run(one, other):
    assert without_seconds(one.history) == without_seconds(other.history)
    weights, others = one.network.state_dict(), other.network.state_dict()
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name
    assert torch.equal(one.predicted, other.predicted)
    assert torch.equal(one.probability, other.probability)


def on_training_batch(network, act):
    """Calls `act(number, images)` before every training batch; returns a function that ends it."""
    seen = 0

    def hook(module, inputs):
        nonlocal seen
        images = inputs[0]
        if module is network and module.training and images.any():  # not what only tries it
            seen += 1
            act(seen, images.detach().clone(memory_format=torch.contiguous_format))

    return network.register_forward_pre_hook(hook).remove


# --- what a training is ----------------------------------------------------------------------


def plain_training(network, data, recipe):
    """The recipe in a loop of one's own: float64, weights decay, L1, smoothing, one-cycle."""
    network.double()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
    )
    batches = data.loader(batch_size=recipe.batch_size, seed=recipe.seed, dtype=torch.float64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, recipe.epochs * len(batches), cycle_momentum=False
    )
    test_images, test_labels = next(iter(data.loader(False, 1000, dtype=torch.float64)))
    history = []
    for _ in range(recipe.epochs):
        network.train()
        losses, right, penalties = [], 0, []
        for images, labels in batches:
            logits = network(images)
            penalty = recipe.l1 * (network.conv.weight.abs().sum() + network.linear.weight.norm(1))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            (loss + penalty).backward()
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += int((logits.argmax(1) == labels).sum())
            penalties += [penalty.item()] * len(labels)
        network.eval()
        logits = network(test_images)
        history.append(
            {
                "train_loss": np.mean(losses),
                "train_accuracy": right / len(losses),
                "test_loss": F.cross_entropy(logits, test_labels).item(),
                "test_accuracy": (logits.argmax(1) == test_labels).double().mean().item(),
                "penalty": np.mean(penalties),
                "lr": rate,
            }
        )
    return history


@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "none"])
def test_fit_computes_what_a_plain_loop_computes(tiny, tiny_network, norm):
    # 20 does not divide 96: the mean over images is not that over batches.
    recipe = RECIPE.replace(
        batch_size=20, dtype="float64", weight_decay=1e-3, l1=1e-3, label_smoothing=0.1, seed=5
    )
    run = fit(tiny_network(norm), tiny, recipe)
    network = tiny_network(norm)
    history = plain_training(network, tiny, recipe)
    for row, expected in zip(run.history, history, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(run.network.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_a_network_learns_and_is_trained_in_place(tiny, tiny_network):
    network = tiny_network()
    run = fit(network, tiny, RECIPE.replace(epochs=6))
    assert run.network is network
    assert run.last["test_accuracy"] > 0.9
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4, 5, 6]


def test_the_last_epoch_is_that_of_the_final_weights(tiny, tiny_network):
    run = fit(tiny_network(), tiny)
    logits = nl.predict(run.network, tiny)
    right = (logits.argmax(1) == tiny.test_labels).double().mean().item()
    assert run.last["test_accuracy"] == right
    assert run.last["test_loss"] == pytest.approx(F.cross_entropy(logits, tiny.test_labels).item())


def test_a_network_of_ones_own_needs_nothing_from_normlab(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    data = digits.subset(300, 100)
    run = fit(network, data, nl.Recipe(epochs=3, batch_size=32, optimizer="adamw", lr=0.01))
    assert run.last["test_accuracy"] > 0.6
    assert run.parameters == 784 * 32 + 32 + 32 * 10 + 10
    assert run.config["is"]["network"]["class"] == "Sequential"


def test_a_float64_recipe_trains_and_keeps_float64(tiny, tiny_network, tmp_path):
    recipe = RECIPE.replace(dtype="float64")
    run = fit(tiny_network(), tiny, recipe, tmp_path)
    assert run.network.linear.weight.dtype == torch.float64
    assert_same_run(fit(tiny_network(), tiny, recipe, tmp_path), run)
    assert_same_run(fit(run.network, tiny, recipe, tmp_path), run)


# --- the same again --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(tiny, tiny_network, optimizer):
    recipe = RECIPE.replace(optimizer=optimizer, lr=0.02, augment=AUGMENT)
    one, same = (fit(tiny_network("gn", dropout=0.3), tiny, recipe) for _ in range(2))
    assert_same_run(one, same)
    other = fit(tiny_network("gn", dropout=0.3), tiny, recipe.replace(seed=1))
    assert without_seconds(other.history) != without_seconds(one.history)


def test_a_run_does_not_depend_on_the_global_random_state(tiny, tiny_network):
    recipe = RECIPE.replace(augment=AUGMENT)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(fit(tiny_network(dropout=0.3), tiny, recipe))
    assert_same_run(*runs)


class AlwaysDropping(nn.Module):
    """Forgets to tell its dropout when it is tested, so that it draws numbers then, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(144, 4)

    def forward(self, x):
        return self.linear(F.dropout(x.flatten(1), 0.2))


@pytest.mark.parametrize("forgetful", [False, True])
def test_fit_leaves_the_global_random_states_alone(tiny, tiny_network, forgetful):
    network = AlwaysDropping() if forgetful else tiny_network(dropout=0.3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fit(network, tiny, RECIPE.replace(augment=AUGMENT))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_all_variants_see_the_same_images_in_the_same_order(tiny, tiny_network):
    seen = []
    for norm, dropout, l1 in (("bn", 0.0, 0.0), ("bn", 0.0, 1e-3), ("gn", 0.5, 0.0), ("ln", 0, 0)):
        network, batches = tiny_network(norm, dropout=dropout), []
        on_training_batch(network, lambda _, images, batches=batches: batches.append(images))
        fit(network, tiny, RECIPE.replace(l1=l1, augment=AUGMENT))
        seen.append(torch.cat(batches))
    assert seen[0].shape == (3 * 96, 1, 12, 12)
    for others in seen[1:]:
        assert torch.equal(others, seen[0])
    first, second = seen[0][:96], seen[0][96:192]
    assert not torch.equal(first, second)


# --- interruptions ---------------------------------------------------------------------------

KILLED = """
import sys
import time

sys.path[:0] = [{tests!r}]
from conftest import make_tiny, make_tiny_network
from test_fitting import AUGMENT, RECIPE, fit, on_training_batch


def stall(number, images):
    if number == 2 * 6 + 3:  # in the middle of the third epoch
        print("ready", flush=True)
        time.sleep(300)


network = make_tiny_network(dropout=0.3)
on_training_batch(network, stall)
recipe = RECIPE.replace(epochs=5, optimizer={optimizer!r}, lr=0.02, augment=AUGMENT)
fit(network, make_tiny(), recipe, {directory!r})
"""


@pytest.mark.process
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_killed_training_goes_on_to_the_same_result(tiny, tiny_network, tmp_path, optimizer):
    script = KILLED.format(
        tests=str(Path(__file__).parent), optimizer=optimizer, directory=str(tmp_path)
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert process.returncode == (-signal.SIGKILL if hasattr(signal, "SIGKILL") else 1)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 2

    recipe = RECIPE.replace(epochs=5, optimizer=optimizer, lr=0.02, augment=AUGMENT)
    network, counted = tiny_network(dropout=0.3), []
    stop = on_training_batch(network, lambda number, _: counted.append(number))
    resumed = fit(network, tiny, recipe, tmp_path)
    stop()
    assert len(counted) == 3 * 6  # two of five epochs were not repeated
    assert_same_run(resumed, fit(tiny_network(dropout=0.3), tiny, recipe))
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [2, 6 + 4, 12 + 6])  # in the first, second and last epoch
def test_after_an_interrupt_the_same_call_with_the_same_network_goes_on(
    tiny, tiny_network, tmp_path, batch, dtype
):
    recipe = RECIPE.replace(dtype=dtype, augment=AUGMENT)
    network = tiny_network(dropout=0.3)

    def interrupt(number, _):
        if number == batch:
            raise KeyboardInterrupt

    stop = on_training_batch(network, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(network, tiny, recipe, tmp_path)
    stop()
    resumed = fit(network, tiny, recipe, tmp_path)
    assert_same_run(resumed, fit(tiny_network(dropout=0.3), tiny, recipe))


def test_an_error_before_the_first_epoch_leaves_the_network_as_it_was(
    tiny, tiny_network, tmp_path, monkeypatch
):
    network = tiny_network()

    def fail(*_):
        raise RuntimeError("of the test's own")

    def interrupt(number, _):
        if number == 14:
            raise KeyboardInterrupt

    stop = on_training_batch(network, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(network, tiny, directory=tmp_path)
    stop()
    with monkeypatch.context() as patch:
        patch.setattr(CpuEngine, "prepare", fail)  # when the checkpoint is in the network
        with pytest.raises(RuntimeError, match="of the test's own"):
            fit(network, tiny, directory=tmp_path)
    assert_same_run(fit(network, tiny, directory=tmp_path), fit(tiny_network(), tiny))


def test_an_interrupt_while_results_are_written_loses_no_epoch(
    tiny, tiny_network, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    network = tiny_network()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(network, tiny, RECIPE, tmp_path)
    on_training_batch(network, lambda *_: pytest.fail("an epoch was repeated"))
    resumed = fit(network, tiny, RECIPE, tmp_path)
    assert_same_run(resumed, fit(tiny_network(), tiny))


def test_after_a_full_disk_the_same_call_goes_on(tiny, tiny_network, tmp_path, full_disk):
    network = tiny_network("gn")
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*checkpoint\.safetensors"):
        fit(network, tiny, RECIPE, tmp_path)
    assert_same_run(fit(network, tiny, RECIPE, tmp_path), fit(tiny_network("gn"), tiny))


def test_without_a_directory_nothing_is_written(tiny, tiny_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(tiny_network(), tiny)
    assert run.directory is None
    assert list(tmp_path.iterdir()) == []


def test_the_config_tells_in_which_way_each_epoch_was_trained(tiny, tiny_network, tmp_path):
    network, directory = tiny_network("gn"), tmp_path / "run"

    def go_on_until(batch, engine):
        def interrupt(number, _):
            if number == batch:
                raise KeyboardInterrupt

        stop = on_training_batch(network, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(network, tiny, RECIPE, directory, engine=engine)
        stop()

    go_on_until(6 + 1, "plain")
    go_on_until(1, "plain")  # no epoch of it
    go_on_until(6 + 1, "plain")
    run = fit(network, tiny, RECIPE, directory)
    first, _, last = run.config["from"]["before"]
    assert [first["until_epoch"], last["until_epoch"]] == [1, 2]
    assert (first["engine"], first["because"]) == ("plain", "asked for by engine='plain'")
    assert (first["computes_in"], first["device"]) == ("float32", "cpu")
    assert first["threads"] == run.config["from"]["threads"] == torch.get_num_threads()
    assert run.config["from"]["engine"] == "cpu-channels-last"
    assert fit(network, tiny, RECIPE, directory).config == run.config


# --- networks and recipes that cannot work ---------------------------------------------------


class TwoOutputs(nn.Module):
    """Returns a pair, as networks with an auxiliary output do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(144, 4)

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        return logits, logits


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


def nothing_to_train():
    return flat(nn.Linear(144, 4).requires_grad_(False))


MISFITS = {
    "other number of classes": (lambda: flat(nn.Linear(144, 7)), ValueError, r"\(B, 4\).*\(2, 7\)"),
    "a map of logits": (lambda: nn.Conv2d(1, 4, 3), ValueError, r"\(B, 4\).*\(2, 4, 10, 10\)"),
    "more than one output": (TwoOutputs, TypeError, "tensor of logits, not a tuple"),
    "no parameters": (nn.Flatten, ValueError, "Flatten has no parameters"),
    "nothing to train": (nothing_to_train, ValueError, "no parameters to train"),
    "colour only": (lambda: nn.Conv2d(3, 4, 12), ValueError, r"cannot take .*\(1, 12, 12\)"),
    "other size": (lambda: flat(nn.Linear(784, 4)), ValueError, r"cannot take .*\(1, 12, 12\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path, case):
    make, error, message = MISFITS[case]
    network = make()
    with pytest.raises(error, match=message) as caught:
        fit(network, tiny, RECIPE, tmp_path / "run")
    assert type(network).__name__ in str(caught.value)
    assert network.training  # it is tried in evaluation mode
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch_size", [1, 95])
def test_batch_norm_on_single_pixels_of_a_single_image_is_explained(tiny, batch_size):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 12), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)
    )  # 12×12 to 1×1
    with pytest.raises(ValueError, match=f"no variance: .*other than {batch_size}$"):
        fit(network, tiny, RECIPE.replace(batch_size=batch_size))
    fit(network, tiny, RECIPE.replace(batch_size=94, epochs=1))  # the last batch has two


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_loss_that_is_no_number_is_explained_and_finished_epochs_are_kept(
    tiny, tiny_network, tmp_path, engine
):
    recipe = RECIPE.replace(lr=1e3, schedule="constant", epochs=5)
    network = tiny_network("none")
    with pytest.raises(FloatingPointError) as caught:
        fit(network, tiny, recipe, tmp_path, engine=engine)
    kept = (tmp_path / "history.csv").read_text().splitlines()[1:]
    assert len(kept) >= 1
    assert f"in epoch {len(kept) + 1}: try a lower learning rate than 1000" in str(caught.value)
    # Nothing is lost and nothing is different the next time.
    with pytest.raises(FloatingPointError, match=f"in epoch {len(kept) + 1}"):
        fit(network, tiny, recipe, tmp_path, engine=engine)
    assert (tmp_path / "history.csv").read_text().splitlines()[1:] == kept


# --- warnings --------------------------------------------------------------------------------


def test_a_network_that_learns_nothing_is_worth_one_warning(tiny, tiny_network):
    recipe = RECIPE.replace(lr=1e-9, epochs=6)
    with pytest.warns(UserWarning, match="after 5 epochs .* no better than .*1e-09") as caught:
        fit(tiny_network(), tiny, recipe)
    assert len(caught) == 1


def test_the_warning_points_at_the_call_of_fit(tiny, tiny_network):
    with pytest.warns(UserWarning, match="after 5 epochs") as caught:
        nl.fit(
            tiny_network(), tiny, RECIPE.replace(lr=1e-9, epochs=5), device="cpu", progress=False
        )
    assert caught[0].filename == __file__


def test_no_warning_comes_before_five_epochs(tiny, tiny_network, recwarn):
    fit(tiny_network(), tiny, RECIPE.replace(lr=1e-9, epochs=4))
    assert len(recwarn) == 0


def test_labels_that_are_all_the_same_are_what_the_warning_is_about(tiny, tiny_network):
    same = replace(tiny, train_labels=torch.ones_like(tiny.train_labels))
    with pytest.warns(UserWarning, match="all training images have the label 'b'") as caught:
        fit(tiny_network(), same, RECIPE.replace(epochs=5))
    assert len(caught) == 1


# --- modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_network_comes_back_in_evaluation_mode(tiny, tiny_network, tmp_path, training, engine):
    images, _ = next(iter(tiny.loader(False, 40)))
    for _ in ("trained", "loaded"):
        network = tiny_network().train(training)
        run = fit(network, tiny, RECIPE, tmp_path, engine=engine)
        assert not any(layer.training for layer in network.modules())
        assert torch.equal(run.network(images).argmax(1), run.predicted)
        fit(network, tiny, RECIPE, tmp_path)  # that look has changed nothing


def test_the_mode_before_does_not_matter(tiny, tiny_network):
    assert_same_run(fit(tiny_network().eval(), tiny), fit(tiny_network().train(), tiny))


def frozen(network):
    """Its batch normalization is frozen with statistics of its own."""
    network.norm.running_mean.fill_(0.25)
    network.norm.eval().requires_grad_(False)
    return network


def plainly_frozen(network, data):
    """Three epochs at a constant rate in a loop of one's own."""
    optimizer = torch.optim.SGD(network.conv.parameters(), lr=0.1)
    optimizer.add_param_group({"params": network.linear.parameters()})
    batches = data.loader(batch_size=16, dtype=torch.float64)
    for images, labels in (batch for _ in range(3) for batch in batches):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [PlainEngine, CpuEngine, GraphEngine])
def test_frozen_layers_keep_their_statistics(tiny, tiny_network, kind, monkeypatch):
    monkeypatch.setattr(engines, "_fastest", lambda *_: (kind, "a test"))
    recipe = RECIPE.replace(dtype="float64", schedule="constant", momentum=0.0)
    network, reference = frozen(tiny_network()), frozen(tiny_network()).double()
    run = fit(network, tiny, recipe)
    assert run.config["from"]["engine"] == kind.name
    plainly_frozen(reference, tiny)
    assert torch.equal(network.norm.running_mean, torch.full((8,), 0.25, dtype=torch.float64))
    assert network.norm.num_batches_tracked == 0
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [PlainEngine, CpuEngine, GraphEngine])
def test_a_norm_that_only_learns_nothing_moves_its_statistics(
    tiny, tiny_network, kind, monkeypatch
):
    monkeypatch.setattr(engines, "_fastest", lambda *_: (kind, "a test"))
    network = tiny_network()
    network.norm.requires_grad_(False)
    fit(network, tiny)  # in evaluation mode between the epochs
    assert network.norm.num_batches_tracked == 3 * 6


def test_an_interrupt_leaves_the_modes_by_which_the_same_call_goes_on(tiny, tiny_network, tmp_path):
    def stop(number, _):
        if number == 8:
            raise KeyboardInterrupt

    def make():
        network = tiny_network()
        network.norm.requires_grad_(False)  # in training mode: its statistics move
        return network

    network = make()
    remove = on_training_batch(network, stop)
    with pytest.raises(KeyboardInterrupt):
        fit(network, tiny, RECIPE, tmp_path)
    remove()
    assert all(layer.training for layer in network.modules())
    assert_same_run(fit(network, tiny, RECIPE, tmp_path), fit(make(), tiny))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_fit_needs_no_gradients_switched_on(tiny, tiny_network, off, engine):
    network = tiny_network()
    with off():
        run = fit(network, tiny, engine=engine)
    assert_same_run(run, fit(tiny_network(), tiny, engine=engine))


def test_a_network_of_inference_mode_cannot_be_trained(tiny, tiny_network):
    with torch.inference_mode():
        network = tiny_network()
    with pytest.raises(ValueError, match=r"TinyNetwork was built under torch\.inference_mode"):
        fit(network, tiny)


def test_a_norm_without_running_statistics_is_worth_a_warning(tiny, tiny_network):
    network = tiny_network()
    network.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.warns(UserWarning, match="layer 'norm' .* keeps no running statistics") as caught:
        nl.fit(network, tiny, RECIPE, device="cpu", progress=False)
    assert [each.filename for each in caught] == [__file__]
    with pytest.warns(UserWarning, match="the other images of its batch") as caught:
        whole, single = (nl.predict(network, tiny, batch_size=size) for size in (40, 1))
    assert [each.filename for each in caught] == [__file__] * 2
    assert not torch.allclose(whole, single, atol=0.01)


# --- two in one folder ------------------------------------------------------------------------

TRAINER = """
import json, pathlib, sys, time
import torch
from conftest import make_tiny, make_tiny_network
import normlab as nl
from normlab.runs.folder import RunFolder

keep = RunFolder.save_epoch

def keep_and_wait(folder, *state):  # so that the folder stays in use until the test says so
    keep(folder, *state)
    (folder.directory.parent / "training").touch()
    while not (folder.directory.parent / "go").exists():
        time.sleep(0.001)

RunFolder.save_epoch = keep_and_wait
torch.set_num_threads(1)
data, recipe = make_tiny(), nl.Recipe(epochs=3, batch_size=16, lr=0.1)
for line in sys.stdin:
    options = {"directory": line.strip(), "device": "cpu", "progress": False}
    run = nl.fit(make_tiny_network("gn"), data, recipe, **options)
    print(json.dumps([run.history, run.config]), flush=True)
"""


@contextmanager
def trainer():
    """A process that trains in every folder that it is told, and tells of the run."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process, folder):
    process.stdin.write(f"{folder}\n")
    process.stdin.flush()


def until_there(file):
    while not file.exists():
        time.sleep(0.001)


@pytest.mark.process
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_two_processes_in_one_folder_make_one_run(tmp_path, rounds):
    seen = []
    with trainer() as one, trainer() as other:
        for number in range(rounds):
            folder = tmp_path / str(number) / "run"
            first, second = random.sample([one, other], 2)
            tell(first, folder)
            until_there(folder.parent / "training")
            tell(second, folder)
            waits = second.stderr.readline()
            assert waits == f"{folder} is in use by another process; waiting\n"
            (folder.parent / "go").touch()
            trained, found = (
                json.loads(first.stdout.readline()),
                json.loads(second.stdout.readline()),
            )
            assert trained == found  # to the seconds: it was trained once
            assert set(os.listdir(folder)) == set(trained[1]["digests"]) | {"config.json"}
            seen.append((without_seconds(trained[0]), trained[1]["final_weights"]))
        for process in (one, other):
            process.stdin.close()
            assert process.stderr.read() == ""
    assert all(each == seen[0] for each in seen)


@pytest.mark.process
def test_when_a_process_is_killed_the_one_that_waits_goes_on(tiny, tiny_network, tmp_path):
    folder = tmp_path / "run"
    with trainer() as one, trainer() as other:
        tell(one, folder)
        until_there(tmp_path / "training")
        tell(other, folder)
        assert "waiting" in other.stderr.readline()
        before = RunFolder(folder).history_so_far()
        one.kill()
        (tmp_path / "go").touch()
        history, config = json.loads(other.stdout.readline())
    assert history[:1] == before  # to the seconds
    assert set(os.listdir(folder)) == set(config["digests"]) | {"config.json"}


def test_fresh_does_not_touch_a_folder_in_use(tiny, tiny_assignment, tmp_path):
    options = {"data": tiny, "directory": tmp_path, "device": "cpu", "progress": False}
    nl.run_assignment(tiny_assignment, **options)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with (
        FileLock(tmp_path / "ln" / "seed-0" / ".lock"),
        pytest.raises(InUse, match=r"ln.seed-0 is in use by another process: wait for its end, or"),
    ):
        nl.run_assignment(tiny_assignment, fresh=True, **options)
    assert before == {file: file.read_bytes() for file in before}


def test_without_locks_it_goes_on_and_says_so(tiny, tiny_network, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    run = fit(tiny_network(), tiny, directory=tmp_path)
    assert run.history == RunFolder(tmp_path).history_so_far()
    assert capsys.readouterr().err == (
        f"{tmp_path} cannot be locked: let no other process write there at the same time\n"
    )


# --- a schedule that depends on what was learned --------------------------------------------------

# So slow that the loss stays where it is.
PLATEAU = nl.Recipe(epochs=9, batch_size=32, lr=1e-6, momentum=0.0, schedule="plateau")


def test_plateau_is_the_loop_with_torchs_scheduler(tiny, tiny_network, one_thread):
    run = fit(tiny_network(seed=3), tiny, PLATEAU, engine="plain")
    network, batches = tiny_network(seed=3), tiny.loader(batch_size=32)
    optimizer = torch.optim.SGD(network.parameters(), lr=PLATEAU.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    rates, losses = [], []
    for _ in range(PLATEAU.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(nl.train_epoch(network, batches, optimizer, scheduler=scheduler).loss)
    assert [row["lr"] for row in run.history] == pytest.approx(rates)
    assert [row["train_loss"] for row in run.history] == pytest.approx(losses, rel=1e-5)
    assert rates[-1] < PLATEAU.lr


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_plateau_resumes_bit_for_bit(tiny, tiny_network, tmp_path, one_thread, engine):
    whole, network = fit(tiny_network(seed=3), tiny, PLATEAU, engine=engine), tiny_network(seed=3)
    eighth = 7 * 3 + 1  # batch, the first of the eighth epoch
    interrupted(network, tiny, tmp_path / "run", PLATEAU, batch=eighth, engine=engine)
    again = fit(tiny_network(seed=3), tiny, PLATEAU, engine=engine, directory=tmp_path / "run")
    assert_same_run(again, whole)
    assert again.history[-1]["lr"] < PLATEAU.lr


# --- a network of one's own, resumed --------------------------------------------------------------

OWN = """
import torch
from torch import nn


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(400, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.linear(x.flatten(1))
"""


NUMBERS = itertools.count()  # no two modules have the same name


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own(source)` makes an unseeded network by the class in a file of this source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(source=OWN, seed=None):
        number = next(NUMBERS)
        name = f"own_{number}"
        (tmp_path / f"{name}.py").write_text(source)
        torch.manual_seed(100 + number if seed is None else seed)
        kind = importlib.import_module(name).Own
        kind.__module__ = "own"
        return kind()

    return make


def interrupted(network, data, folder, recipe=RECIPE, *, batch=8, **options):
    """Ends a training of the network at a batch, by default within its second epoch."""

    def interrupt(number, _):
        if number == batch:
            raise KeyboardInterrupt

    remove = on_training_batch(network, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(network, data, recipe, folder, **options)
    remove()


def test_a_network_that_was_not_seeded_resumes_from_the_weights_kept(tiny, own, tmp_path):
    whole = fit(own(seed=7), tiny)
    interrupted(own(seed=7), tiny, tmp_path / "run")
    other = own()
    with pytest.warns(UserWarning, match="begun from other initial weights: those kept there"):
        resumed = fit(other, tiny, RECIPE, tmp_path / "run")
    assert_same_run(resumed, whole)
    assert resumed.identity["initial_weights"] == whole.identity["initial_weights"]
    with pytest.warns(UserWarning, match="begun from other initial weights"):
        loaded = fit(own(), tiny, RECIPE, tmp_path / "run")
    assert_same_run(loaded, whole)


def test_without_a_seed_a_finished_run_goes_on_at_a_constant_rate(tiny, own, tmp_path):
    recipe = RECIPE.replace(schedule="constant")
    fit(own(seed=7), tiny, recipe, tmp_path / "run")
    longer = recipe.replace(epochs=5)
    with pytest.warns(UserWarning, match="begun from other initial weights"):
        again = fit(own(), tiny, longer, tmp_path / "run")
    assert_same_run(again, fit(own(seed=7), tiny, longer))
    with pytest.raises(ValueError, match=r"something else \(recipe.lr is 0.1 there and 0.3 here\)"):
        fit(own(), tiny, longer.replace(lr=0.3), tmp_path / "run")


@pytest.mark.parametrize("finished", [False, True])
def test_comments_and_blank_lines_make_no_other_network(tiny, own, tmp_path, finished):
    commented = OWN.replace("        x = torch", "        # what it does\n\n        x =  torch")
    commented = commented.replace(
        "(self, x):", "(\n        self,\n        x,\n    ):\n        'Logits.'"
    )
    if finished:
        fit(own(seed=7), tiny, RECIPE, tmp_path / "run")
    else:
        interrupted(own(seed=7), tiny, tmp_path / "run")
    again = fit(own(commented, seed=7), tiny, RECIPE, tmp_path / "run")
    assert_same_run(again, fit(own(seed=7), tiny))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("seed", [7, None])
def test_changed_code_is_another_network_and_what_to_do_is_said(
    tiny, own, tmp_path, finished, seed
):
    if finished:
        fit(own(seed=7), tiny, RECIPE, tmp_path / "run")
    else:
        interrupted(own(seed=7), tiny, tmp_path / "run")
    changed = OWN.replace("torch.relu", "torch.tanh")
    with pytest.raises(ValueError, match=r"network.program differs.* choose another directory, or"):
        fit(own(changed, seed=seed), tiny, RECIPE, tmp_path / "run")


def test_another_global_number_is_another_network(tiny, own, tmp_path):
    drops = OWN.replace("class Own", "P = 0.1\n\n\nclass Own").replace(
        "x.flatten(1))", "nn.functional.dropout(x.flatten(1), P, self.training))"
    )
    fit(own(drops, seed=7), tiny, RECIPE, tmp_path / "run")
    with pytest.raises(ValueError, match=r"network.program differs"):
        fit(own(drops.replace("P = 0.1", "P = 0.5"), seed=7), tiny, RECIPE, tmp_path / "run")


def negated(network):
    network.register_forward_hook(lambda module, inputs, logits: -logits)


def negated_in_training(network):
    network.register_forward_hook(
        lambda module, inputs, logits: -logits if module.training else logits
    )


def with_dropout(network):
    network.p = 0.6


def with_noise(network):
    network.sd = 2.0


DROPS = OWN.replace(
    "super().__init__()", "super().__init__()\n        self.p, self.sd = 0.1, 0.0"
).replace(
    "x.flatten(1))",
    "nn.functional.dropout(x.flatten(1), self.p, self.training))"
    " + self.training * self.sd * torch.randn(len(x), 4)",
)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize("change", [negated, negated_in_training, with_dropout, with_noise])
def test_what_the_code_does_not_show_is_seen(tiny, own, tmp_path, finished, seed, change):
    if finished:
        fit(own(DROPS, seed=7), tiny, RECIPE, tmp_path / "run")
    else:
        interrupted(own(DROPS, seed=7), tiny, tmp_path / "run")
    other = own(DROPS, seed=seed)
    change(other)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"run that is something else \((logits|numbers)"):
        fit(other, tiny, RECIPE, tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_the_kept_weights_are_tried_before_an_unseeded_network_goes_on(
    tiny, own, tmp_path, monkeypatch
):
    interrupted(own(seed=7), tiny, tmp_path / "run")
    monkeypatch.setattr("normlab.runs.identity.probe", lambda *_, **__: {})
    other = own()
    negated(other)
    with (
        pytest.raises(ValueError, match="with the weights kept there the test loss is"),
        pytest.warns(UserWarning, match="other initial weights"),
    ):
        fit(other, tiny, RECIPE, tmp_path / "run")


def test_the_trained_network_itself_goes_on_for_more_epochs(tiny, own, tmp_path):
    recipe = RECIPE.replace(schedule="constant")
    network = own(seed=7)
    fit(network, tiny, recipe, tmp_path / "run")
    again = fit(network, tiny, recipe.replace(epochs=5), tmp_path / "run")
    assert_same_run(again, fit(own(seed=7), tiny, recipe.replace(epochs=5)))


def test_fit_says_that_a_network_was_trained_before(tiny, tiny_network, capsys):
    for norm in ("bn", "gn"):
        network, said = tiny_network(norm), "the network was trained before"
        nl.fit(network, tiny, RECIPE, device="cpu")
        assert said not in capsys.readouterr().out
        nl.fit(network, tiny, RECIPE, device="cpu")
        assert said in capsys.readouterr().out


CONSTANT = RECIPE.replace(schedule="constant", momentum=0.9, augment=AUGMENT)


def test_at_a_constant_rate_a_finished_run_goes_on_for_more_epochs(tiny, tiny_network, tmp_path):
    fit(tiny_network(dropout=0.2), tiny, CONSTANT, tmp_path)
    longer = CONSTANT.replace(epochs=5)
    again = fit(tiny_network(dropout=0.2), tiny, longer, tmp_path)
    assert_same_run(again, fit(tiny_network(dropout=0.2), tiny, longer))
    assert again.identity["recipe"]["epochs"] == 5
    assert_same_run(fit(tiny_network(dropout=0.2), tiny, longer, tmp_path), again)
    with pytest.raises(
        ValueError, match=r"recipe.epochs is 5 there and 3 here; for more epochs only a run"
    ):
        fit(tiny_network(dropout=0.2), tiny, CONSTANT, tmp_path)


def test_interrupted_beyond_its_first_end_a_run_goes_on_there(tiny, tiny_network, tmp_path):
    fit(tiny_network(), tiny, CONSTANT, tmp_path)
    longer, network = CONSTANT.replace(epochs=5), tiny_network()

    interrupted(network, tiny, tmp_path, longer, batch=8)  # in the fifth epoch
    assert_same_run(fit(network, tiny, longer, tmp_path), fit(tiny_network(), tiny, longer))


@pytest.mark.parametrize(
    ("changes", "why"),
    [({}, "for more epochs only"), ({"schedule": "constant"}, "more epochs need its checkpoint")],
)
def test_other_finished_runs_say_why_they_do_not_go_on(tiny, tiny_network, tmp_path, changes, why):
    recipe = RECIPE.replace(**changes)
    fit(tiny_network(), tiny, recipe, tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"epochs is 3 there and 5 here; {why}"):
        fit(tiny_network(), tiny, recipe.replace(epochs=5), tmp_path)
