"""What is added in one place: each test adds one thing there, and nowhere else, and uses it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from matplotlib import pyplot
from torch import nn
from torch.nn.utils import parametrize

import normlab as nl
from normlab import assignments, augment, norms, optimizers, plots, recipes
from normlab.cli import main
from normlab.datasets import downloads, loading
from normlab.engines import choice
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine
from normlab.lessons.layer_table import receptive_fields
from normlab.support.colours import curve_styles
from normlab.support.figures import drawn, label_axes, new_axes, place_legend, shortened
from tests.test_plots import run_with

# --- a data set of torchvision's --------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 9), dtype=np.uint8)
LABELS = np.array([0, 1, 1, 0, 1, 0])


class MadeUp:
    """A class as torchvision's are: its files are there after a download, and are read."""

    def __init__(self, root, part, download):
        file = Path(root, "made-up", f"{part}.npy")
        if download:
            file.parent.mkdir(exist_ok=True)
            np.save(file, PIXELS if part == "train" else PIXELS[:2])
        self.pixels = np.load(file)
        self.truth = LABELS[: len(self.pixels)]


class LikeSvhn(MadeUp):
    """As SVHN and STL-10: (N, C, H, W), `labels`, and no names of classes."""

    def __init__(self, root, split="train", download=False):
        super().__init__(root, split, download)
        self.data, self.labels = self.pixels, self.truth


class LikeCifar(MadeUp):
    """As CIFAR-100: (N, H, W, C), a list of `targets`, and `classes`."""

    classes = ("dark", "light")

    def __init__(self, root, train=True, download=False):
        super().__init__(root, "train" if train else "test", download)
        self.data, self.targets = self.pixels.transpose(0, 2, 3, 1), self.truth.tolist()


class LikeUsps(LikeCifar):
    """As USPS and MNIST: (N, H, W) of grey, here as a tensor."""

    def __init__(self, root, train=True, download=False):
        super().__init__(root, train, download)
        self.data = torch.from_numpy(self.pixels[:, 0].copy())


@pytest.mark.parametrize("kind", [LikeSvhn, LikeCifar, LikeUsps])
def test_a_data_set_of_torchvisions_is_one_entry(kind, tmp_path, monkeypatch):
    files = ("made-up/train.npy", "made-up/test.npy")
    options = {}
    if kind is LikeSvhn:
        options["classes"] = ("dark", "light")
        options["parts"] = ({"split": "train"}, {"split": "test"})
    entry = downloads.Source("Made-Up", "https://example.org", files, **options)
    monkeypatch.setattr(torchvision.datasets, "MadeUp", kind, raising=False)
    monkeypatch.setitem(downloads.SOURCES, "made-up", entry)
    monkeypatch.setattr(loading, "DATASETS", ("digits", *downloads.SOURCES))  # as when imported

    for _ in ("downloaded", "there"):
        data = nl.load_dataset("made-up", tmp_path)
        pixels = PIXELS[:, :1] if kind is LikeUsps else PIXELS
        np.testing.assert_array_equal(data.train_images.numpy(), pixels)
        np.testing.assert_array_equal(data.test_images.numpy(), pixels[:2])
        assert data.train_labels.tolist() == LABELS.tolist()
        assert (data.classes, data.source) == (("dark", "light"), "Made-Up")
    (tmp_path / files[1]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"made-up is damaged .*delete it"):
        nl.load_dataset("made-up", tmp_path)


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


# --- a norm -----------------------------------------------------------------------------------


