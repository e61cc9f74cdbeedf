"""A folder of images as a data set."""

import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import normlab as nl
from tests.datasets.made_up import write_folder, write_picture


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_images_is_read_class_by_class(tmp_path, mode, no_network):
    folder = write_folder(tmp_path / "pets", ("dog", "cat"), mode)
    data = nl.load_dataset(folder)
    channels = 1 if mode == "L" else 3
    assert data.input_shape == (channels, 5, 6)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0] * 3 + [1] * 3
    assert data.test_labels.tolist() == [0] * 2 + [1] * 2
    # dog was written before cat: its colours are 10, 20, 30 in train and 70, 80 in test.
    assert data.train_images[:, 0, 0, 0].tolist() == [40, 50, 60, 10, 20, 30]
    assert data.test_images[:, 0, 4, 5].tolist() == [90, 100, 70, 80]
    if mode == "RGB":
        assert data.train_images[0, :, 2, 2].tolist() == [40, 0, 215]
    assert (data.name, data.source) == ("pets", "pets")


def test_images_that_differ_in_size_need_an_input_shape(tmp_path):
    folder = write_folder(tmp_path / "pets")
    write_picture(folder / "test/dog/0.png", (10, 20, 30), size=(9, 7))
    with pytest.raises(ValueError, match=r"differ in size: 5×6.*7×9.*input_shape"):
        nl.load_dataset(folder)
    data = nl.load_dataset(folder, input_shape=(3, 8, 8))
    assert data.input_shape == (3, 8, 8)
    # A picture of one colour keeps it in any size.
    assert [10, 20, 30] in data.test_images[:, :, 3, 3].tolist()


def empty_a_class(folder):
    shutil.rmtree(folder / "train/dog")
    (folder / "train/dog").mkdir()
    return folder / "train/dog"


def put_text_in(folder):
    (folder / "train/dog/1.png").write_text("not a picture")
    return folder / "train/dog/1.png"


def cut_off(folder):
    random = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path = folder / "test/cat/1.png"
    Image.fromarray(random).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def remove_train(folder):
    shutil.rmtree(folder / "train")
    return folder / "train"


def remove_classes(folder):
    for place in (folder / "train").iterdir():
        shutil.rmtree(place)
    return folder / "train"


