"""What is added in one place: each test adds one thing there, and nowhere else, and uses it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import normlab as nl
from normlab import optimizers, recipes
from normlab.datasets import downloads, loading
from normlab.engines import choice
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine

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
