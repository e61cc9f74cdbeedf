"""Predictions, mistakes and confusions, against forward passes and datasets made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normlab as nl

BRIGHTNESS = (250, 90, 130, 210, 170, 110, 230, 150, 70, 190, 255, 100)


def lamp_data(wrong: tuple[int, ...] = ()) -> nl.Dataset:
    """2×2 images in which the place of the one lit pixel is the class, but for those in `wrong`.

    The brightness differs from image to image, and with it a `lamp_network`'s confidence.
    """
    lit = torch.arange(len(BRIGHTNESS)) % 4
    images = torch.zeros(len(lit), 4, dtype=torch.uint8)
    images[torch.arange(len(lit)), lit] = torch.tensor(BRIGHTNESS, dtype=torch.uint8)
    images = images.view(-1, 1, 2, 2)
    labels = lit.clone()
    labels[list(wrong)] = (lit[list(wrong)] + 1) % 4
    names = ("top left", "top right", "bottom left", "bottom right")
    return nl.Dataset("lamps", images, lit, images, labels, names, "lamps")


def lamp_network() -> nn.Module:
    """Takes the brightest of the four pixels for the class: right wherever `lamp_data` is."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)


def logits_by_hand(network: nn.Module, images: torch.Tensor, data: nl.Dataset) -> np.ndarray:
    """A forward pass in evaluation mode over images that NumPy normalized."""
    training = data.train_images.numpy() / 255
    mean, std = (statistic(training, axis=(0, 2, 3)) for statistic in (np.mean, np.std))
    normal = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    network.eval()
    with torch.no_grad():
        return network(torch.from_numpy(normal).float()).numpy()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_predict_is_a_forward_pass_over_normalized_images(tiny, tiny_network, norm, train):
    network = tiny_network(norm)
    found = nl.predict(network, tiny, train=train, batch_size=7)  # 40 and 96 are no multiples of 7
    images = tiny.train_images if train else tiny.test_images
    np.testing.assert_allclose(found, logits_by_hand(network, images, tiny), atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("mode", [False, True])
def test_predict_leaves_mode_and_statistics_as_they_were(tiny, tiny_network, mode):
    network = tiny_network("bn").train(mode)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    nl.predict(network, tiny)
    assert all(layer.training == mode for layer in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_predict_restores_the_mode_of_a_network_that_fails(tiny):
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 4)).train()
    with pytest.raises(ValueError, match="cannot take images of shape"):
        nl.predict(network, tiny)
    assert network.training


def test_every_mistake_is_wrong_and_shows_the_raw_image(tiny, tiny_network):
    network = tiny_network()
    logits = logits_by_hand(network, tiny.test_images, tiny).astype(np.float64)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = nl.find_mistakes(network, tiny, count=10)
    assert len(found) == 10
    for place, index in enumerate(found.index.tolist()):
        assert found.true[place] == tiny.test_labels[index] != logits[index].argmax()
        assert found.predicted[place] == logits[index].argmax()
        assert found.probability[place].item() == pytest.approx(odds[index].max(), abs=1e-5)
    assert found.images.dtype == torch.uint8
    assert torch.equal(found.images, tiny.test_images[found.index])
    assert found.classes == tiny.classes
    assert found.tested == len(tiny.test_images)


@pytest.mark.parametrize(
    ("order", "indices"),
    [("confident", [10, 3, 1, 8]), ("first", [1, 3, 8, 10])],  # the brightest is the surest
)
@pytest.mark.parametrize("count", [2, 4, 10])
def test_mistakes_come_in_the_order_asked_for(order, indices, count):
    found = nl.find_mistakes(lamp_network(), lamp_data((1, 3, 8, 10)), count, order=order)
    assert found.index.tolist() == indices[:count]
    assert len(found) == min(count, 4)
    assert found.total == 4


def test_equally_sure_mistakes_stay_in_the_order_of_the_test_set():
    data = lamp_data((2, 5, 9))
    data = replace(data, test_images=(data.test_images > 0).to(torch.uint8) * 200)
    assert nl.find_mistakes(lamp_network(), data).index.tolist() == [2, 5, 9]