DAMAGES = {
    empty_a_class: (ValueError, "no image to read"),
    put_text_in: (ValueError, "cannot be read as an image"),
    cut_off: (ValueError, "cannot be read as an image"),
    remove_train: (FileNotFoundError, "a folder for each class"),
    remove_classes: (ValueError, "no class folders"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_place_named(tmp_path, damage):
    folder = write_folder(tmp_path / "pets")
    place = damage(folder)
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message) as caught:
        nl.load_dataset(folder)
    assert str(place) in str(caught.value)


def test_a_class_in_only_one_part_is_named(tmp_path):
    folder = write_folder(tmp_path / "pets")
    write_picture(folder / "test" / "horse" / "0.png")
    with pytest.raises(ValueError, match=r"class 'horse'.*both in train and in test"):
        nl.load_dataset(folder)


# --- pictures as they are to be seen ---------------------------------------------------------


def of_pixels(mode, pixels, **info):
    """A picture of one row, to be saved with `info`; palette entries are made of an `info`."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image, info


def of_palette(colours, pixels=(0, 1, 2), mode="P", **info):
    image, info = of_pixels(mode, pixels, **info)
    image.putpalette([value for colour in colours for value in colour])
    return image, info


RED, DARK, WHITE = (200, 0, 0), (60, 60, 60), (255, 255, 255)
PINK = (222, 102, 102)  # 60 % of red on white: 0.6 × 200 + 0.4 × 255, 0.4 × 255
PALE = (138, 138, 138)  # 60 % of dark on white
# The picture and how it is saved, then the colours that are seen.
PICTURES = {
    "1": (of_pixels("1", [0, 255]), [(0, 0, 0), WHITE]),
    "1 with a transparent shade": (of_pixels("1", [0, 255], transparency=0), [WHITE, WHITE]),
    "L": (of_pixels("L", [60, 255]), [DARK, WHITE]),
    "L with a transparent shade": (of_pixels("L", [60, 0], transparency=0), [DARK, WHITE]),
    "LA": (of_pixels("LA", [(60, 255), (0, 0), (60, 153)]), [DARK, WHITE, PALE]),
    "shape in the alpha channel": (of_pixels("LA", [(0, 255), (0, 0)]), [(0, 0, 0), WHITE]),
    "P": (of_palette([RED, DARK, WHITE]), [RED, DARK, WHITE]),
    "P of greys": (of_palette([DARK, WHITE, RED], pixels=(0, 1)), [DARK, WHITE]),
    "P with a transparent entry": (
        *[of_palette([RED, DARK, RED], transparency=2)],
        [RED, DARK, WHITE],
    ),
    "P with alphas": (
        of_palette([RED, RED, DARK], transparency=bytes([255, 153, 0])),
        [RED, PINK, WHITE],
    ),
    "P of greys with alphas": (
        of_palette([DARK, DARK, RED], transparency=bytes([255, 153, 0])),
        [DARK, PALE, WHITE],
    ),
    "PA": (
        of_palette([RED, DARK], [(0, 255), (0, 153), (1, 0)], "PA", format="TIFF"),
        [RED, PINK, WHITE],
    ),
    "RGB": (of_pixels("RGB", [RED, DARK]), [RED, DARK]),
    "RGB with a transparent colour": (
        of_pixels("RGB", [RED, DARK], transparency=DARK),
        [RED, WHITE],
    ),
    "RGBA": (of_pixels("RGBA", [(*RED, 255), (*RED, 153), (*RED, 0)]), [RED, PINK, WHITE]),
    "CMYK": (of_pixels("CMYK", [(55, 255, 255, 0), (0, 0, 0, 0)], format="TIFF"), [RED, WHITE]),
    "I;16": (of_pixels("I;16", [60 * 257, 65535]), [DARK, WHITE]),
    "I;16 with a transparent shade": (
        of_pixels("I;16", [60 * 257, 7], transparency=7),
        [DARK, WHITE],
    ),
    "I": (of_pixels("I", [60 * 257, 65535], format="TIFF"), [DARK, WHITE]),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_of_every_mode_are_seen_on_white(tmp_path, case):
    (image, info), seen = PICTURES[case]
    info = {"format": "PNG", **info}
    for part in ("train", "test"):
        path = tmp_path / part / "a" / f"0.{info['format'].lower()}"
        path.parent.mkdir(parents=True)
        image.save(path, **info)
        with Image.open(path) as saved:
            assert saved.mode == image.mode
    grey = all(len(set(colour)) == 1 for colour in seen)
    expected = {3: np.array(seen).T}
    expected[1] = (np.array([[0.299, 0.587, 0.114]]) @ expected[3]).round()
    for asked, channels in ((None, 1 if grey else 3), (1, 1), (3, 3)):
        shape = asked and (asked, 1, len(seen))
        data = nl.load_dataset(tmp_path, input_shape=shape)
        for images in (data.train_images, data.test_images):
            assert images.shape == (1, channels, 1, len(seen))
            np.testing.assert_array_equal(images[0, :, 0].numpy(), expected[channels])


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
# How what is stored must be turned, by the standard's numbers of the EXIF tag "Orientation".
TURNS = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize(
    ("orientation", "kind"), [*((turn, "png") for turn in TURNS), (6, "webp"), (6, "tif")]
)
def test_photographs_are_turned_as_the_camera_was_held(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for part in ("train", "test"):
        path = tmp_path / part / "a" / f"0.{kind}"
        path.parent.mkdir(parents=True)
        image = Image.fromarray(UPRIGHT)
        if kind == "webp":
            image.convert("RGB").save(path, exif=exif, lossless=True)
        else:
            image.save(path, exif=exif)
    seen = nl.load_dataset(tmp_path).train_images[0, 0].numpy()
    np.testing.assert_array_equal(seen, TURNS[orientation](UPRIGHT))


def profile_with_red_and_blue_exchanged():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    parts = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ", b"rTRC": b"bTRC", b"bTRC": b"rTRC"}
    return re.sub(b"|".join(parts), lambda found: parts[found[0]], srgb)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_says_what_the_numbers_mean(tmp_path, mode):
    folder = write_folder(tmp_path / "pets")
    path = folder / "train/cat/0.png"
    image = Image.new("RGB", (6, 5), (204, 0, 0)).convert(mode)  # 204 is in Pillow's palette
    image.save(path, icc_profile=profile_with_red_and_blue_exchanged())
    seen = nl.load_dataset(folder).train_images[0, :, 2, 2].tolist()
    assert seen == pytest.approx([0, 0, 204], abs=2)


def test_a_profile_of_another_kind_of_picture_is_not_applied(tmp_path):
    folder = write_folder(tmp_path / "pets")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.new("RGB", (6, 5), (200, 0, 0)).save(folder / "train/cat/0.png", icc_profile=profile)
    assert nl.load_dataset(folder).train_images[0, :, 2, 2].tolist() == [200, 0, 0]


@pytest.mark.parametrize("grey_first", [True, False])
def test_one_coloured_picture_makes_all_of_three_channels(tmp_path, grey_first):
    folder = write_folder(tmp_path / "pets", mode="L")
    place = "test/dog/1.png" if grey_first else "train/cat/0.png"
    write_picture(folder / place, (1, 2, 3))
    data = nl.load_dataset(folder)
    assert data.input_shape == (3, 5, 6)
    part, row = (data.test_images, -1) if grey_first else (data.train_images, 0)
    assert part[row, :, 0, 0].tolist() == [1, 2, 3]
    assert data.train_images[1, :, 0, 0].tolist() == [20, 20, 20]


SUFFIXES = (
    *("png", "apng", "webp", "bmp", "dib", "tif", "tiff", "gif", "tga", "ppm", "pcx", "qoi"),
    *("jpg", "jpeg", "jfif", "jpe", "JPG", "Tif", "jp2", "ico"),
)


@pytest.mark.filterwarnings("error")
def test_whatever_pillow_reads_is_read(tmp_path):
    for suffix in SUFFIXES:
        write_picture(tmp_path / "train" / "a" / f"0.{suffix}", (200, 100, 50), size=(16, 16))
    write_picture(tmp_path / "test" / "a" / "1.png", (1, 2, 3), size=(16, 16))
    data = nl.load_dataset(tmp_path)
    assert len(data.train_images) == len(SUFFIXES)
    colours = data.train_images.float().mean((2, 3))  # what JPEG loses is little
    assert (colours - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_what_is_not_read_is_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "pets")
    for name in ("a.heic", "b.pdf", "c"):
        (folder / "train/cat" / name).write_bytes(b"something")
    (folder / "test/README").write_text("not a class")
    (folder / "test/dog/more.png").mkdir()
    (folder / "test/dog/.hidden").write_text("left out without a word")
    named = "train/cat/a.heic, train/cat/b.pdf, train/cat/c, …"
    with pytest.warns(UserWarning, match=rf"^5 files .*: {named}$") as caught:
        data = nl.load_dataset(folder)
    assert len(caught) == 1
    assert data.train_labels.bincount().tolist() == [3, 3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    folder = write_folder(tmp_path / "pets")
    os.mkfifo(folder / "train/cat/pipe.png")
    with pytest.warns(UserWarning, match=r"^1 files .*train/cat/pipe.png$"):
        assert len(nl.load_dataset(folder).train_images) == 6


@pytest.mark.parametrize("error", [SyntaxError, MemoryError])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, error):
    folder = write_folder(tmp_path / "pets")

    def fail(_):
        raise error("the reason")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image \(.*the reason"):
        nl.load_dataset(folder)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pets")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"cat/0\.png cannot be read as an image \(.*exceeds"):
        nl.load_dataset(folder)


def test_shades_beyond_16_bits_are_refused(tmp_path):
    folder = write_folder(tmp_path / "scans", mode="L", suffix="tif")
    for shades in ([[0.0, 0.5, 1.0]], [[-1, 2, 3]], [[0, 1, 65536]]):
        kind = np.float32 if 0.5 in shades[0] else np.int32
        Image.fromarray(np.array(shades, kind)).save(folder / "train/cat/0.tif")
        with pytest.raises(ValueError, match=r"cat/0\.tif cannot be read .*8 or 16 bits"):
            nl.load_dataset(folder)


# --- names of classes and files --------------------------------------------------------------


def test_names_that_are_not_utf_8_load(tmp_path, own_cache):
    folder = os.fsencode(tmp_path) + b"/M\xe4rz"
    try:
        for part in (b"train", b"test"):
            os.makedirs(os.path.join(folder, part, b"caf\xe9"))
            write_picture(Path(os.fsdecode(os.path.join(folder, part, b"caf\xe9", b"\xff.png"))))
    except OSError:
        pytest.skip("this file system takes no such names")
    for _ in range(2):  # decoded, then kept
        data = nl.load_dataset(os.fsdecode(folder))
        assert (data.name, data.classes) == (r"M\xe4rz", (r"caf\xe9",))
    assert len(list(own_cache.rglob("*.safetensors"))) == 1


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def test_a_class_may_be_spelt_in_both_forms_of_unicode(tmp_path):
    for part, name in (("train", COMPOSED), ("test", DECOMPOSED)):
        write_picture(tmp_path / part / name / "0.png")
    assert nl.load_dataset(tmp_path).classes == (COMPOSED,)


def test_two_classes_of_one_name_are_refused(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        write_picture(tmp_path / "train" / name / "0.png")
    if len(list((tmp_path / "train").iterdir())) == 1:
        pytest.skip("this file system takes both for one name")
    with pytest.raises(ValueError, match=f"two folders '{COMPOSED}'"):
        nl.load_dataset(tmp_path)


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_a_validation_folder_takes_the_place_of_a_test_folder(tmp_path, part):
    folder = write_folder(tmp_path / "pets")
    tested = nl.load_dataset(folder)
    (folder / "test").rename(folder / part)
    data = nl.load_dataset(folder)
    assert data.test_name == "validation"
    assert torch.equal(data.test_images, tested.test_images)
    (folder / part).rename(folder / "other")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*test"):
        nl.load_dataset(folder)
