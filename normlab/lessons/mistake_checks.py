"""`check_mistakes`: whether the misclassified images that a student shows are such."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.analysis import predict
from normlab.data import Dataset
from normlab.history import Run
from normlab.lessons.checking import Checked, Failed, Part, attempt, bound, checked, roles_by
from normlab.lessons.student_code import as_numbers
from normlab.support.checks import whole_number

_role_of = roles_by(
    {
        "network": "model|net|network|module",
        "data": "(test|val|data)?(loader|dataloader|dl|data|set|dataset|iter)",
        "count": "count|n|k|num|number|numimages|nimages",
        "device": "device|dev",
        "classes": "classes|classnames|labelnames|names",
    }
)
# What keys, attributes and places of a tuple are usually called.
_key_of = roles_by(
    {
        "images": "images?|imgs?|x|data|pictures?|inputs?",
        "true": "true|truth|labels?|targets?|y|ytrue|actual|truelabels?|groundtruth|gt"
        "|trueclass(es)?",
        "predicted": "pred|preds|predicted|predictions?|predictedlabels?|guess(es)?|outputs?|yhat"
        "|ypred|predlabels?|predictedclass(es)?",
    }
)
_KEYS = ("images", "true", "predicted")


def check_mistakes(
    found: object, network: nn.Module | Run, data: Dataset | Iterable, *, count: int = 10
) -> Checked:
    """Whether these are misclassified images of the test set, with the right labels.

    Args:
        found: images, true classes and predicted ones, as numbers or names: in this order, as a
            list of such triples, or as a dict or object with these names, as `nl.find_mistakes`
            gives them; or a function of a network and a test loader that returns one of these.
        network: the finished network, or its run.
        data: a data set, or the test images and labels of a `DataLoader`.
        count: how many images were asked for.

    The result is as that of `check_norm`.
    """
    whole_number(count, "count")
    network = network.network if isinstance(network, Run) else network
    return checked("misclassified images", _parts(found, network, data, count))


@dataclass
class _Shown:
    """One image that is shown, and what is true of it."""

    image: Tensor
    true: int
    predicted: int
    place: int | None  # in the test set
    trained: bool = False  # whether it is one of the training images


def _parts(found: object, network: nn.Module, data: object, count: int) -> Iterator[Part]:
    if isinstance(data, Dataset):
        batches, labels = data.loader(train=False, shuffle=False), data.test_labels
    else:
        batches = [(images, labels) for images, labels in data]
        labels = torch.cat([each for _, each in batches])
    guess = predict(network, data if isinstance(data, Dataset) else batches).argmax(1)
    if callable(found):
        values = {"network": network, "data": batches, "count": count, "device": "cpu"}
        values["classes"] = getattr(data, "classes", [*range(1000)])
        arguments = bound(found, values, _role_of, ("network", "data", "count"))
        found = attempt(found, *arguments.args, **arguments.kwargs)
    images, true, predicted = _columns(found)
    shape = tuple(next(iter(batches))[0].shape[1:])
    names = [str(name) for name in getattr(data, "classes", ())]
    tested, trained = _forms(data, batches)
    shown = [
        _Shown(image, _class(t, names), _class(p, names), _place(image, tested))
        for image, t, p in zip((_image(i, shape) for i in images), true, predicted, strict=True)
    ]
    for each in shown:
        each.trained = each.place is None and _place(each.image, trained) is not None
    wrong = int((guess != labels).sum())
    yield _part("number", _number(len(shown), min(count, wrong)))
    yield _part("from the test set", _from_the_test_set(shown))
    yield _part("each once", _once(shown))
    seen = [each for each in shown if each.place is not None]
    yield _part("misclassified", _misclassified(seen, labels, guess))
    yield _part("labels", _labels(seen, labels, guess))
    yield _part("pictures", _pictures(shown))


def _part(name: str, mistakes: Iterator[tuple[str, str]]) -> Part:
    kept: dict[str, str] = {}
    for mistake, text in mistakes:
        kept.setdefault(mistake, f"{text}.")
    return Part(name, kept)


def _columns(found: object) -> list[Sequence]:
    """Images, true and predicted classes, from whatever holds them."""
    if not isinstance(found, Sequence | Mapping):
        found = {name: getattr(found, name) for name in dir(found) if _key_of(name)}
    if isinstance(found, Mapping):
        columns = _named(found)
    elif all(isinstance(row, Mapping) or _is_triple(row) for row in found):
        rows = [_named(row) if isinstance(row, Mapping) else row for row in found]
        columns = [*zip(*rows, strict=True)] or [(), (), ()]
    else:
        columns = [*found]
    if len(columns) != 3 or len({len(column) for column in columns}) != 1:
        raise Failed("give images, true and predicted classes, as many of each")
    return columns


def _is_triple(row: object) -> bool:
    """Whether this is one image with its two classes, and not many images."""
    if not isinstance(row, Sequence) or len(row) != 3:
        return False
    numbers = as_numbers(row[1])
    return isinstance(row[1], str) or (numbers is not None and numbers.numel() == 1)


def _named(found: Mapping) -> list:
    keys = {_key_of(str(key)): value for key, value in found.items()}
    if not {*_KEYS} <= {*keys}:
        raise Failed(f"there must be images, true and predicted, not {', '.join(map(str, found))}")
    return [keys[key] for key in _KEYS]


def _class(value: object, names: list[str]) -> int:
    if isinstance(value, str) and value in names:
        return names.index(value)
    numbers = as_numbers(value)
    if numbers is None or numbers.numel() != 1:
        raise Failed(f"{value!r:.60} is no class: give its number or its name")
    return int(numbers)


def _image(value: object, shape: tuple[int, ...]) -> Tensor:
    """An image as numbers in the order (C, H, W), flat."""
    numbers = as_numbers(value)
    if numbers is None:
        raise Failed(f"{type(value).__name__} is no image: give a tensor or an array")
    last = numbers.dim() == 3 and numbers.shape[-1] == shape[0] and numbers.shape[0] != shape[0]
    return (numbers.movedim(-1, 0) if last else numbers).flatten().float()


def _forms(data: object, batches: Iterable) -> tuple[list[Tensor], list[Tensor]]:
    """The test images, and the training images where they are known, in the forms they have."""
    tested = torch.cat([images for images, _ in batches])
    if not isinstance(data, Dataset):
        return [tested.flatten(1).float()], []
    train = torch.cat([images for images, _ in data.loader(train=True, shuffle=False)])
    parts = (data.test_images, tested), (data.train_images, train)
    forms = [[raw.float(), raw / 255, inputs.float()] for raw, inputs in parts]
    return tuple([form.flatten(1) for form in some] for some in forms)


def _place(image: Tensor, forms: list[Tensor]) -> int | None:
    """The place of an image among those of the forms; None if it is none of them."""
    for form in forms:
        if form.shape[1] == image.numel():
            apart = (form - image).abs().amax(1)
            if apart.min() < 1e-3 * form.abs().max():
                return int(apart.argmin())
    return None


# --- what is looked at --------------------------------------------------------------------------


def _number(shown: int, due: int) -> Iterator[tuple[str, str]]:
    if shown < due:
        yield "too few images", f"{shown} images are shown, where {due} are asked for"


def _from_the_test_set(shown: list[_Shown]) -> Iterator[tuple[str, str]]:
    for number, each in enumerate(shown):
        if each.trained:
            text = f"image {number} is one of the training images; the test set is what counts"
            yield "not from the test set", text
        elif each.place is None:
            yield "unknown image", f"image {number} is not in the test set: was it augmented?"


def _once(shown: list[_Shown]) -> Iterator[tuple[str, str]]:
    places = [each.place for each in shown]
    for number, place in enumerate(places):
        if place is not None and place in places[:number]:
            text = f"images {places.index(place)} and {number} are the same one of the test set"
            yield "same image twice", text


def _misclassified(seen: list[_Shown], labels: Tensor, guess: Tensor) -> Iterator[tuple[str, str]]:
    for each in seen:
        if guess[each.place] == labels[each.place]:
            text = f"test image {each.place} is classified correctly by the finished network, as "
            text += f"class {int(guess[each.place])}"
            if each.predicted == each.true:
                yield "not misclassified", f"{text}: take those with predicted != true"
            else:
                text += ": this is a mistake that it made while it trained, or in training mode"
                yield "collected while training", text


def _labels(seen: list[_Shown], labels: Tensor, guess: Tensor) -> Iterator[tuple[str, str]]:
    for each in seen:
        true, predicted = int(labels[each.place]), int(guess[each.place])
        said = f"of test image {each.place} the true class is {true}, and the finished network "
        said += f"predicts {predicted}; here it is true {each.true}, predicted {each.predicted}"
        if (each.true, each.predicted) == (predicted, true) != (true, predicted):
            yield "labels exchanged", f"the true class and the predicted one are exchanged: {said}"
        elif each.true != true:
            yield "wrong true class", f"the labels are those of other images: {said}"
        elif each.predicted != predicted and true != predicted:
            yield "other predictions", f"the predictions are not the finished network's: {said}"


def _pictures(shown: list[_Shown]) -> Iterator[tuple[str, str]]:
    for number, each in enumerate(shown):
        low, high = each.image.aminmax() if each.image.numel() else (0, 0)
        if low < -0.01 or (high > 1.01 and not torch.equal(each.image, each.image.round())):
            yield (
                "picture still normalised",
                (
                    f"image {number} goes from {float(low):.2f} to {float(high):.2f}: undo the "
                    "normalisation (· std + mean) before it is shown"
                ),
            )
