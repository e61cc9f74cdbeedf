"""A folder of images as a data set: train/<class>/* and test/<class>/* of what Pillow reads."""

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from normlab.data import Dataset
from normlab.datasets.cache import cached
from normlab.support.checks import warn

VALIDATION = ("val", "valid", "validation")  # names of the folder of images to validate on


def load_folder(
    folder: Path, shape: tuple[int, int, int] | None, *, name: str = "", title: str = ""
) -> Dataset:
    """Images below train/<class> and test/<class>; the classes are those of train.

    Without test/, those below val/, valid/ or validation/ take its place, and its name.
    They are taken as they are to be seen: turned as the camera held them, in sRGB where a colour
    profile says what their numbers mean, on white where they are transparent; of several frames
    the first. They have one channel if all of them are grey, else three. What begins with a dot
    is left out; other files that are not read are counted in a warning.
    """
    name = name or readable(folder.resolve().name)
    unread: list[Path] = []
    second = next((part for part in ("test", *VALIDATION) if (folder / part).is_dir()), "test")
    train, test = (_list_classes(folder / part, unread) for part in ("train", second))
    if train.keys() != test.keys():
        odd, where = min(train.keys() ^ test.keys()), readable(folder)
        raise ValueError(f"class {odd!r} of {where} must be both in train and in {second}")
    _warn_of_unread(unread, folder)
    files = [file for part in (train, test) for some in part.values() for file in some]

    def decode() -> Dataset:
        labels = [
            np.arange(len(part)).repeat([len(some) for some in part.values()])
            for part in (train, test)
        ]
        images = _decode(files, shape).split([len(some) for some in labels])
        arrays = images[0], labels[0], images[1], labels[1]
        test_name = "validation" if second in VALIDATION else "test"
        return Dataset(name, *arrays, tuple(train), title or name, test_name)

    return cached(name, files, decode, (shape, title))


def readable(name: str | os.PathLike) -> str:
    """A name as text: in one Unicode form, with bytes that are no UTF-8 written as \\xe9."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return unicodedata.normalize("NFC", text)


def _list_classes(part: Path, unread: list[Path]) -> dict[str, list[Path]]:
    """The image files of each class folder of train/ or test/, in the order of their names."""
    if not part.is_dir():
        raise FileNotFoundError(
            f"there is no folder {part}{' (nor val beside it)' if part.name == 'test' else ''}: it "
            "must hold a folder for each class"
        )
    known = Image.registered_extensions().items()
    suffixes = tuple(suffix for suffix, kind in known if kind in Image.OPEN)  # others are written
    classes: dict[str, list[Path]] = {}
    for folder in _visible(part):
        if not folder.is_dir():
            unread.append(folder)
            continue
        name = readable(folder.name)
        if name in classes:
            raise ValueError(f"{part} holds two folders {name!r}, in different bytes: join them")
        classes[name] = []
        for each in _visible(folder):
            is_image = each.is_file() and each.name.lower().endswith(suffixes)
            (classes[name] if is_image else unread).append(each)
        if not classes[name]:
            raise ValueError(f"class folder {readable(folder)} holds no image to read")
    if not classes:
        raise ValueError(f"{part} holds no class folders")
    return dict(sorted(classes.items()))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _warn_of_unread(unread: list[Path], folder: Path) -> None:
    if unread:
        some = [readable(path.relative_to(folder)) for path in unread[:3]]
        warn(
            f"{len(unread)} files or folders below {readable(folder)} are not read, since Pillow "
            "does not know their suffix or they lie in no class folder: "
            + ", ".join(some + ["…"] * (len(unread) > 3))
        )


def _decode(files: list[Path], shape: tuple[int, int, int] | None) -> Tensor:
    """Reads images into one uint8 tensor (N, C, H, W), resized to `shape` where it is given."""
    images: list[Tensor] = []
    for file in files:
        images.append(_read_image(file, shape))
        sizes = [f"{height}×{width}" for _, height, width in (images[0].shape, images[-1].shape)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the images differ in size: {sizes[0]} and, in {readable(file)}, {sizes[1]}; "
                "input_shape=(C, H, W), or --image-size on the command line, resizes them all"
            )
    channels = max(map(len, images))  # a single coloured image makes all of three channels
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _read_image(file: Path, shape: tuple[int, int, int] | None) -> Tensor:
    """uint8 (C, H, W): one channel if the image is grey, else three; or of the `shape` given."""
    picture = _open_picture(file)
    if shape is not None:
        picture = picture.convert("L" if shape[0] == 1 else "RGB")
    pixels = torch.from_numpy(np.array(picture, ndmin=3))
    pixels = pixels if picture.mode == "L" else pixels.permute(2, 0, 1)
    if shape in (None, tuple(pixels.shape)):
        return pixels
    return resized(pixels.unsqueeze(0), shape)[0]


def _open_picture(file: Path) -> Image.Image:
    """An image as it is to be seen, of mode L or RGB."""
    try:
        # Opened here: what Pillow maps into memory by its path may come out in the wrong order.
        with open(file, "rb") as opened, Image.open(opened) as image:
            return _flat(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises whatever the damage happens to provoke
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(
            f"{readable(file)} cannot be read as an image{why}: mend or remove it"
        ) from error


def _flat(image: Image.Image) -> Image.Image:
    """The image on white, in sRGB: of mode L if it is grey, else RGB."""
    mode, profile = image.mode, image.info.get("icc_profile")
    if mode[0] in "IF":
        return _in_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if mode in ("1", "L", "LA"):
        return image.convert("L")
    image = image if mode == "CMYK" else image.convert("RGB")
    image = _in_srgb(image, profile) if profile else image.convert("RGB")
    grey = mode in ("P", "PA") and len({band.tobytes() for band in image.split()}) == 1
    return image.convert("L") if grey else image


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """What the numbers of an image, RGB or CMYK, mean by their colour profile, as sRGB."""
    given = ImageCms.getOpenProfile(io.BytesIO(profile))
    if given.profile.xcolor_space.strip() != image.mode:  # that of another kind of image
        return image.convert("RGB")
    return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, of which Pillow would keep the lowest 8, as the nearest of 8 bits."""
    shades = np.asarray(image).astype(np.float64)
    if image.mode == "F" or shades.min() < 0 or shades.max() > 65535:
        raise ValueError("its shades are not those of 8 or 16 bits")
    if "transparency" in image.info:
        shades[shades == image.info["transparency"]] = 65535
    return Image.fromarray((shades / 257).round().astype(np.uint8))


def resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (N, C, h, w) as uint8 of `shape` (C', H, W): bilinear, grey repeated or averaged."""
    done = []
    for some in map(Tensor.float, images.split(4096)):
        if some.shape[2:] != shape[1:]:
            some = F.interpolate(some, size=shape[1:], mode="bilinear", antialias=True)
        if some.shape[1] != shape[0]:
            some = some.mean(1, keepdim=True).repeat(1, shape[0], 1, 1)
        done.append(some.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(done)
