"""`check_mistakes`: whether the misclassified images that a student shows are such."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from normlab.analysis import predict
from normlab.data import Dataset
from normlab.history import Run
from normlab.lessons import checking
from normlab.lessons.checking import Checked, Failed, Mistakes, as_numbers
from normlab.support.checks import whole_number

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
    return checking.checked("misclassified images", _parts(found, network, data, count))


def _parts(
    found: object, network: nn.Module, data: object, count: int
) -> Iterator[tuple[str, Mistakes]]:
    whole = isinstance(data, Dataset)
    batches = [*(data.loader(train=False, shuffle=False) if whole else data)]
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    guess = predict(network, data if whole else batches).argmax(1)
    if callable(found):
        values = {"network": network, "batches": batches, "count": count, "device": "cpu"}
        values["classes"] = getattr(data, "classes", [*range(1000)])
        roles = checking.roles_of(found, values, ("network", "batches", "count"))
        found = checking.call(found, values, roles)
    columns = _columns(found)
    shown, due = len(columns[0]), min(count, int((guess != labels).sum()))
    text = f"{shown} images are shown, where {due} are asked for"
    yield "number", {"too few images": text} if shown < due else {}
    parts = ("from the test set", "each once", "misclassified", "labels", "pictures")
    mistakes: dict[str, Mistakes] = {part: {} for part in parts}
    training = data.loader(train=True, shuffle=False) if whole else ()
    tested, trained = _standard(images), [_standard(each) for each, _ in training]
    names = [str(name) for name in getattr(data, "classes", ())]
    places: list[int | None] = []
    for number, (image, *classes) in enumerate(zip(*columns, strict=True)):
        image, told = (
            _image(image, images.shape[1:]),
            tuple(_class(each, names) for each in classes),
        )
        place = _place(image, tested)
        among = place is None and any(_place(image, each) is not None for each in trained)
        rows = [*_about_image(number, image, place, among, places)]
        if place is not None:
            rows += _about_classes(place, told, (int(labels[place]), int(guess[place])))
        for part, name, text in rows:
            mistakes[part].setdefault(name, f"{text}.")
        places.append(place)
    yield from mistakes.items()


def _about_image(
    number: int, image: Tensor, place: int | None, trained: bool, before: list[int | None]
) -> Iterator[tuple[str, str, str]]:
    """The mistakes in one image: the part, the name and the sentence.

    Args:
        place: in the test set.
        trained: whether it is one of the training images.
        before: the places of images that are shown before it.
    """
    if trained:
        text = f"image {number} is one of the training images; the test set is what counts"
        yield "from the test set", "not from the test set", text
    elif place is None:
        text = f"image {number} is not in the test set: was it augmented?"
        yield "from the test set", "unknown image", text
    elif place in before:
        text = f"images {before.index(place)} and {number} are the same one of the test set"
        yield "each once", "same image twice", text
    low, high = image.aminmax() if image.numel() else (0, 0)
    if low < -0.01 or (high > 1.01 and not torch.equal(image, image.round())):
        text = f"image {number} goes from {low:.2f} to {high:.2f}: undo the normalisation"
        yield "pictures", "picture still normalised", f"{text} (· std + mean)"


def _about_classes(
    place: int, told: tuple[int, int], due: tuple[int, int]
) -> Iterator[tuple[str, str, str]]:
    """The mistakes in the true and the predicted class of a test image, and in choosing it."""
    wrong = due[0] != due[1]
    text = f"test image {place} is classified correctly by the finished network"
    if not wrong and told[0] == told[1]:
        yield "misclassified", "not misclassified", f"{text}: take those with predicted != true"
    elif not wrong:
        text += ": this is a mistake that it made while it trained, or in training mode"
        yield "misclassified", "collected while training", text
    text = f"of test image {place} (true, predicted) are {due}, not {told}"
    if told == due[::-1] != due:
        yield "labels", "labels exchanged", f"true and predicted classes are exchanged: {text}"
    elif told[0] != due[0]:
        yield "labels", "wrong true class", f"the labels are those of other images: {text}"
    elif told[1] != due[1] and wrong:
        yield "labels", "other predictions", f"another network predicts so: {text}"


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
        found = {name: getattr(found, name) for name in dir(found) if checking.role_of(name, _KEYS)}
    keys = {checking.role_of(str(key), _KEYS): value for key, value in found.items()}
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
    """An image as numbers (C, H, W)."""
    numbers = as_numbers(value)
    if numbers is None:
        raise Failed(f"{type(value).__name__} is no image: give a tensor or an array")
    last = numbers.dim() == 3 and numbers.shape[-1] == shape[0] and numbers.shape[0] != shape[0]
    numbers = numbers.movedim(-1, 0) if last else numbers
    return numbers.reshape(shape) if numbers.numel() == shape.numel() else numbers


def _standard(images: Tensor) -> Tensor:
    """Images (…, C, H, W) with each channel at mean 0 and length 1, however they are normalised."""
    flat = images.double().flatten(-2)
    flat = flat - flat.mean(-1, keepdim=True)
    return (flat / (flat.norm(dim=-1, keepdim=True) + 1e-9)).flatten(-2)


def _place(image: Tensor, among: Tensor) -> int | None:
    """The place of an image among others, as `_standard` makes them; None if it is none."""
    if image.dim() < 3 or not len(among) or image.numel() != among[0].numel():
        return None
    apart = (among - _standard(image)).abs().amax(1)
    return int(apart.argmin()) if apart.min() < 1e-3 else None
