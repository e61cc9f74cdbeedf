"""All engines take one step, that of `training.py`, and compute what the plain loop computes."""

import math

import pytest
import torch
import torch.nn.functional as F

import normlab as nl
from normlab import training
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine
from normlab.norms import NORMS

FAST = (CpuEngine, GraphEngine)
ALL = (PlainEngine, *FAST)


# --- one step --------------------------------------------------------------------------------


def changed_step(network, images, labels, optimizer, **options):
    """A step that a student might try: it learns nothing but the biases of the last layer."""
    logits = network(images)
    optimizer.zero_grad()
    F.cross_entropy(logits, labels).backward()
    for name, weight in network.named_parameters():
        weight.grad = weight.grad if name == "linear.bias" else None
    optimizer.step()
    return logits.detach(), 0.25


@pytest.mark.parametrize("kind", ALL)
def test_what_is_changed_in_the_step_is_what_every_engine_does(
    kind, tiny, tiny_network, fit_with, monkeypatch
):
    monkeypatch.setattr(training, "train_step", changed_step)
    run = fit_with(kind, tiny, nl.Recipe(epochs=2, batch_size=40), network=tiny_network())
    before, after = tiny_network().state_dict(), run.network.state_dict()
    learned = [k for k in after if "norm." not in k and not torch.equal(after[k], before[k])]
    assert learned == ["linear.bias"]
    assert [row["penalty"] for row in run.history] == [0.25, 0.25]


def test_what_is_changed_in_the_step_is_what_the_range_test_does(tiny, tiny_network, monkeypatch):
    recipe = nl.Recipe(batch_size=32)
    as_it_is = nl.find_rate(tiny_network(), tiny, recipe, steps=20, device="cpu")
    monkeypatch.setattr(training, "train_step", changed_step)
    with pytest.warns(UserWarning, match="never fell"):
        changed = nl.find_rate(tiny_network(), tiny, recipe, steps=20, device="cpu")
    assert changed.losses[0] == as_it_is.losses[0]
    assert changed.losses[-1] != as_it_is.losses[-1]


# --- the same numbers ------------------------------------------------------------------------


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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:.*no better than always guessing")
def test_fifty_steps_in_float64_agree_with_the_plain_loop(norm, noise, fit_with, assert_close):
    # A rate at which training is stable: elsewhere rounding errors grow with every step.
    recipe = nl.Recipe(epochs=17, batch_size=8, lr=0.01, l1=1e-4, augment="flip", dtype="float64")
    runs = []
    for kind in ALL:
        # Norm before ReLU: after it, instance norm and global pooling leave nothing to learn.
        network = nl.build_network(
            "cifar10-norms", norm, dropout=0.0, input_shape=noise.input_shape, seed=1
        )
        runs.append(fit_with(kind, noise, recipe, network=network))
    assert 17 * 3 >= 50
    for fast in runs[1:]:
        assert_close(fast, runs[0], 1e-9)


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
def test_every_optimizer_and_schedule_agrees(changes, tiny, tiny_network, fit_with, assert_close):
    augment = ("shift:2", "rotate")
    recipe = nl.Recipe(epochs=4, batch_size=40, augment=augment, dtype="float64").replace(**changes)
    runs = [fit_with(kind, tiny, recipe, network=tiny_network()) for kind in ALL]
    for fast in runs[1:]:
        assert_close(fast, runs[0], 1e-9)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("norm", ["bn", "gn", "ln-elementwise"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.03)])
def test_a_few_steps_agree(kind, norm, dtype, tolerance, tiny, tiny_network, fit_with):
    recipe = nl.Recipe(epochs=1, batch_size=40, lr=0.01, dtype=dtype)
    fast, plain = (
        fit_with(way, tiny, recipe, network=tiny_network(norm)) for way in (kind, PlainEngine)
    )
    start = tiny_network(norm).state_dict()
    for name, value in plain.network.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            step = (value - start[name]).norm()
            assert (fast.network.state_dict()[name] - value).norm() <= tolerance * step, name


