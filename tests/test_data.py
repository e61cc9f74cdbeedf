"""The data set and its batches."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import normlab as nl


def parts_of(data):
    """The arguments of a `Dataset`, to change one of them."""
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


@pytest.fixture
def coloured():
    """30 + 6 noisy RGB images of 6×4 whose channels differ in mean and spread; 3 classes."""
    random = torch.Generator().manual_seed(1)
    spread = torch.tensor([256, 100, 20]).view(3, 1, 1)
    images = (torch.rand(36, 3, 6, 4, generator=random) * spread).to(torch.uint8)
    labels = torch.arange(36) % 3
    return nl.Dataset(
        "noise", images[:30], labels[:30], images[30:], labels[30:], ("x", "y", "z"), "noise"
    )


def numbered(count, classes=1):
    """Images that can be told apart: image i holds the grey value i everywhere."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    labels = torch.arange(count) % classes
    names = tuple(map(str, range(classes)))
    return nl.Dataset("numbers", images, labels, images[:9], labels[:9], names, "numbers")


def numbers_in(batches, data):
    """Which images of `numbered` the batches hold, in order."""
    grey = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    return (255 * (grey * data.std[0] + data.mean[0])).round().int().tolist()


# --- statistics and normalisation ------------------------------------------------------------


def test_mean_and_std_are_those_of_the_training_images(coloured):
    values = coloured.train_images.numpy() / 255
    np.testing.assert_allclose(coloured.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(coloured.std, values.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize(("train", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_batches_are_normalised_by_the_training_statistics(coloured, train, dtype):
    images, labels = next(iter(coloured.loader(train, 100, shuffle=False, dtype=dtype)))
    raw = (coloured.train_images if train else coloured.test_images).numpy() / 255
    seen = coloured.train_images.numpy() / 255
    mean = seen.mean((0, 2, 3), keepdims=True)
    std = seen.std((0, 2, 3), keepdims=True)
    assert images.dtype == dtype
    assert labels.dtype == torch.int64
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(images.numpy(), (raw - mean) / std, rtol=0, atol=tolerance)


def test_a_constant_channel_is_centred_and_not_divided_by_zero(coloured):
    images = coloured.train_images.clone()
    images[:, 1] = 77
    data = replace(coloured, train_images=images)
    batch, _ = next(iter(data.loader(batch_size=100)))
    assert data.std[1] == pytest.approx(0, abs=1e-7)
    assert batch[:, 1].abs().max() < 1e-5
    assert batch[:, 0].std() > 0.9


# --- what does not fit together --------------------------------------------------------------

WRONG = {
    "float images": ("train_images", lambda old: old.float(), TypeError, "uint8.*float32"),
    "channels of numpy last": (
        *("train_images", lambda old: old.permute(0, 2, 3, 1).numpy(), ValueError),
        r"\(30, 6, 4, 3\).*transpose\(0, 3, 1, 2\)",
    ),
    "images in a list": ("train_images", lambda old: old.tolist(), TypeError, "uint8.*list"),
    "no channel axis": ("train_images", lambda old: old[:, 0], ValueError, r"\(N, C, H, W\)"),
    "no training images": ("train_images", lambda old: old[:0], ValueError, r"\(0, 3, 6, 4\)"),
    "float labels": ("train_labels", lambda old: old.float(), TypeError, "int64.*float32"),
    "no labels": ("test_labels", lambda old: None, TypeError, "whole numbers.*NoneType"),
    "names as labels": ("test_labels", lambda old: ["x"] * 6, TypeError, "whole numbers.*list"),
    "truths as labels": ("test_labels", lambda old: old > 0, TypeError, "whole numbers.*bool"),
    "label too high": ("train_labels", lambda old: old + 1, ValueError, "holds 3: 3 classes"),
    "label below 0": ("test_labels", lambda old: old - 1, ValueError, "holds -1"),
    "a label too few": ("train_labels", lambda old: old[1:], ValueError, r"\(30,\), not \(29,\)"),
    "labels in a column": ("test_labels", lambda old: old[:, None], ValueError, r"\(6, 1\)"),
    "other test shape": ("test_images", lambda old: old[:, :, :5], ValueError, "same shape"),
    "a class too few": ("classes", lambda old: old[:2], ValueError, "labels 0 to 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_data_set_that_does_not_fit_together_is_refused(coloured, case):
    field, change, error, message = WRONG[case]
    parts = parts_of(coloured) | {field: change(getattr(coloured, field))}
    with pytest.raises(error, match=message) as caught:
        nl.Dataset(**parts)
    if field != "classes":
        assert field in str(caught.value)


def read_only(array):
    array.flags.writeable = False
    return array


IMAGES_AS = {
    "array": lambda images: images.numpy(),
    "array that cannot be written": lambda images: read_only(images.numpy()),
    "turned array": lambda images: images.permute(0, 2, 3, 1).numpy().copy().transpose(0, 3, 1, 2),
}
LABELS_AS = {
    **{f"array of {kind}": lambda y, kind=kind: y.numpy().astype(kind) for kind in ("i4", "u1")},
    "array of the other byte order": lambda labels: labels.numpy().astype(">i8"),
    "Series": lambda labels: pd.Series(labels.numpy(), index=range(7, 7 + len(labels))),
    "list": lambda labels: labels.tolist(),
    "int32 tensor": lambda labels: labels.int(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", IMAGES_AS | LABELS_AS)
def test_arrays_and_series_count_like_tensors(coloured, kind):
    change = (IMAGES_AS | LABELS_AS)[kind]
    what = "images" if kind in IMAGES_AS else "labels"
    fields = [f"{part}_{what}" for part in ("train", "test")]
    changed = {name: change(getattr(coloured, name).clone()) for name in fields}
    data = nl.Dataset(**parts_of(coloured) | changed | {"classes": np.array(["x", "y", "z"])})
    assert data.fingerprint == coloured.fingerprint
    assert data.train_labels.dtype == torch.int64
    images, labels = next(iter(data.loader(batch_size=4)))
    assert (images.shape, labels.dtype) == ((4, 3, 6, 4), torch.int64)


def test_a_data_set_does_not_change_with_the_array_it_was_made_of(coloured):
    array = coloured.train_images.numpy().copy()
    data = replace(coloured, train_images=array)
    array[:] = 0
    assert data.fingerprint == coloured.fingerprint


@pytest.mark.parametrize("form", ["the same images twice", "turned"])
def test_whatever_images_a_data_set_holds_can_be_kept(coloured, tmp_path, form):
    images, labels = coloured.train_images, coloured.train_labels
    if form == "turned":
        images = images.contiguous(memory_format=torch.channels_last)
    data = replace(coloured, train_images=images, test_images=images, test_labels=labels)
    data.save(tmp_path / "data.safetensors")
    assert nl.Dataset.open(tmp_path / "data.safetensors").fingerprint == data.fingerprint


def test_a_data_set_opens_with_the_key_it_was_kept_with(coloured, tmp_path):
    path = tmp_path / "data.safetensors"
    coloured.save(path, key="one")
    assert nl.Dataset.open(path, key="one").fingerprint == coloured.fingerprint
    for other in ("", "other"):
        with pytest.raises(ValueError, match="is damaged: delete it"):
            nl.Dataset.open(path, key=other)


def test_a_full_disk_is_told_in_a_sentence(digits, tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*data: .*too large"):
        digits.save(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


# --- the order of the images -----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_pass_holds_every_image_once(batch_size):
    data = numbered(50, classes=5)
    loader = data.loader(batch_size=batch_size)
    sizes = [len(labels) for _, labels in loader]
    assert len(sizes) == len(loader)
    assert set(sizes[:-1]) <= {batch_size}
    assert sorted(numbers_in(loader, data)) == list(range(50))


def test_labels_stay_with_their_images():
    data = numbered(50, classes=5)
    for images, labels in data.loader(batch_size=8):
        numbers = torch.tensor(numbers_in([(images, labels)], data))
        assert torch.equal(numbers % 5, labels)


def test_passes_differ_in_order_and_follow_from_the_seed():
    data = numbered(50)
    loader = data.loader(batch_size=8, seed=3)
    first, second = numbers_in(loader, data), numbers_in(loader, data)
    assert first != second
    assert list(range(50)) not in (first, second)
    again = data.loader(batch_size=16, seed=3)  # the size of the batches changes nothing
    assert [numbers_in(again, data), numbers_in(again, data)] == [first, second]
    assert numbers_in(data.loader(batch_size=8, seed=4), data) != first


def test_the_order_ignores_the_global_random_state():
    data = numbered(50)
    torch.manual_seed(0)
    first = numbers_in(data.loader(), data)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert numbers_in(data.loader(), data) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("train", "shuffle"), [(False, None), (True, False)])
def test_unshuffled_images_come_in_order_every_pass(train, shuffle):
    data = numbered(9)
    loader = data.loader(train, 4, shuffle=shuffle)
    for _ in range(2):
        assert numbers_in(loader, data) == list(range(9))


@pytest.mark.parametrize("wrong", [0, 2.5])
def test_an_impossible_batch_size_is_refused(tiny, wrong):
    with pytest.raises((TypeError, ValueError), match="batch_size"):
        tiny.loader(batch_size=wrong)


# --- augmentation in batches -----------------------------------------------------------------

AUGMENT = ("shift:2", "flip", "rotate:10")


def a_pass(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_augmented_passes_follow_from_the_seed_alone(tiny):
    one, other = (tiny.loader(augment=AUGMENT, seed=5) for _ in range(2))
    passes = [a_pass(one)[0] for _ in range(2)]
    assert torch.equal(passes[0], a_pass(other)[0])
    assert not torch.equal(a_pass(tiny.loader(augment=AUGMENT, seed=6))[0], passes[0])
    # What a network draws for its dropout in between must not matter.
    torch.rand(1000)
    assert torch.equal(passes[1], a_pass(other)[0])


def test_augmentation_does_not_depend_on_the_batch_size(tiny):
    small, large = (a_pass(tiny.loader(batch_size=n, augment=AUGMENT))[0] for n in (7, 96))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_augmentation_leaves_the_order_as_it_is(tiny):
    plain, augmented = tiny.loader(seed=2), tiny.loader(seed=2, augment=AUGMENT)
    assert torch.equal(plain.draw_epoch()[0], augmented.draw_epoch()[0])
    # And shuffling leaves the draws as they are.
    still = tiny.loader(seed=2, augment=AUGMENT, shuffle=False)
    for one, other in zip(augmented.draw_epoch()[1], still.draw_epoch()[1], strict=True):
        assert torch.equal(one, other)


def test_one_augmentation_draws_the_same_whatever_else_there_is(tiny):
    alone = tiny.loader(augment=("flip",)).draw_epoch()[1][0]
    among = tiny.loader(augment=AUGMENT).draw_epoch()[1][1]
    assert torch.equal(alone, among)
    assert 0 < alone.sum() < len(alone)


def test_flipped_images_are_the_originals_or_their_mirror_images(tiny):
    plain, _ = a_pass(tiny.loader(seed=1))
    flipped, _ = a_pass(tiny.loader(seed=1, augment=("flip",)))
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_augmentation_leaves_the_data_set_alone(tiny):
    before = tiny.train_images.clone()
    a_pass(tiny.loader(augment=AUGMENT))
    assert torch.equal(tiny.train_images, before)


# --- parts of a data set ---------------------------------------------------------------------


def with_class_counts(*counts):
    """A data set of numbered images with so many images of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    data = numbered(len(labels))
    names = tuple(map(str, range(len(counts))))
    return replace(data, train_labels=labels, classes=names)


@pytest.mark.parametrize(
    ("there", "count", "balanced"),
    [
        ((20, 20, 20), 30, [10, 10, 10]),
        ((20, 20, 20), 31, [10, 10, 11]),
        ((20, 20, 20), 2, [0, 1, 1]),
        ((50, 50, 3), 43, [3, 20, 20]),  # a class is short: all of it, the rest shared
        ((5, 6, 7), 18, [5, 6, 7]),
    ],
)
def test_a_subset_is_balanced_as_far_as_it_goes(there, count, balanced):
    small = with_class_counts(*there).subset(train=count)
    assert sorted(small.train_labels.bincount(minlength=3).tolist()) == balanced
    assert len(small.train_images) == count


def test_a_subset_holds_images_of_the_set_once_with_their_labels():
    data = with_class_counts(20, 20, 20)
    small = data.subset(train=30)
    numbers = small.train_images[:, 0, 0, 0].long()
    assert len(numbers.unique()) == 30
    assert torch.equal(data.train_labels[numbers], small.train_labels)


def test_a_subset_follows_from_the_seed(digits):
    one, same, other = (digits.subset(100, 50, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    # In random order: neither class by class nor one of each class in turn.
    assert not torch.equal(one.train_labels, one.train_labels.sort().values)
    assert len(one.train_labels[:10].unique()) < 10


def test_a_subset_keeps_the_part_that_is_not_named(tiny):
    small = tiny.subset(train=10)
    assert torch.equal(small.test_images, tiny.test_images)
    assert len(tiny.subset(test=10).train_images) == 96
    assert "10 + 40" in small.source
    assert tiny.subset() is tiny


@pytest.mark.parametrize(("part", "count"), [("train", 97), ("test", 41)])
def test_a_subset_larger_than_the_set_is_refused(tiny, part, count):
    with pytest.raises(ValueError, match=f"{count} {part} images: there are {count - 1}"):
        tiny.subset(**{part: count})


@pytest.mark.parametrize("wrong", [0, 2.5])
def test_a_subset_of_no_whole_number_is_refused(tiny, wrong):
    with pytest.raises((TypeError, ValueError), match="train images of a subset"):
        tiny.subset(train=wrong)


def test_validation_is_a_stratified_part_of_the_training_set():
    data = with_class_counts(40, 20, 10)
    split = data.with_validation(0.2)
    assert split.test_labels.bincount().tolist() == [8, 4, 2]
    kept, held_out = (set(part[:, 0, 0, 0].tolist()) for part in parts_with_images(split))
    assert not kept & held_out
    assert kept | held_out == set(range(70))
    for images, labels in zip(
        parts_with_images(split), (split.train_labels, split.test_labels), strict=True
    ):
        assert torch.equal(data.train_labels[images[:, 0, 0, 0].long()], labels)


def parts_with_images(data):
    return data.train_images, data.test_images


def test_validation_does_not_use_the_test_set(tiny):
    other_test = replace(tiny, test_images=255 - tiny.test_images)
    assert tiny.with_validation().fingerprint == other_test.with_validation().fingerprint
    assert tiny.with_validation().test_name == "validation"
    assert "validation" in tiny.with_validation().source


def test_validation_follows_from_the_seed(tiny):
    one, same, other = (tiny.with_validation(0.25, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("wrong", [0, 1, 1e-6])
def test_a_validation_part_that_leaves_nothing_is_refused(tiny, wrong):
    with pytest.raises((TypeError, ValueError), match="validation fraction"):
        tiny.with_validation(wrong)


# --- fingerprint -----------------------------------------------------------------------------


def one_more(tensor):
    changed = tensor.clone()
    changed.view(-1)[-1] = (changed.view(-1)[-1] + 1) % 3
    return changed


@pytest.mark.parametrize(
    "field", ["train_images", "train_labels", "test_images", "test_labels", "classes"]
)
def test_the_fingerprint_changes_with_a_single_value(coloured, field):
    old = getattr(coloured, field)
    new = ("x", "y", "zz") if field == "classes" else one_more(old)
    assert replace(coloured, **{field: new}).fingerprint != coloured.fingerprint


def test_the_fingerprint_tells_shapes_with_the_same_bytes_apart(coloured):
    turned = {
        name: getattr(coloured, name).view(-1, 3, 4, 6) for name in ("train_images", "test_images")
    }
    assert replace(coloured, **turned).fingerprint != coloured.fingerprint


def test_the_fingerprint_tells_class_names_apart_that_join_alike(coloured):
    one, other = (replace(coloured, classes=names) for names in (("xy", "", "z"), ("x", "y", "z")))
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_is_that_of_the_values_alone(coloured):
    copies = {
        name: value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()
        for name, value in parts_of(coloured).items()
        if isinstance(value, torch.Tensor)
    }
    same = replace(coloured, name="other", source="elsewhere", **copies)
    assert same.fingerprint == coloured.fingerprint


def test_a_given_normalization_is_that_of_the_batches_and_of_the_identity(tiny, tmp_path):
    given = replace(tiny, mean=0.5, std=[0.25])
    [(images, _), *_] = given.loader(train=False, batch_size=40)
    torch.testing.assert_close(images, (tiny.test_images / 255 - 0.5) / 0.25)
    assert (given.mean, given.std) == ((0.5,), (0.25,))
    assert given.fingerprint != tiny.fingerprint
    assert replace(given, mean=None, std=None).fingerprint == tiny.fingerprint
    given.save(tmp_path / "data")
    again = nl.Dataset.open(tmp_path / "data")
    assert (again.mean, again.std, again.fingerprint) == (given.mean, given.std, given.fingerprint)


def test_a_given_normalization_stays_with_fewer_images_and_a_measured_one_does_not(tiny):
    given = replace(tiny, mean=0.5, std=0.25)
    for change in (lambda data: data.subset(30), lambda data: data.with_validation(0.3)):
        assert (change(given).mean, change(given).std) == ((0.5,), (0.25,))
        fewer = change(tiny)
        assert fewer.mean == pytest.approx([float((fewer.train_images / 255).mean())], abs=1e-6)
        assert fewer.mean != tiny.mean
    assert replace(tiny, mean=0.5).std == tiny.std


@pytest.mark.parametrize(
    ("normalization", "words"),
    [
        ({"mean": (0.1, 0.2)}, "mean must be 1 numbers, one for each channel"),
        ({"std": 0}, "std must be greater than 0"),
        ({"mean": math.nan}, "mean must be a finite number"),
        ({"std": "one"}, "std must be a number"),
    ],
)
def test_a_normalization_that_fits_no_images_is_refused(tiny, normalization, words):
    with pytest.raises((TypeError, ValueError), match=words):
        replace(tiny, **normalization)


def test_load_dataset_takes_a_normalization():
    data = nl.load_dataset("digits", mean=0.1307, std=0.3081)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))