def test_a_network_without_mistakes_gives_none():
    found = nl.find_mistakes(lamp_network(), lamp_data())
    assert (len(found), found.total, found.tested) == (0, 0, 12)
    assert found.images.shape == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, not 0"),
        ({"count": "ten"}, TypeError, "count must be a whole number, not 'ten'"),
        ({"order": "confidant"}, ValueError, "did you mean 'confident'"),
    ],
)
def test_mistakes_refuse_what_makes_no_sense(arguments, error, words):
    with pytest.raises(error, match=words):
        nl.find_mistakes(lamp_network(), lamp_data(), **arguments)


def test_a_run_answers_from_its_stored_predictions(tiny, tiny_network, monkeypatch):
    run = nl.fit(tiny_network("gn"), tiny, nl.Recipe(epochs=1), progress=False)
    computed = nl.find_mistakes(run.network, tiny, 40)
    table = nl.confusion_matrix(run.network, tiny)

    def never(*arguments, **options):
        raise AssertionError("the run's predictions are at hand")

    monkeypatch.setattr("normlab.analysis.predict", never)
    stored = nl.find_mistakes(run, tiny, 40)
    assert 0 < len(stored) < 40
    assert torch.equal(stored.index, computed.index)
    assert torch.equal(stored.predicted, computed.predicted)
    assert torch.equal(stored.probability, computed.probability)
    assert torch.equal(nl.confusion_matrix(run, tiny), table)


def test_a_run_predicts_anew_for_other_images(tiny, tiny_network):
    run = nl.fit(tiny_network("gn"), tiny, nl.Recipe(epochs=1), progress=False)
    other = replace(tiny, test_images=tiny.train_images[:30], test_labels=tiny.train_labels[:30])
    found, computed = (nl.find_mistakes(one, other, 30) for one in (run, run.network))
    assert found.tested == 30
    assert torch.equal(found.index, computed.index)
    assert not torch.equal(nl.confusion_matrix(run, other), nl.confusion_matrix(run, tiny))


def test_common_mistakes_are_the_intersection(tiny, tiny_network):
    networks = {norm: tiny_network(norm, seed=seed) for seed, norm in enumerate(("bn", "gn", "ln"))}
    single = [nl.find_mistakes(network, tiny, 40) for network in networks.values()]
    wanted = set.intersection(*(set(one.index.tolist()) for one in single))
    assert 0 < len(wanted) < min(map(len, single))  # otherwise this test could not fail
    common = nl.find_common_mistakes(networks, tiny, 40)
    assert common.index.tolist() == [i for i in single[0].index.tolist() if i in wanted]
    assert common.total == len(wanted)
    listed = nl.find_common_mistakes(list(networks.values()), tiny, 40)
    assert torch.equal(listed.probability, common.probability)


def test_common_mistakes_need_a_network():
    with pytest.raises(ValueError, match="no network"):
        nl.find_common_mistakes([], lamp_data())


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
def test_the_confusion_matrix_agrees_with_scikit_learn(tiny, tiny_network, norm):
    network = tiny_network(norm)
    predicted = logits_by_hand(network, tiny.test_images, tiny).argmax(1)
    wanted = sklearn.metrics.confusion_matrix(tiny.test_labels, predicted, labels=range(4))
    np.testing.assert_array_equal(nl.confusion_matrix(network, tiny), wanted)


def test_the_confusion_matrix_has_true_classes_in_rows():
    # Class 3, "bottom right", is in no true label; image 3 of it counts as "top left".
    data = lamp_data((3, 7, 11))
    table = nl.confusion_matrix(lamp_network(), data)
    assert table.tolist() == [[3, 0, 0, 3], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]


def test_no_class_is_predicted_from_what_is_no_number(tiny, tiny_network):
    network = tiny_network()
    with torch.no_grad():
        network.linear.weight[2, 0] = torch.nan
    for use in (nl.find_mistakes, nl.confusion_matrix):
        with pytest.raises(FloatingPointError, match="logits of 40 of 40 images are no numbers"):
            use(network, tiny)


# --- images that are no `Dataset` -----------------------------------------------------------------

MEAN, STD = (0.5,), (0.25,)


