"""`check_mistakes`: whether the misclassified images that a student shows are such."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.analysis import predict
from normlab.data import Dataset
from normlab.history import Run
from normlab.lessons.checking import Checked, Failed, as_numbers, call, checked, role_of, roles_of
from normlab.support.checks import whole_number

_KEYS = ("images", "true", "predicted")


@dataclass
class _Shown:
    """One image that is shown, and what is true of it; the last is known of test images only."""

    number: int
    image: Tensor
    true: int
    predicted: int
    place: int | None  # in the test set
    trained: bool  # whether it is one of the training images
    before: int | None  # where the same image is shown before
    label: int | None = None
    guess: int | None = None  # of the finished network

    @property
    def right(self) -> bool:
        return self.place is not None and self.label == self.guess

    @property
    def said(self) -> tuple[int, int]:
        return self.true, self.predicted

    @property
    def normalised(self) -> bool:
        low, high = self.image.aminmax() if self.image.numel() else (0, 0)
        return low < -0.01 or (high > 1.01 and not torch.equal(self.image, self.image.round()))


_CORRECT = "test image {place} is classified correctly by the finished network, as class {guess}: "
_OF = "of test image {place} the true class is {label}, and the finished network predicts {guess}; "
_OF += "here it is true {true}, predicted {predicted}"
# Part, mistake, when it is one, and what is said. Of each part the first that holds counts.
_MISTAKES = (
    (
        *("from the test set", "not from the test set", lambda s: s.trained),
        "image {number} is one of the training images; the test set is what counts",
    ),
    (
        *("from the test set", "unknown image", lambda s: s.place is None),
        "image {number} is not in the test set: was it augmented?",
    ),
    (
        *("each once", "same image twice", lambda s: s.before is not None),
        "images {before} and {number} are the same one of the test set",
    ),
    (
        *("misclassified", "not misclassified", lambda s: s.right and s.true == s.predicted),
        _CORRECT + "take those with predicted != true",
    ),
    (
        *("misclassified", "collected while training", lambda s: s.right),
        _CORRECT + "this is a mistake that it made while it trained, or in training mode",
    ),
    (
        *("labels", "labels exchanged", lambda s: s.said == (s.guess, s.label) != s.said[::-1]),
        "the true class and the predicted one are exchanged: " + _OF,
    ),
    (
        *("labels", "wrong true class", lambda s: s.label is not None and s.true != s.label),
        "the labels are those of other images: " + _OF,
    ),
    (
        *(
            "labels",
            "other predictions",
            lambda s: not s.right and s.guess is not None and s.predicted != s.guess,
        ),
        "the predictions are not the finished network's: " + _OF,
    ),
    (
        *("pictures", "picture still normalised", lambda s: s.normalised),
        "image {number} has numbers below 0 or above 1: undo the normalisation (· std + mean)",
    ),
)


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


def _parts(
    found: object, network: nn.Module, data: object, count: int
) -> Iterator[tuple[str, dict[str, str]]]:
    whole = isinstance(data, Dataset)
    batches = [*(data.loader(train=False, shuffle=False) if whole else data)]
    labels = torch.cat([each for _, each in batches])
    guess = predict(network, data if whole else batches).argmax(1)
    if callable(found):
        values = {"network": network, "batches": batches, "count": count, "device": "cpu"}
        values["classes"] = getattr(data, "classes", [*range(1000)])
        found = call(found, values, roles_of(found, values, ("network", "batches", "count")))
    images, true, predicted = _columns(found)
    due = min(count, int((guess != labels).sum()))
    text = f"{len(images)} images are shown, where {due} are asked for"
    parts = {"number": {} if len(images) >= due else {"too few images": text}}
    parts |= {part: {} for part, *_ in _MISTAKES}
    for each in _shown(images, true, predicted, data, batches):
        if each.place is not None:
            each.label, each.guess = int(labels[each.place]), int(guess[each.place])
        told = set()
        for part, name, holds, sentence in _MISTAKES:
            if part not in told and holds(each):
                parts[part].setdefault(name, sentence.format(**vars(each)) + ".")
                told.add(part)
    yield from parts.items()


def _shown(
    images: Sequence, true: Sequence, predicted: Sequence, data: object, batches: list
) -> Iterator[_Shown]:
    shape = batches[0][0].shape[1:]
    names = [str(name) for name in getattr(data, "classes", ())]
    tested, trained = _forms(data, batches)
    places: list[int | None] = []
    for number, (image, *classes) in enumerate(zip(images, true, predicted, strict=True)):
        image, classes = _image(image, shape), [_class(each, names) for each in classes]
        place = _place(image, tested)
        among = place is None and _place(image, trained) is not None
        before = places.index(place) if place is not None and place in places else None
        places.append(place)
        yield _Shown(number, image, *classes, place, among, before)


def _columns(found: object) -> list[Sequence]:
    """Images, true and predicted classes, from whatever holds them."""
    if not isinstance(found, Sequence):
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


def _named(found: object) -> list:
    if not isinstance(found, Mapping):
        found = {name: getattr(found, name) for name in dir(found) if role_of(name, _KEYS)}
    keys = {role_of(str(key), _KEYS): value for key, value in found.items()}
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


def _image(value: object, shape: torch.Size) -> Tensor:
    """An image as numbers in the order (C, H, W), flat."""
    numbers = as_numbers(value)
    if numbers is None:
        raise Failed(f"{type(value).__name__} is no image: give a tensor or an array")
    last = numbers.dim() == 3 and numbers.shape[-1] == shape[0] and numbers.shape[0] != shape[0]
    return (numbers.movedim(-1, 0) if last else numbers).flatten().float()


def _forms(data: object, batches: list) -> tuple[list[Tensor], list[Tensor]]:
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
