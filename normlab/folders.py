"""A folder of images as a data set: train/<class>/* and test/<class>/* of png or jpg."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.cache import cached
from normlab.data import Dataset

GREY_MODES = ("1", "L", "I", "I;16")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def load_folder(
    folder: Path,
    shape: tuple[int, int, int] | None,
    *,
    name: str | None = None,
    title: str | None = None,
) -> Dataset:
    """Images below train/<class> and test/<class>; the classes are those of train."""
    name = name or folder.resolve().name
    listing = {part: _list_classes(folder / part) for part in ("train", "test")}
    if listing["train"].keys() != listing["test"].keys():
        odd = sorted(listing["train"].keys() ^ listing["test"].keys())[0]
        raise ValueError(f"class {odd!r} of {folder} must be both in train and in test")
    files = [file for part in listing.values() for some in part.values() for file in some]

    def decode() -> Dataset:
        images, labels = [], []
        channels = shape[0] if shape else _channels(files[0])
        for part in listing.values():
            paths = [file for some in part.values() for file in some]
            images.append(_decode(paths, channels, shape))
            counts = torch.tensor([len(some) for some in part.values()])
            labels.append(torch.arange(len(part)).repeat_interleave(counts))
        if images[0].shape[1:] != images[1].shape[1:]:
            raise _different_sizes(folder, images[0].shape[2:], images[1].shape[2:])
        classes = tuple(listing["train"])
        return Dataset(name, images[0], labels[0], images[1], labels[1], classes, title or name)

    return cached(name, files, decode, extra=(shape, title))


def _list_classes(part: Path) -> dict[str, list[Path]]:
    """The image files of each class folder of train/ or test/, in the order of their names."""
    if not part.is_dir():
        raise FileNotFoundError(f"there is no folder {part}: it must hold a folder for each class")
    classes = {}
    folders = [entry for entry in os.scandir(part) if entry.is_dir()]
    for folder in sorted(entry.path for entry in folders if not entry.name.startswith(".")):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        files = [Path(folder, file) for file in names if file.lower().endswith(IMAGE_SUFFIXES)]
        if not files:
            raise ValueError(f"class folder {folder} holds no png or jpg image")
        classes[Path(folder).name] = files
    if not classes:
        raise ValueError(f"{part} holds no class folders")
    return classes


def _channels(file: Path) -> int:
    """1 for a grey picture, 3 for a coloured one: the first picture decides for the folder."""
    return 1 if _open_image(file).mode in GREY_MODES else 3


def _open_image(file: Path):
    from PIL import Image

    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{file} cannot be read as an image: mend or remove it") from error
    if image.mode in ("I", "I;16"):  # 16 bits, of which Pillow would keep the lowest 8
        image = image.point(lambda shade: shade / 257).convert("L")
    return image


def _decode(files: list[Path], channels: int, shape: tuple[int, int, int] | None) -> Tensor:
    """Reads images into one uint8 tensor (N, C, H, W), resized to `shape` where it is given."""
    from torchvision.transforms.functional import pil_to_tensor

    stack = None
    for row, file in enumerate(files):
        picture = _open_image(file)
        if channels == 1 and shape is None and picture.mode not in GREY_MODES:
            raise ValueError(
                f"{file} is coloured, but the first image is grey: input_shape=(3, H, W) takes all "
                "as coloured"
            )
        pixels = pil_to_tensor(picture.convert("L" if channels == 1 else "RGB"))
        if shape is not None and tuple(pixels.shape) != tuple(shape):
            pixels = resized(pixels.unsqueeze(0), shape)[0]
        if stack is None:
            stack = torch.empty((len(files), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != stack.shape[1:]:
            raise _different_sizes(file, stack.shape[2:], pixels.shape[1:])
        stack[row] = pixels
    return stack


def _different_sizes(where: Path, first: torch.Size, other: torch.Size) -> ValueError:
    sizes = [f"{height}×{width}" for height, width in (first, other)]
    return ValueError(
        f"the images differ in size: {sizes[0]} and, in {where}, {sizes[1]}; "
        "input_shape=(C, H, W), or --image-size on the command line, resizes them all"
    )


def resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (N, C, h, w) as uint8 of `shape` (C', H, W): bilinear, grey repeated or averaged."""
    channels, *sides = shape
    images = images.float()
    if list(images.shape[2:]) != sides:
        images = F.interpolate(images, size=sides, mode="bilinear", antialias=True)
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).repeat(1, channels, 1, 1)
    return images.round().clamp(0, 255).to(torch.uint8)