def as_loader(data: nl.Dataset, *, shuffle: bool = False, mean=MEAN, std=STD) -> DataLoader:
    """The test images as a student's loader gives them, normalised by numbers of one's own."""
    images = (data.test_images / 255 - mean[0]) / std[0]
    return DataLoader(TensorDataset(images, data.test_labels), batch_size=7, shuffle=shuffle)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_loader_gives_what_a_data_set_of_its_normalization_gives(tiny, tiny_network, norm):
    network, loader = tiny_network(norm), as_loader(tiny)
    same = replace(tiny, mean=MEAN, std=STD)
    torch.testing.assert_close(nl.predict(network, loader), nl.predict(network, same))
    table = nl.confusion_matrix(network, loader)
    assert torch.equal(table, nl.confusion_matrix(network, same))
    assert torch.equal(table, nl.confusion_matrix(network, tiny, mean=MEAN, std=STD))
    names = {"classes": tiny.classes}
    found = nl.find_mistakes(network, loader, mean=MEAN, std=STD, **names)
    for wanted in (
        nl.find_mistakes(network, same),
        nl.find_mistakes(network, tiny, mean=MEAN, std=STD),
        nl.find_mistakes(network, loader, show=lambda images: images * 0.25 + 0.5, **names),
    ):
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.index, wanted.index)
        assert torch.equal(found.true, wanted.true)
        assert torch.equal(found.predicted, wanted.predicted)
        assert (found.classes, found.total, found.tested) == (tiny.classes, wanted.total, 40)


def test_a_shuffled_loader_keeps_images_and_labels_together(tiny, tiny_network):
    networks = tiny_network("bn"), tiny_network("gn")
    found = nl.find_common_mistakes(networks, as_loader(tiny, shuffle=True), 40, mean=MEAN, std=STD)
    wanted = nl.find_common_mistakes(networks, replace(tiny, mean=MEAN, std=STD), 40)
    pairs = [
        {
            (image.numpy().tobytes(), int(true))
            for image, true in zip(each.images, each.true, strict=True)
        }
        for each in (found, wanted)
    ]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) > 0
    assert found.classes == ("0", "1", "2", "3")


def test_images_that_are_still_normalised_are_not_shown(tiny, tiny_network):
    with pytest.raises(
        ValueError, match=r"the images go from -2.0. to 2.0., so .*: give mean= and"
    ):
        nl.find_mistakes(tiny_network(), as_loader(tiny))
    plain = as_loader(tiny, mean=(0.0,), std=(1.0,))
    assert nl.find_mistakes(tiny_network(), plain).images.dtype == torch.uint8


def test_accuracy_by_class_is_the_share_of_the_diagonal(tiny, tiny_network):
    network = tiny_network()
    for data in (tiny, as_loader(tiny)):
        table = nl.confusion_matrix(network, data).numpy()
        found = nl.class_accuracy(network, data, tiny.classes)
        assert list(found) == list(tiny.classes)
        np.testing.assert_allclose(list(found.values()), table.diagonal() / table.sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "there were no batches to loop over"),
        ([torch.zeros(2, 1, 2, 2)], "a batch must be .images, labels."),
        (
            [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 7]))],
            "holds 7: 4 classes have labels 0 to 3",
        ),
    ],
)
def test_what_is_no_loader_is_refused_in_one_sentence(loader, words):
    with pytest.raises(ValueError, match=words):
        nl.find_mistakes(lamp_network(), loader)
    with pytest.raises(ValueError, match="train=True is for a Dataset"):
        nl.predict(lamp_network(), loader, train=True)


def test_mistakes_carry_the_map_of_the_predicted_class(tiny, tiny_network):
    network = tiny_network()
    found = nl.find_mistakes(network, tiny, 4, cam="conv")
    images = next(iter(tiny.loader(train=False, batch_size=40)))[0][found.index]
    wanted = nl.grad_cam(network, images, found.predicted, layer="conv")
    torch.testing.assert_close(found.heat, wanted)
    assert nl.find_mistakes(network, tiny, 4).heat is None
    figure = nl.plot_mistakes(found)
    assert [len(ax.images) for ax in figure.axes[:4]] == [2] * 4
    with pytest.raises(ValueError, match=r"unknown layer 'covn': .* did you mean 'conv'"):
        nl.find_mistakes(network, tiny, 4, cam="covn")
    with pytest.raises(ValueError, match="layer 'linear' makes no images"):
        nl.find_mistakes(network, tiny, 4, cam="linear")
