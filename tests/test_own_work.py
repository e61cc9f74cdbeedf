"""Students' own work, in small imitations of their repositories: from a model to a report."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision import transforms

import normlab as nl

# --- their models -----------------------------------------------------------------------------


class ByName(nn.Module):
    """A norm by its letter, layers in Sequentials, a view and log_softmax at the end."""

    def __init__(self, norm_type="BN"):
        super().__init__()
        self.norm_type = norm_type
        self.conv1 = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), self.norm(8, 10), nn.Dropout(0.05)
        )
        self.conv2 = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.ReLU(), self.norm(4, 8))
        self.gap = nn.AvgPool2d(kernel_size=8)

    def norm(self, channels, side):
        if self.norm_type == "BN":
            return nn.BatchNorm2d(channels)
        if self.norm_type == "LN":
            return nn.LayerNorm([channels, side, side])
        return nn.GroupNorm(2, channels)

    def forward(self, x):
        x = self.gap(self.conv2(self.conv1(x)))
        return F.log_softmax(x.view(-1, 4), dim=-1)


class Functional(nn.Module):
    """Functional layers, and a head of linear ones."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * 6 * 6, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        return self.fc2(F.dropout(F.relu(self.fc1(torch.flatten(x, 1))), 0.1, self.training))


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch normalization over parts of the batch, as several of the repositories have it."""

    def forward(self, x):
        if not self.training or len(x) % 2:
            return super().forward(x)
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in x.chunk(2)])


def with_ghosts(norm="gbn"):
    layer = GhostBatchNorm(8) if norm == "gbn" else nl.make_norm(norm, 8, groups=2)
    body = nn.Conv2d(1, 8, 3), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*body, nn.Conv2d(8, 4, 1), nn.Flatten())


MODELS = [ByName, lambda: ByName("LN"), lambda: ByName("GN"), Functional, with_ghosts]


# --- their loaders and loops ------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    """A data set of one's own: pictures, a transform, `classes`."""

    def __init__(self, data, train, transform):
        part = "train" if train else "test"
        self.images = [image[0].numpy() for image in getattr(data, f"{part}_images")]
        self.targets, self.classes = getattr(data, f"{part}_labels").tolist(), list(data.classes)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.targets[index]


HALF = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])


def loaders(data):
    return [DataLoader(Pictures(data, train, HALF), 16, shuffle=train) for train in (True, False)]


