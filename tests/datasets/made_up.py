"""Made-up files that data sets are loaded from."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 12, "t10k": 5}


def idx_files(seed=0):
    """The four files of a small MNIST: {name: bytes}, and the arrays that they hold."""
    random = np.random.default_rng(seed)
    files, arrays = {}, {}
    for part, count in COUNTS.items():
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        files[f"{part}-images-idx3-ubyte"] = header + images.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 2049, count) + labels.tobytes()
        arrays[part] = images, labels
    return files, arrays


def write_idx(root, seed=0, name="MNIST"):
    """Writes a small MNIST below `root` and returns its arrays."""
    files, arrays = idx_files(seed)
    raw = Path(root, name, "raw")
    raw.mkdir(parents=True)
    for file, content in files.items():
        (raw / file).write_bytes(content)
    return arrays


def write_picture(path, value=0, size=(6, 5), mode="RGB"):
    """One picture of a single colour, (width, height) of `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def write_folder(root, classes=("cat", "dog"), mode="RGB", suffix="png"):
    """A folder of pictures, 3 + 2 of each class, each of a colour of its own."""
    value = 0
    for part, count in (("train", 3), ("test", 2)):
        for name in classes:
            for number in range(count):
                value += 10
                colour = value if mode == "L" else (value, 0, 255 - value)
                write_picture(root / part / name / f"{number}.{suffix}", colour, mode=mode)
    return root


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