class MeanSquare(nn.Module):
    """x / √(mean of x² + ε) · scale, over the channels and positions of each image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        mean_square = x.square().mean((1, 2, 3), keepdim=True)
        return x / (mean_square + 1e-5).sqrt() * self.weight.view(-1, 1, 1)


@pytest.fixture
def rms(monkeypatch):
    """RMSNorm, which has no mean to subtract and no shift, is in the table of norms."""
    kind = norms.NormKind(
        "root mean square normalization",
        ("C", "H", "W"),
        "Zhang & Sennrich 2019",
        lambda channels, groups, size: MeanSquare(channels),
        moment="mean square",
        learned=("scale",),
    )
    monkeypatch.setitem(norms.NORMS, "rms", kind)
    yield kind
    pyplot.close("all")


def test_a_norm_is_an_entry_that_counts_what_its_layer_has(rms):
    layer, shape = nl.make_norm("RMSNorm", 4), (2, 4, 3, 2)
    assert isinstance(layer, MeanSquare)
    assert rms.statistics(shape) == len(nl.shared_statistics(layer, shape).unique()) == 2
    assert rms.parameters(shape) == sum(weight.numel() for weight in layer.parameters()) == 4
    with pytest.raises(ValueError, match="did you mean 'rms'"):
        nl.make_norm("rmss", 4)


@pytest.mark.parametrize("name", nl.NETWORKS)
def test_a_new_norm_is_in_every_network_and_learns(name, rms, digits, capsys):
    network = nl.build_network(name, "rms", input_shape=digits.input_shape, seed=0)
    made = [layer for layer in network.modules() if isinstance(layer, MeanSquare)]
    with_shift = nl.build_network(name, "ln", input_shape=digits.input_shape, seed=0)
    parameters = nl.summary(with_shift, digits.input_shape)
    shifts = sum(len(layer.weight) for layer in made)
    assert nl.summary(network, digits.input_shape) == parameters - shifts
    before = [layer.weight.clone() for layer in made]
    with nl.watch(network, every=1) as watched:
        run = nl.fit(
            *(network, digits.subset(64, 32), nl.Recipe(epochs=2, batch_size=32)),
            device="cpu",
            progress=False,
        )
    assert run.identity["network"]["norm"] == "rms"
    assert not any(map(torch.equal, before, [layer.weight for layer in made]))
    lines = nl.plot_watch({"RMSNorm": watched}, "std", kind="norm").axes[0].lines
    assert len(lines) == len(made)


def test_a_new_norm_is_drawn_and_listed(rms, capsys):
    assert nl.plot_norm_axes(("rms",)).axes[0].get_title() == "Root mean square normalization"
    title = nl.explore_norm("rms", form=False).get_suptitle()
    assert title.endswith(": N = 4 mean squares of 16 numbers; C = 4 learned numbers")
    assert nl.plot_shared(nl.make_norm("rms", 4), nl.example_batch()).axes
    assert main(["list"]) == 0
    assert "rms             root mean square normalization" in capsys.readouterr().out


def test_a_new_norm_is_told_from_other_layers(rms):
    mine, usual = (nl.build_network("mnist-l1", norm, seed=0) for norm in ("rms", "bn"))
    made = [layer for layer in mine.modules() if isinstance(layer, MeanSquare)]
    assert [layer for layer in mine.modules() if norms.is_norm(layer)] == made
    # Its statistics reach over the whole image; how far convolutions see is as with any other.
    assert receptive_fields(mine, (1, 28, 28)) == receptive_fields(usual, (1, 28, 28))


def test_a_new_norm_is_compared_with_others(rms, digits):
    assignment = nl.Assignment(
        *("rms", "RMSNorm and LN", "digits", ("ln", "rms")),
        recipe=nl.Recipe(epochs=1, batch_size=32),
        network="mnist-eva6",
    )
    results = nl.run_assignment(
        assignment, data=digits.subset(64, 32), seeds=1, device="cpu", progress=False
    )
    assert list(results.table()["variant"]) == ["LN", "RMS"]
    assert [finding.what for finding in nl.check_fair(results)] == ["parameters"]


# --- a transformation of weights --------------------------------------------------------------


class Standardized(nn.Module):
    """Weight standardization: each filter less its mean, over its standard deviation."""

    def forward(self, weight):
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return (weight - mean) / (std + 1e-5)


def standardized(network: nn.Module) -> nn.Module:
    for layer in [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]:
        parametrize.register_parametrization(layer, "weight", Standardized())
    return network


def test_weights_of_convolutions_may_be_transformed(tiny, tiny_network, tmp_path, capsys):
    recipe = nl.Recipe(epochs=2, batch_size=32, lr=0.1, l1=1e-4)
    options = {"device": "cpu", "progress": False, "directory": tmp_path}
    network = standardized(tiny_network("gn"))
    with nl.watch(network) as watched:
        run = nl.fit(network, tiny, recipe, **options)
    assert run.network.conv.weight.mean((1, 2, 3)).abs().max() < 1e-6
    assert run.last["penalty"] > 0
    assert watched.frame()["value"].notna().all()
    again = nl.fit(standardized(tiny_network("gn")), tiny, recipe, **options)
    assert again.history == run.history  # loaded
    nl.summary(network, tiny.input_shape)
    with pytest.raises(ValueError, match="no convolution, whose weights could be multiplied"):
        nl.rescale_weights(network, torch.zeros(2, 1, 12, 12))


def test_transformed_weights_are_compared_in_an_assignment(tiny, tiny_network):
    assignment = nl.Assignment(
        *("standardized", "BN and GN", "tiny", ("bn", "gn")),
        recipe=nl.Recipe(epochs=1, batch_size=32),
        build=lambda norm: standardized(tiny_network(norm)),
    )
    results = nl.run_assignment(assignment, data=tiny, seeds=1, device="cpu", progress=False)
    assert len(results.table()) == 2
    assert not nl.check_fair(results)


# --- an assignment and an augmentation ---------------------------------------------------------


def test_an_assignment_is_an_entry_in_a_table(digits, monkeypatch, capsys):
    mine = nl.Assignment(
        *("mine", "GN with two numbers of groups", "digits"),
        (nl.Variant("GN 2", "gn", groups=2), nl.Variant("GN 4", "gn", groups=4)),
        nl.Recipe(epochs=1, batch_size=32),
        network="cifar10-norms",
    )
    monkeypatch.setitem(assignments.ASSIGNMENTS, "mine", mine)
    few = digits.subset(64, 32)
    results = nl.run_assignment("mine", data=few, seeds=1, device="cpu", progress=False)
    assert list(results.table()["variant"]) == ["GN 2", "GN 4"]
    assert main(["list"]) == 0
    assert "mine            GN with two numbers of groups: GN 2, GN 4" in capsys.readouterr().out


def test_an_augmentation_is_an_entry_in_a_table(tiny, tiny_network, monkeypatch):
    def darken(images, rows, amount):
        """Makes one row of each image black."""
        row = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
        return torch.where(row == rows.view(-1, 1, 1, 1), 0, images)

    kind = augment.Kind(
        (8, 1, 12),
        draw=lambda count, amount, generator: torch.randint(
            int(amount), (count,), generator=generator
        ),
        apply=darken,
    )
    monkeypatch.setitem(augment.AUGMENTATIONS, "darken", kind)
    recipe = nl.Recipe(epochs=2, batch_size=32, augment=("darken:4", "flip"))
    run = nl.fit(tiny_network(), tiny, recipe, device="cpu", progress=False)
    assert run.identity["recipe"]["augment"] == ["darken:4", "flip"]
    images, _ = next(iter(tiny.loader(True, 8, augment=("darken:4",), shuffle=False)))
    assert (images[:, :, :4].amin((1, 3)) == images.min()).any(1).all()
    with pytest.raises(ValueError, match="the amount must be a number from 1 to 12"):
        nl.Recipe(augment=("darken:13",))
    assert nl.plot_samples(tiny, augment=("darken",)).axes
    pyplot.close("all")


# --- a plot -----------------------------------------------------------------------------------


@drawn
def plot_gap(runs, *, ax=None, title="Test loss less training loss"):
    ax = ax if ax is not None else new_axes(5, 3, names=len(runs))
    lines = []
    for (label, run), look in zip(runs.items(), curve_styles(runs).values(), strict=True):
        gap = run.frame()["test_loss"] - run.frame()["train_loss"]
        lines += ax.plot(gap, label=label, **look)
    label_axes(ax, title, "epoch", "difference (nats per image)")
    place_legend(ax, "best", [shortened(label) for label in runs], handles=lines)
    return ax.figure


def test_a_plot_is_a_function_that_looks_like_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "plot_gap", plot_gap, raising=False)
    monkeypatch.setitem(nl._HOME, "plot_gap", "plots")
    runs = {label: run_with(test_loss=[2.0, 1.0]) for label in ("BN", "$mine$", "_hidden")}
    with pyplot.style.context("dark_background"), pyplot.rc_context({"axes.titlesize": 40}):
        figure = nl.plot_gap(runs)
    (ax,) = figure.axes
    assert ax.lines[0].get_color() == nl.plot_curves(runs).axes[0].lines[0].get_color()
    assert ax.title.get_fontsize() == nl.plot_curves(runs).axes[0].title.get_fontsize()
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == [r"\$mine\$", "_hidden"]
    assert nl.save_figure(figure, tmp_path / "gap.png").is_file()
    with pytest.raises(ValueError, match="ending of a figure's name"):
        nl.save_figure(nl.plot_gap(runs), tmp_path / "gap.jpg")