SCHEDULERS = {
    "none": lambda optimizer: None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_an_own_loop_ends_in_a_report(tiny, tmp_path, make, schedule):
    torch.manual_seed(1)
    network, (train, test) = make(), loaders(tiny)
    optimizer = optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scheduler, history = SCHEDULERS[schedule](optimizer), nl.History()
    for _ in range(2):
        trained = nl.train_epoch(network, train, optimizer, scheduler=scheduler, l1=1e-4)
        history.add(trained, nl.test_epoch(network, test))
    assert history[-1]["test_loss"] < history[0]["train_loss"]
    wrong = nl.find_mistakes(network, test, mean=(0.5,), std=(0.5,))
    accuracy = (nl.predict(network, test).argmax(1) == tiny.test_labels).double().mean().item()
    assert wrong.tested - wrong.total == round(40 * accuracy)
    assert accuracy == pytest.approx(history[-1]["test_accuracy"])
    assert wrong.classes == tiny.classes
    assert torch.equal(wrong.images, tiny.test_images[wrong.index])
    nl.plot_mistakes(wrong, title="mine")
    page = nl.write_report({"mine": history, "again": [history, history]}, tmp_path).read_text()
    assert f"{100 * accuracy:.2f}" in page
    assert {file.name for file in tmp_path.glob("*.png")} == {
        *("test-loss.png", "test-accuracy.png", "training-and-test.png")
    }


@pytest.mark.parametrize("make", MODELS)
def test_an_own_model_is_fitted_and_summarised(tiny, capsys, make):
    torch.manual_seed(1)
    network = make()
    parameters = nl.summary(network, input_size=(1, 12, 12))
    assert f"{parameters:,}" in capsys.readouterr().out
    run = nl.fit(network, tiny, nl.Recipe(epochs=4, batch_size=16), device="cpu", progress=False)
    assert run.parameters == parameters
    assert run.last["test_accuracy"] > 0.25
    assert len(nl.find_mistakes(run, tiny)) <= 10


def test_three_norms_of_an_own_model_are_compared(tiny, tmp_path):
    assignment = nl.Assignment(
        *("own", "BN, LN and GN", "tiny", ("BN", "LN", "GN")),
        build=ByName,
        recipe=nl.Recipe(epochs=1, batch_size=16, optimizer="adam", lr=0.01, schedule="step"),
    )
    results = nl.run_assignment(assignment, data=tiny, device="cpu", progress=False)
    page = nl.write_report(results, tmp_path).read_text()
    for told in ("LayerNorm over C, H, W", "GroupNorm of 2 groups", "BatchNorm2d over N, H, W"):
        assert told in page
    assert list(results) == ["BN", "LN", "GN"]


def test_the_histories_that_students_keep_are_drawn(tmp_path):
    losses = {"train_losses": [1.9, 1.2], "test_losses": [1.5, 1.1]}
    kept = losses | {"train_acc": np.array([0.4, 0.6]), "test_acc": np.array([0.5, 0.7])}
    assert nl.write_report({"BN": kept, "GN": [kept, kept]}, tmp_path).is_file()
    assert "70.00" in (tmp_path / "report.md").read_text()
    nl.plot_loss_and_accuracy({"BN": kept})
    assert pyplot.get_fignums()


def test_a_penalty_over_all_parameters_is_that_of_a_loop(tiny, one_thread):
    """The usual `sum(p.abs().sum() for p in model.parameters())`."""
    recipe = nl.Recipe(epochs=1, batch_size=96, lr=0.1, momentum=0, schedule="constant", l1=1e-3)
    both = [with_ghosts("gn").double() for _ in range(2)]
    both[1].load_state_dict(both[0].state_dict())
    run = nl.fit(
        both[0],
        tiny,
        recipe.replace(l1_over="all", dtype="float64"),
        device="cpu",
        progress=False,
    )
    [(images, labels)] = tiny.loader(batch_size=96, dtype=torch.float64)
    penalty = 1e-3 * sum(weight.abs().sum() for weight in both[1].parameters())
    (F.cross_entropy(both[1](images), labels) + penalty).backward()
    assert run.history[0]["penalty"] == pytest.approx(penalty.item())
    for mine, theirs in zip(both[0].parameters(), both[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


@pytest.mark.parametrize("augment", ["cutout:4", "jitter:0.3", "affine:15"])
def test_the_augmentations_of_albumentations_have_their_like(tiny, augment):
    recipe = nl.Recipe(epochs=1, batch_size=16, augment=(augment, "shift:1"))
    run = nl.fit(with_ghosts(), tiny, recipe, device="cpu", progress=False)
    assert np.isfinite(run.last["test_loss"])


def test_the_homework_of_the_teaching_page_marks_right_and_wrong_work(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "notebooks" / "teaching.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    right = (
        "def batch_norm(x, eps=1e-5):\n"
        "    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True{})\n"
        "    return (x - mean) / (var + eps).sqrt()\n"
        "def penalty(network, factor):\n"
        "    return factor * sum(w.abs().sum() for w in network.parameters() if w.dim() > 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for correction, mistakes in ((", correction=0", set()), ("", {"test_batch_norm: True"})):
        (tmp_path / "work.py").write_text(right.format(correction))
        sys.modules.pop("work", None)
        importlib.invalidate_caches()
        tests: dict = {}
        exec(compile(program, "test_work.py", "exec"), tests)
        found = set()
        for name in ("test_batch_norm", "test_penalty"):
            try:
                tests[name]()
            except AssertionError as error:
                found.add(f"{name}: {'n − 1' in str(error)}")
        assert found == mistakes