@pytest.mark.parametrize("kind", ALL)
def test_bfloat16_is_mixed_precision_in_training_alone(kind, tiny, tiny_network, fit_with):
    seen = {True: set(), False: set()}

    class Watching(type(tiny_network())):
        def forward(self, x):
            if torch.is_grad_enabled() or not self.training:  # not when its identity is found
                seen[self.training].add((x.dtype, self.conv(x).dtype))
            return super().forward(x)

    def trained(dtype):
        network = tiny_network()
        network.__class__ = Watching
        recipe = nl.Recipe(epochs=1, batch_size=40, dtype=dtype)
        return fit_with(kind, tiny, recipe, network=network)

    half = trained("bfloat16")
    assert seen == {
        True: {(torch.float32, torch.bfloat16)},
        False: {(torch.float32, torch.float32)},
    }
    assert half.config["from"]["computes_in"] == "bfloat16"
    tested = nl.test_epoch(half.network, tiny.loader(False))
    assert half.last["test_loss"] == pytest.approx(tested.loss, rel=1e-5)
    whole = trained("float32")
    assert whole.last["train_loss"] != half.last["train_loss"]
    assert whole.last["train_loss"] == pytest.approx(half.last["train_loss"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FAST)
def test_an_interrupted_run_resumes_to_the_same_weights(
    kind, dtype, few_digits, fit_with, monkeypatch, tmp_path
):
    recipe = nl.Recipe(epochs=3, batch_size=32, optimizer="adamw", lr=0.01, augment=("shift:1",))
    recipe = recipe.replace(dtype=dtype)
    whole = fit_with(kind, few_digits, recipe)

    def stop_after_two(folder, network, optimizer, history):
        save(folder, network, optimizer, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    save = nl.runs.folder.RunFolder.save_epoch
    monkeypatch.setattr(nl.runs.folder.RunFolder, "save_epoch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit_with(kind, few_digits, recipe, directory=tmp_path)
    monkeypatch.setattr(nl.runs.folder.RunFolder, "save_epoch", save)
    resumed = fit_with(kind, few_digits, recipe, directory=tmp_path)
    for name, value in resumed.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[name]), name


def test_dropout_in_the_fast_loop_trains_as_well_as_the_plain_one(tiny, tiny_network, fit_with):
    def final_losses(kind):
        """Training losses of ten seeds."""
        losses = []
        for seed in range(10):
            network = tiny_network(seed=seed, dropout=0.4)
            recipe = nl.Recipe(epochs=4, batch_size=32, seed=seed)
            losses.append(fit_with(kind, tiny, recipe, network=network).last["train_loss"])
        return torch.tensor(losses)

    fast, plain = map(final_losses, (CpuEngine, PlainEngine))
    error = math.sqrt((fast.var() + plain.var()) / 10)
    assert abs(fast.mean() - plain.mean()) < 4 * error
    assert not torch.equal(fast, plain)  # it did compute in another way


@pytest.mark.parametrize("kind", FAST)
def test_the_layout_is_changed_once_and_changed_back_after_errors_too(
    kind, few_digits, fit_with, monkeypatch
):
    network = nl.build_network("mnist-l1", dropout=0.0, seed=1)
    layout_of = {CpuEngine: torch.channels_last, GraphEngine: torch.contiguous_format}
    layouts, move = [], network.to

    def to(**options):
        layouts.extend(filter(None, [options.get("memory_format")]))
        return move(**options)

    monkeypatch.setattr(network, "to", to)
    fit_with(kind, few_digits, nl.Recipe(epochs=2), network=network)
    assert layouts == [layout_of[kind], torch.contiguous_format]
    monkeypatch.setattr(kind, "collect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_with(kind, few_digits, nl.Recipe(epochs=2), network=network)
    assert layouts == [layout_of[kind], torch.contiguous_format] * 2
    assert all(weight.is_contiguous() for weight in network.parameters())
