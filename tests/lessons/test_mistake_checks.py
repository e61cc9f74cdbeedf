"""Misclassified images in any form pass, and wrong ones hear the name of their mistake."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normlab as nl

pytestmark = pytest.mark.usefixtures("enough_time")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 4, 5), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (60,), generator=generator)
    names = ("cat", "dog", "owl")
    parts = (images[:30], labels[:30], images[30:], labels[30:])
    return nl.Dataset("made-up", *parts, names, "made up")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 3)).eval()


@pytest.fixture(scope="module")
def found(data, network):
    return nl.find_mistakes(network, data, 10)


def shown(found):
    """What the following change: images in [0, 1], true and predicted classes."""
    return [*zip(found.images / 255, found.true.tolist(), found.predicted.tolist(), strict=True)]


def collected(network, loader):
    """As students write it: the first ten, normalised as the loader gives them."""
    rows = []
    with torch.no_grad():
        for images, labels in loader:
            guess = network(images).argmax(1)
            for image, label, predicted in zip(images, labels, guess, strict=True):
                if label != predicted and len(rows) < 10:
                    rows.append((image * 0.2 + 0.5, label.item(), predicted.item()))
    return rows


@pytest.mark.parametrize(
    "form",
    [
        lambda found: found,
        shown,
        lambda found: [*zip(*shown(found), strict=True)],
        lambda found: (found.images, found.true, found.predicted),
        lambda found: (found.images.squeeze(1).numpy(), [*found.true], found.predicted.numpy()),
        lambda found: [{"img": i, "label": t, "pred": p} for i, t, p in shown(found)],
        lambda found: {"image": found.images, "y_pred": found.predicted, "target": found.true},
        lambda found: [
            (i.movedim(0, 2), found.classes[t], found.classes[p]) for i, t, p in shown(found)
        ],
        lambda found: lambda model, test_loader: shown(found),
    ],
)
def test_any_form_passes(form, found, network, data):
    result = nl.check_mistakes(form(found), network, data)
    assert result, str(result)


def test_images_of_a_loader_pass(network, data):
    images = data.test_images / 255
    loader = DataLoader(TensorDataset(images, data.test_labels), batch_size=7)
    with torch.no_grad():
        guess = network(images).argmax(1)
    wrong = (guess != data.test_labels).nonzero().flatten()[:10]
    triple = (images[wrong], data.test_labels[wrong], guess[wrong])
    assert nl.check_mistakes(triple, network, loader)
    normalised = DataLoader(TensorDataset(images * 5 - 2.5, data.test_labels), batch_size=7)
    assert nl.check_mistakes(collected, network, normalised)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("too few images", lambda rows, *_: rows[:7]),
        ("same image twice", lambda rows, *_: [*rows[:9], rows[0]]),
        ("labels exchanged", lambda rows, *_: [(i, p, t) for i, t, p in rows]),
        ("wrong true class", lambda rows, *_: [(i, 3 - t - p, p) for i, t, p in rows]),
        ("other predictions", lambda rows, *_: [(i, t, 3 - t - p) for i, t, p in rows]),
        (
            "not from the test set",
            lambda rows, data, _: [(data.train_images[k], 0, 1) for k in range(10)],
        ),
        (
            "picture still normalised",
            lambda rows, data, _: [((i - data.mean[0]) / data.std[0], t, p) for i, t, p in rows],
        ),
        ("unknown image", lambda rows, *_: [(i.flip(2), t, p) for i, t, p in rows]),
        ("error", lambda rows, *_: [(i, "lion", p) for i, t, p in rows]),
        ("error", lambda rows, *_: {"images": [i for i, _, _ in rows]}),
        ("error", lambda *_: lambda model, loader: 1 / 0),
    ],
)
def test_a_mistake_is_named(name, change, found, network, data):
    result = nl.check_mistakes(change(shown(found), data, network), network, data)
    assert [*result.mistakes] == [name], str(result)


@pytest.mark.parametrize(
    ("name", "wrong"), [("not misclassified", 0), ("collected while training", 1)]
)
def test_images_that_are_classified_correctly_are_no_mistakes(name, wrong, network, data):
    right = nl.predict(network, data).argmax(1) == data.test_labels
    rows = [
        (data.test_images[i], int(data.test_labels[i]), int(data.test_labels[i] + wrong) % 3)
        for i in right.nonzero().flatten()[:10]
    ]
    result = nl.check_mistakes(rows, network, data, count=len(rows))
    assert [*result.mistakes] == [name], str(result)
