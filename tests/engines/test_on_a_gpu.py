"""On a GPU: the captured step computes what the plain loop computes. `pytest -m cuda` runs these.

Where torch sees no NVIDIA GPU they are skipped. What can be tested without one is tested beside
them: `test_cuda_graph.py`, `test_agreement.py`.
"""

import pytest
import torch

import normlab as nl
from normlab.datasets.loading import load_assignment_data
from normlab.engines.agreement import disagreement
from normlab.engines.choice import make_engine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import training_batches
from normlab.norms import NORMS
from normlab.runs.folder import RunFolder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPE = nl.Recipe(epochs=3, batch_size=40, lr=0.02, augment=("shift:1", "flip"), dtype="float32")


def fit(network, data, recipe=RECIPE, **options):
    run = nl.fit(network, data, recipe, device="cuda", progress=False, **options)
    assert run.config["from"]["engine"] == options.get("engine", "cuda-graph")
    return run


def state_of(run):
    return run.network.state_dict()


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", nl.recipes.OPTIMIZERS)
@pytest.mark.parametrize("name", nl.NETWORKS)
def test_steps_of_every_network_and_optimiser_agree_with_the_plain_loop(name, optimizer):
    assignment = nl.ASSIGNMENTS[name]
    data = load_assignment_data(assignment, "digits").subset(train=300, test=100)
    recipe = assignment.recipe.replace(optimizer=optimizer, l1=1e-5)
    for norm in NORMS:
        network = nl.build_network(name, norm, seed=0).cuda()
        train = training_batches(data, recipe, torch.device("cuda"))
        tests = data.loader(False, 64, device="cuda")
        engine, why = make_engine("auto", network, recipe, train, tests)
        assert type(engine) is GraphEngine, why
        assert disagreement(engine) == "", norm


def test_half_precision_is_finite_and_within_three_points(digits):
    runs = [
        fit(nl.build_network("mnist-l1", seed=0), digits, RECIPE.replace(epochs=8, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    whole, half = (run.last for run in runs)
    assert all(value == value for value in half.values())
    assert half["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.03)


# --- dropout ---------------------------------------------------------------------------------


class KeptMasks(torch.nn.Module):
    """Keeps the masks of all its steps, in a buffer that a graph fills."""

    def __init__(self):
        super().__init__()
        self.dropout, self.linear = torch.nn.Dropout(0.5), torch.nn.Linear(144, 4)
        self.register_buffer("masks", torch.zeros(64, 144, dtype=torch.bool))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        kept = self.dropout(torch.ones_like(x[:1].flatten(1)))
        if self.training:
            self.masks.index_copy_(0, self.step, kept == 0)
            self.step += 1
        return self.linear(x.flatten(1) * kept)


def test_masks_differ_between_steps_and_between_epochs(tiny):
    run = fit(KeptMasks(), tiny)  # 3 epochs of 40, 40 and 16 images
    masks = run.network.masks[:9]
    assert run.network.step.item() == 9
    assert len(masks.unique(dim=0)) == 9
    assert 0.4 < masks.float().mean() < 0.6


# --- several, interrupted, failed -------------------------------------------------------------


def test_two_in_flight_give_what_each_gives_alone(tiny, tiny_network, tiny_assignment):
    # Equal but for rounding errors: cuDNN picks algorithms by timing them.
    together = nl.run_assignment(tiny_assignment, data=tiny, device="cuda", progress=False)
    for variant in tiny_assignment.variants[1:]:
        (run,) = together[variant.label]
        assert run.provenance["at_once"] == 3
        single = nl.Assignment(
            "one", "one", "tiny", (variant,), run.recipe, build=type(run.network)
        )
        ((alone,),) = nl.run_assignment(
            single, data=tiny, device="cuda", progress=False
        ).runs.values()
        for name, value in state_of(alone).items():
            torch.testing.assert_close(state_of(run)[name], value, rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_ends_as_a_whole_one(tiny, tiny_network, tmp_path, monkeypatch):
    whole = fit(tiny_network("gn"), tiny)

    def stop_after_one(folder, network, optimizer, history):
        save(folder, network, optimizer, history)
        raise KeyboardInterrupt

    save = RunFolder.save_epoch
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_network("gn"), tiny, directory=tmp_path)
    resumed = fit(tiny_network("gn"), tiny, directory=tmp_path)
    for name, value in state_of(whole).items():
        torch.testing.assert_close(state_of(resumed)[name], value, rtol=1e-3, atol=1e-5)


class Reading(torch.nn.Module):
    """Reads a number in its forward pass, which no capture allows."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) * (1 if x.sum().item() > -1e9 else 2)


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="after a failed capture torch makes no other"
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_after_a_failed_capture_come_a_plain_run_and_a_good_one(dropout, tiny, tiny_network):
    reading = Reading(tiny_network(dropout=dropout))
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        plain = nl.fit(reading, tiny, RECIPE, device="cuda", progress=False)
    assert plain.config["from"]["engine"] == "plain"
    assert plain.last["train_loss"] < plain.history[0]["train_loss"]
    fit(tiny_network(dropout=dropout), tiny)


def test_a_network_trained_by_hand_before_trains_on_the_plain_path(tiny, tiny_network):
    network = tiny_network().cuda()
    images, labels = next(iter(tiny.loader(device="cuda")))
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    with pytest.warns(UserWarning, match="del loss"):
        nl.fit(network, tiny, RECIPE, device="cuda", progress=False)
    del loss
    fit(network, tiny)
