"""Where images come from: the bundled digits, files, downloads, folders, and the cache."""

import gzip
import hashlib
import http.server
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unicodedata
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image, ImageCms
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import normlab as nl
from normlab.datasets import downloads as sources
from normlab.datasets import folders, loading

MNIST = torchvision.datasets.MNIST
COUNTS = {"train": 12, "t10k": 5}


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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


# --- the bundled digits ----------------------------------------------------------------------


def test_digits_are_scikit_learns_in_a_stratified_split(no_network):
    data = nl.load_dataset("digits", input_shape=(1, 8, 8))
    original = load_digits()
    assert (len(data.train_images), len(data.test_images)) == (1437, 360)
    assert data.classes == tuple("0123456789")

    def as_rows(images, labels):
        return sorted((int(y), *x.ravel().tolist()) for x, y in zip(images, labels, strict=True))

    ours = as_rows(
        torch.cat([data.train_images, data.test_images]).numpy(),
        torch.cat([data.train_labels, data.test_labels]),
    )
    assert ours == as_rows(np.rint(original.images * 255 / 16).astype(int), original.target)
    share = np.bincount(original.target) * 360 / 1797
    assert np.abs(data.test_labels.bincount().numpy() - share).max() < 1


def test_a_second_look_at_the_digits_does_not_import_scikit_learn():
    program = (
        "import sys, normlab as nl\n"
        "data = nl.load_dataset('digits')\n"
        "print('sklearn' in sys.modules, data.fingerprint)"
    )
    command = [sys.executable, "-c", program]
    (imported, first), (again, second) = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert (imported, again) == ("True", "False")
    assert first == second


def test_the_split_of_the_digits_never_changes(digits):
    # Accuracies of different versions can be compared only while the test images are the same.
    assert "".join(map(str, digits.test_labels[:20].tolist())) == "76377328932664581356"
    assert digits.fingerprint == nl.load_dataset("digits").fingerprint


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_digits_are_enlarged_as_pillow_does_it(shape):
    data = nl.load_dataset("digits", input_shape=shape)
    small = nl.load_dataset("digits", input_shape=(1, 8, 8))
    assert data.input_shape == shape
    for image, original in zip(data.test_images[:20], small.test_images[:20], strict=True):
        enlarged = Image.fromarray(original[0].numpy()).resize(shape[:0:-1], Image.BILINEAR)
        for channel in image:
            assert np.abs(channel.numpy().astype(int) - np.asarray(enlarged)).max() <= 2


def test_digits_come_as_28_by_28_grey_images_without_being_asked(digits):
    assert digits.input_shape == (1, 28, 28)
    assert digits.source == "scikit-learn digits"


# --- MNIST's files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx_files_are_read_without_a_network(tmp_path, no_network, name, folder):
    arrays = write_idx(tmp_path, name=folder)
    data = nl.load_dataset(name, tmp_path)
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("t10k", data.test_images, data.test_labels),
    ):
        assert images.shape == (COUNTS[part], 1, 28, 28)
        np.testing.assert_array_equal(images[:, 0].numpy(), arrays[part][0])
        np.testing.assert_array_equal(labels.numpy(), arrays[part][1])
    assert len(data.classes) == 10
    assert data.classes[7] == {"mnist": "7", "fashion-mnist": "Sneaker"}[name]
    assert str(tmp_path) not in data.source


def test_images_are_converted_to_the_shape_asked_for(tmp_path):
    arrays = write_idx(tmp_path)
    data = nl.load_dataset("mnist", tmp_path, input_shape=(3, 14, 14))
    assert data.input_shape == (3, 14, 14)
    halved = Image.fromarray(arrays["train"][0][0]).resize((14, 14), Image.BILINEAR)
    for channel in data.train_images[0]:
        assert np.abs(channel.numpy().astype(int) - np.asarray(halved)).max() <= 2
    assert "3×14×14" in data.source


@pytest.mark.parametrize(
    "wrong",
    [(28, 28), (2, 28, 28), (1, 0, 28), (1, 28.0, 28), 28, "28", np.array(28), np.ones((3, 3))],
)
def test_an_impossible_input_shape_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="input_shape"):
        nl.load_dataset("digits", input_shape=wrong)


def test_files_are_searched_in_root_then_normlab_data_then_the_cache(
    tmp_path, monkeypatch, own_cache, no_network
):
    places = [tmp_path / "root", tmp_path / "variable", own_cache / "normlab" / "data"]
    arrays = [write_idx(place, seed) for seed, place in enumerate(places)]
    monkeypatch.setenv("NORMLAB_DATA", str(places[1]))
    for place, expected in zip(places, arrays, strict=True):
        data = nl.load_dataset("mnist", places[0], download=False)
        np.testing.assert_array_equal(data.train_labels.numpy(), expected["train"][1])
        shutil.rmtree(place)
    with pytest.raises(FileNotFoundError):
        nl.load_dataset("mnist", places[0], download=False)


@pytest.mark.parametrize("file", idx_files()[0])
@pytest.mark.parametrize("keep", [0, 6, -3])
def test_a_truncated_file_is_named(tmp_path, file, keep):
    write_idx(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="delete it") as caught:
        nl.load_dataset("mnist", tmp_path, download=False)
    assert str(path) in str(caught.value)


def test_only_the_raw_files_count_and_changed_ones_say_so(tmp_path):
    arrays = write_idx(tmp_path)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # what torchvision once kept, and would load
        torch.save((torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7)), processed / name)
    data = nl.load_dataset("mnist", tmp_path)
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), arrays["train"][0])
    assert data.source == "MNIST, changed"


def test_labels_exchanged_at_equal_size_and_time_are_noticed(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    before = path.stat()
    old = nl.load_dataset("mnist", tmp_path).train_labels
    path.write_bytes(path.read_bytes()[:8] + bytes(9 - old.numpy().astype(np.uint8)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(nl.load_dataset("mnist", tmp_path).train_labels, 9 - old)


def label_above_9(files):
    files["t10k-labels-idx1-ubyte"] = files["t10k-labels-idx1-ubyte"][:-1] + b"\x0a"
    return "t10k-labels-idx1-ubyte"


def label_too_few(files):
    files["train-labels-idx1-ubyte"] = struct.pack(">II", 2049, 11) + bytes(11)
    return "train-labels-idx1-ubyte"


def other_sizes(files):
    header = struct.pack(">IIII", 2051, COUNTS["t10k"], 27, 28)
    files["t10k-images-idx3-ubyte"] = header + bytes(COUNTS["t10k"] * 27 * 28)
    return "t10k-images-idx3-ubyte"


def more_than_it_says(files):
    files["train-images-idx3-ubyte"] += b"\x00"
    return "train-images-idx3-ubyte"


def labels_for_images(files):
    files["train-images-idx3-ubyte"] = files["train-labels-idx1-ubyte"]
    return "train-images-idx3-ubyte"


def no_images_at_all(files):
    files["t10k-images-idx3-ubyte"] = struct.pack(">IIII", 2051, 0, 28, 28)
    return "t10k-images-idx3-ubyte"


@pytest.mark.parametrize(
    "change",
    [
        *(label_above_9, label_too_few, other_sizes),
        *(more_than_it_says, labels_for_images, no_images_at_all),
    ],
)
def test_files_that_do_not_fit_together_are_named(tmp_path, change):
    files, _ = idx_files()
    named = change(files)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, content in files.items():
        (raw / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*delete it") as caught:
        nl.load_dataset("mnist", tmp_path)
    assert str(raw / named) in str(caught.value)


SHAPES = {
    "list": [1, 14, 15],
    "array": np.array([1, 14, 15]),
    "tensor": torch.tensor([1, 14, 15]),
    "size": torch.Size([1, 14, 15]),
    "Series": pd.Series([1, 14, 15], index=list("CHW")),
    "numbers of numpy": (np.int64(1), np.uint8(14), np.int32(15)),
    "numbers of torch": (torch.tensor(1), torch.tensor(14), torch.tensor(15)),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ["digits", "mnist", "pets"])
def test_an_input_shape_may_be_any_kind_of_numbers(tmp_path, kind, name):
    write_idx(tmp_path)
    write_folder(tmp_path / "pets", mode="L")
    name = tmp_path / "pets" if name == "pets" else name
    data = nl.load_dataset(name, tmp_path, input_shape=SHAPES[kind])
    assert data.input_shape == (1, 14, 15)
    assert data.fingerprint == nl.load_dataset(name, tmp_path, input_shape=(1, 14, 15)).fingerprint


@pytest.mark.parametrize("name", sources.SOURCES)
def test_missing_files_are_named_with_folder_and_address(tmp_path, no_network, name):
    with pytest.raises(FileNotFoundError) as caught:
        nl.load_dataset(name, tmp_path / "nowhere", download=False)
    assert_says_where_to_put_files(str(caught.value), name, tmp_path / "nowhere")
    assert files_below(tmp_path) == []


def assert_says_where_to_put_files(message, name, root):
    source = sources.SOURCES[name]
    for file in source.files:
        assert Path(file).name in message
    assert str(Path(source.files[0]).parent) in message
    assert str(root) in message
    assert source.address in message


def test_cifar10_is_read_from_torchvisions_batches(tmp_path, monkeypatch, no_network):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    reader = torchvision.datasets.CIFAR10
    pixels, checksums = {}, {}
    for file in sources._CIFAR_FILES:
        content = {"label_names": [f"class {number}" for number in range(10)]}
        if file != "batches.meta":
            pixels[file] = random.integers(0, 256, (2, 3072), dtype=np.uint8)
            content = {"data": pixels[file], "labels": [3, 9]}
        (folder / file).write_bytes(pickle.dumps(content))
        checksums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    for name in ("train_list", "test_list"):
        listed = [[file, checksums[file]] for file, _ in getattr(reader, name)]
        monkeypatch.setattr(reader, name, listed)
    monkeypatch.setitem(reader.meta, "md5", checksums["batches.meta"])

    data = nl.load_dataset("cifar10", tmp_path)
    # A row of a batch is all of red, then green, then blue, each row by row.
    in_order = np.concatenate([pixels[f"data_batch_{number}"] for number in range(1, 6)])
    np.testing.assert_array_equal(data.train_images.numpy(), in_order.reshape(10, 3, 32, 32))
    assert data.test_labels.tolist() == [3, 9]
    assert data.classes[3] == "class 3"
    assert data.source == "CIFAR-10"

    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py.* is damaged .*delete"):
        nl.load_dataset("cifar10", tmp_path)


def test_svhn_is_read_from_torchvisions_files(tmp_path, monkeypatch, no_network):
    random = np.random.default_rng(0)
    listed, pixels = {}, {}
    for part, count in COUNTS.items():
        part = {"t10k": "test"}.get(part, part)
        path = tmp_path / f"{part}_32x32.mat"
        pixels[part] = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(1, count + 1).clip(max=10)[:, None]  # 10 stands for the digit 0
        scipy.io.savemat(path, {"X": pixels[part].transpose(2, 3, 1, 0), "y": labels})
        listed[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    data = nl.load_dataset("svhn", tmp_path)
    np.testing.assert_array_equal(data.train_images.numpy(), pixels["train"])
    np.testing.assert_array_equal(data.test_images.numpy(), pixels["test"])
    assert data.train_labels.tolist() == [*range(1, 10), 0, 0, 0]
    assert (data.classes[7], data.source) == ("7", "SVHN")

    (tmp_path / "test_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"test_32x32\.mat is damaged .*delete"):
        nl.load_dataset("svhn", tmp_path)


def test_a_folder_of_jpegs_counts_as_cifar10_and_says_so(tmp_path, no_network):
    write_folder(tmp_path / "cifar10", suffix="jpg")
    data = nl.load_dataset("cifar10", tmp_path)
    assert data.name == "cifar10"
    assert "JPEG copy" in data.source
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("minst", ValueError, "did you mean 'mnist'"),
        ("cifar", ValueError, "did you mean 'cifar10'"),
        ("no/such/folder", FileNotFoundError, "no/such/folder"),
        (Path("nowhere"), FileNotFoundError, "nowhere"),
    ],
)
def test_an_unknown_name_is_refused(name, error, message, no_network):
    with pytest.raises(error, match=message):
        nl.load_dataset(name)


# --- downloads -------------------------------------------------------------------------------


@contextmanager
def server(answer):
    """An HTTP server on this machine; `answer(handler)` answers every request. Yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            """Prints nothing."""

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def send(handler, content, *, length=None, status=200):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def offered(monkeypatch):
    """A small MNIST as its server has it, gzipped, {path: bytes}; torchvision expects just that."""
    files, _ = idx_files()
    zipped = {f"/{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    listed = [(path[1:], hashlib.md5(content).hexdigest()) for path, content in zipped.items()]
    monkeypatch.setattr(MNIST, "resources", listed)
    return zipped


def test_a_download_ends_up_below_the_root_and_is_not_repeated(tmp_path, monkeypatch, offered):
    asked = []

    def answer(handler):
        asked.append(handler.path)
        send(handler, offered[handler.path])

    with server(answer) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        data = nl.load_dataset("mnist", tmp_path / "data")
    _, arrays = idx_files()
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), arrays["train"][0])
    np.testing.assert_array_equal(data.test_labels.numpy(), arrays["t10k"][1])
    assert set(asked) == set(offered)
    raw = [f"MNIST/raw/{name}" for name in sorted(idx_files()[0])]
    assert files_below(tmp_path / "data") == ["MNIST", "MNIST/raw", *raw]
    # The server is gone: what follows is read from the files.
    assert nl.load_dataset("mnist", tmp_path / "data").fingerprint == data.fingerprint


def refuse_all(handler, offered):
    send(handler, b"gone", status=404)


def sign_in_page(handler, offered):  # what a guest network answers to every request
    send(handler, b"<html>please sign in</html>")


def hang_up_half_way(handler, offered):
    content = offered[handler.path]
    send(handler, content[: len(content) // 2], length=len(content))


def labels_only(handler, offered):
    if "images" in handler.path:
        send(handler, b"gone", status=404)
    else:
        send(handler, offered[handler.path])


def no_http(handler, offered):
    handler.wfile.write(b"SSH-2.0-something\r\n")


def say_nothing(handler, offered):
    handler.server.silence.wait(5)


@pytest.mark.parametrize(
    "answer", [refuse_all, sign_in_page, hang_up_half_way, labels_only, no_http, say_nothing]
)
def test_a_failed_download_says_what_to_do_and_leaves_nothing(
    tmp_path, monkeypatch, offered, answer
):
    silence = threading.Event()
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "silence", silence, raising=False)
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 0.3)
    with server(lambda handler: answer(handler, offered)) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        try:
            with pytest.raises(OSError, match="MNIST could not be downloaded") as caught:
                nl.load_dataset("mnist", tmp_path)
        finally:
            silence.set()
    assert_says_where_to_put_files(str(caught.value), "mnist", tmp_path)
    assert files_below(tmp_path) == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    ("name", "reader", "address"),
    [("mnist", "MNIST", "mirrors"), ("cifar10", "CIFAR10", "url")],
)
def test_a_server_that_is_not_there_is_a_failed_download(
    tmp_path, monkeypatch, name, reader, address
):
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    value = [closed, closed] if address == "mirrors" else f"{closed}cifar.tar.gz"
    monkeypatch.setattr(getattr(torchvision.datasets, reader), address, value)
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        nl.load_dataset(name, tmp_path)
    assert_says_where_to_put_files(str(caught.value), name, tmp_path)
    assert files_below(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(folder, train, download):
        Path(folder, "half a file").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, "MNIST", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nl.load_dataset("mnist", tmp_path)
    assert files_below(tmp_path) == []


def test_a_download_goes_past_a_root_that_cannot_be_written(
    tmp_path, monkeypatch, own_cache, offered
):
    (tmp_path / "root").write_text("a file where a folder should be")
    with server(lambda handler: send(handler, offered[handler.path])) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        nl.load_dataset("mnist", tmp_path / "root")
    assert (own_cache / "normlab/data/MNIST/raw/train-images-idx3-ubyte").is_file()


# --- folders of images -----------------------------------------------------------------------


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


def test_jpg_jpeg_and_png_are_read_and_other_files_are_not(tmp_path):
    folder = write_folder(tmp_path / "pets")
    write_picture(folder / "train/cat/4.JPG", (200, 100, 50))
    write_picture(folder / "train/cat/5.jpeg", (200, 100, 50))
    (folder / "train/cat/notes.txt").write_text("not an image")
    (folder / "train/README").write_text("not a class")
    with pytest.warns(UserWarning, match=r"^2 files .*train/README, train/cat/notes.txt$"):
        data = nl.load_dataset(folder)
    assert data.train_labels.bincount().tolist() == [5, 3]
    colours = data.train_images[3:5].float().mean((2, 3))  # what JPEG loses is little
    assert (colours - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_pictures_of_any_mode_become_grey_or_rgb(tmp_path, mode):
    folder = write_folder(tmp_path / "pets", mode="L" if mode in ("L", "1") else "RGB")
    path = folder / "train/cat/0.png"
    Image.new("RGB", (6, 5), (255, 255, 255)).convert(mode).save(path)
    image = nl.load_dataset(folder).train_images[0]
    assert image.shape == (1 if mode in ("L", "1") else 3, 5, 6)
    assert image.unique().tolist() == [255]


def test_grey_pictures_of_16_bits_keep_their_shades(tmp_path):
    folder = write_folder(tmp_path / "scans", mode="L")
    shades = np.array([[0, 64, 128, 255]], dtype=np.uint16) * 257
    for path in folder.rglob("*.png"):
        Image.fromarray(shades).save(path)
    assert nl.load_dataset(folder).train_images[0].flatten().tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("odd", ["train/cat/2.png", "test/dog/0.png"])
def test_images_that_differ_in_size_need_an_input_shape(tmp_path, odd):
    folder = write_folder(tmp_path / "pets")
    write_picture(folder / odd, (10, 20, 30), size=(9, 7))
    with pytest.raises(ValueError, match=r"differ in size: 5×6.*7×9.*input_shape"):
        nl.load_dataset(folder)
    data = nl.load_dataset(folder, input_shape=(3, 8, 8))
    assert data.input_shape == (3, 8, 8)
    part = data.train_images if odd.startswith("train") else data.test_images
    # A picture of one colour keeps it in any size.
    assert [10, 20, 30] in part[:, :, 3, 3].tolist()


def test_colours_become_grey_and_grey_becomes_rgb_when_asked(tmp_path):
    grey = nl.load_dataset(write_folder(tmp_path / "colour"), input_shape=(1, 5, 6))
    red, green, blue = 10, 0, 245
    assert grey.train_images[0].unique().tolist() == [
        pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=1)
    ]
    rgb = nl.load_dataset(write_folder(tmp_path / "grey", mode="L"), input_shape=(3, 5, 6))
    assert rgb.train_images[0].unique().tolist() == [10]
    assert rgb.input_shape == (3, 5, 6)


def empty_a_class(folder):
    shutil.rmtree(folder / "train/dog")
    (folder / "train/dog").mkdir()
    return folder / "train/dog"


def put_text_in(folder):
    (folder / "train/dog/1.png").write_text("not a picture")
    return folder / "train/dog/1.png"


def put_text_first(folder):
    (folder / "train/cat/0.png").write_text("not a picture")
    return folder / "train/cat/0.png"


def cut_off(folder):
    random = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path = folder / "test/cat/1.png"
    Image.fromarray(random).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def remove_train(folder):
    shutil.rmtree(folder / "train")
    return folder / "train"


def remove_test(folder):
    shutil.rmtree(folder / "test")
    return folder / "test"


def remove_classes(folder):
    for place in (folder / "train").iterdir():
        shutil.rmtree(place)
    return folder / "train"


DAMAGES = {
    empty_a_class: (ValueError, "no image to read"),
    put_text_in: (ValueError, "cannot be read as an image"),
    put_text_first: (ValueError, "cannot be read as an image"),
    cut_off: (ValueError, "cannot be read as an image"),
    remove_train: (FileNotFoundError, "a folder for each class"),
    remove_test: (FileNotFoundError, "a folder for each class"),
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


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_in_only_one_part_is_named(tmp_path, part):
    folder = write_folder(tmp_path / "pets")
    write_picture(folder / part / "horse" / "0.png")
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


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("case", PICTURES)
def test_pictures_of_every_mode_are_seen_on_white(tmp_path, case, channels):
    (image, info), seen = PICTURES[case]
    info = {"format": "PNG", **info}
    for part in ("train", "test"):
        path = tmp_path / part / "a" / f"0.{info['format'].lower()}"
        path.parent.mkdir(parents=True)
        image.save(path, **info)
        with Image.open(path) as saved:
            assert saved.mode == image.mode
    shape = channels and (channels, 1, len(seen))
    data = nl.load_dataset(tmp_path, input_shape=shape)
    grey = all(len(set(colour)) == 1 for colour in seen)
    if channels is None:
        channels = 1 if grey else 3
    expected = np.array(seen).T
    if channels == 1:
        expected = (np.array([[0.299, 0.587, 0.114]]) @ expected).round()
    for images in (data.train_images, data.test_images):
        assert images.shape == (1, channels, 1, len(seen))
        np.testing.assert_array_equal(images[0, :, 0].numpy(), expected)


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


@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
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
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whatever_pillow_reads_is_read(tmp_path, suffix):
    for part in ("train", "test"):
        write_picture(tmp_path / part / "a" / f"0.{suffix}", (200, 100, 50), size=(16, 16))
        write_picture(tmp_path / part / "a" / "1.png", (1, 2, 3), size=(16, 16))
    data = nl.load_dataset(tmp_path)
    assert len(data.train_images) == 2
    colour = data.train_images[0].float().mean((1, 2))
    assert (colour - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_what_is_not_read_is_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "pets")
    for name in ("a.heic", "b.pdf", "c"):
        (folder / "train/cat" / name).write_bytes(b"something")
    (folder / "test/dog/more.png").mkdir()
    (folder / "test/dog/.hidden").write_text("left out without a word")
    named = "train/cat/a.heic, train/cat/b.pdf, train/cat/c, …"
    with pytest.warns(UserWarning, match=rf"^4 files .*: {named}$") as caught:
        data = nl.load_dataset(folder)
    assert len(caught) == 1
    assert data.train_labels.bincount().tolist() == [3, 3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    folder = write_folder(tmp_path / "pets")
    os.mkfifo(folder / "train/cat/pipe.png")
    with pytest.warns(UserWarning, match=r"^1 files .*train/cat/pipe.png$"):
        assert len(nl.load_dataset(folder).train_images) == 6


@pytest.mark.parametrize(
    "error", [SyntaxError, NotImplementedError, EOFError, struct.error, MemoryError, KeyError]
)
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


@pytest.mark.parametrize("kind", [str, Path])
def test_an_archive_is_to_be_unpacked(tmp_path, kind):
    write_folder(tmp_path / "pets")
    archive = shutil.make_archive(tmp_path / "pets", "zip", tmp_path / "pets")
    with pytest.raises(ValueError, match=r"pets\.zip' is a file: unpack it"):
        nl.load_dataset(kind(archive))


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Which data sets were decoded instead of taken from the cache."""
    names = []
    decode, read = folders._decode, loading._read_digits
    monkeypatch.setattr(folders, "_decode", lambda *args: names.append("folder") or decode(*args))
    monkeypatch.setattr(loading, "_read_digits", lambda *args: names.append("own") or read(*args))
    return names


def load_bundled(root):
    return nl.load_dataset("digits")


def load_folder(root):
    return nl.load_dataset(root / "pets")


@pytest.fixture(params=[load_bundled, load_folder])
def load(request, tmp_path):
    """Loads the digits or a folder of images below tmp_path."""
    write_folder(tmp_path / "pets")
    return lambda: request.param(tmp_path)


def test_the_second_load_does_not_decode(load, decoded, own_cache):
    first = load()
    assert decoded
    decoded.clear()
    second = load()
    assert decoded == []
    assert second.fingerprint == first.fingerprint
    for field in ("name", "classes", "source", "test_name", "mean", "std"):
        assert getattr(second, field) == getattr(first, field)


def test_a_changed_file_is_noticed(tmp_path, decoded):
    folder = write_folder(tmp_path / "pets")
    first = nl.load_dataset(folder)
    write_picture(folder / "test/dog/1.png", (1, 2, 3))
    second = nl.load_dataset(folder)
    assert second.test_images[-1, :, 0, 0].tolist() == [1, 2, 3]
    assert first.fingerprint != second.fingerprint


def test_an_added_and_a_moved_file_are_noticed(tmp_path):
    folder = write_folder(tmp_path / "pets")
    nl.load_dataset(folder)
    write_picture(folder / "train/dog/9.png", (1, 2, 3))
    assert nl.load_dataset(folder).train_labels.bincount().tolist() == [3, 4]
    (folder / "train/dog/9.png").rename(folder / "train/cat/9.png")
    assert nl.load_dataset(folder).train_labels.bincount().tolist() == [4, 3]


def test_the_shape_asked_for_is_part_of_what_is_kept(tmp_path):
    folder = write_folder(tmp_path / "pets")
    shapes = [None, (1, 5, 6), (3, 8, 8), None]
    loaded = [nl.load_dataset(folder, input_shape=shape).input_shape for shape in shapes]
    assert loaded == [(3, 5, 6), (1, 5, 6), (3, 8, 8), (3, 5, 6)]


def cut_in_half(content):
    return content[: len(content) // 2]


def one_pixel_other(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [cut_in_half, one_pixel_other, emptied])
def test_a_damaged_cache_file_is_named_and_replaced(load, own_cache, damage):
    data = load()
    (file,) = own_cache.rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged.* decoded anew") as caught:
        again = load()
    assert str(file) in str(caught[0].message)
    assert again.fingerprint == data.fingerprint
    assert_is_served(load, data)


def assert_is_served(load, data):
    """The cache holds the data set, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load().fingerprint == data.fingerprint


def test_a_cache_that_cannot_be_written_only_warns(load, own_cache):
    # A file in the place of the folder stops everyone, root too.
    (own_cache / "normlab").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept: .*cannot write") as caught:
        data = load()
    assert len(caught) == 1
    assert len(data.train_images) > 0


def test_the_cache_holds_whole_files_only(load, own_cache):
    load()
    (file,) = (path for path in own_cache.rglob("*") if path.is_file())
    assert file.suffix == ".safetensors"


def test_a_picture_exchanged_at_equal_size_and_time_is_noticed(tmp_path):
    folder = write_folder(tmp_path / "pets", suffix="bmp")
    nl.load_dataset(folder)
    path = folder / "test/dog/1.bmp"
    before = path.stat()
    write_picture(path, (1, 2, 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert nl.load_dataset(folder).test_images[-1, :, 0, 0].tolist() == [1, 2, 3]


def test_an_edited_decoder_is_not_served_what_the_former_one_made(tmp_path, own_cache):
    write_folder(tmp_path / "pets", mode="L")
    shutil.copytree(Path(nl.__file__).parent, tmp_path / "code" / "normlab")
    program = (
        "import normlab as nl\n"
        f"print(nl.load_dataset({str(tmp_path / 'pets')!r}).train_images[0, 0, 0, 0].item())"
    )

    def first_shade():
        command = [sys.executable, "-c", program]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path / "code"
        )
        return int(result.stdout)

    assert first_shade() == 10
    decoder = tmp_path / "code" / "normlab" / "datasets" / "folders.py"
    old = "return torch.stack("
    assert old in decoder.read_text()
    decoder.write_text(decoder.read_text().replace(old, "return 255 - torch.stack("))
    assert first_shade() == 245


def poison(file):
    """Black images, kept as a data set that is whole in itself."""
    tensors = load_file(file)
    images = {name: tensors[f"{name}_images"] * 0 for name in ("train", "test")}
    labels = {name: tensors[f"{name}_labels"] for name in ("train", "test")}
    nl.Dataset(
        *("pets", images["train"], labels["train"], images["test"], labels["test"]),
        ("cat", "dog"),
        "pets",
    ).save(file)


def exchange(file):
    other = write_folder(file.parent / "other", ("dog", "cat"))
    nl.load_dataset(other)
    (theirs,) = (path for path in file.parent.glob("*.safetensors") if path != file)
    theirs.replace(file)


def in_the_way(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [poison, exchange, in_the_way])
def test_what_is_in_the_cache_by_mistake_is_not_believed(tmp_path, own_cache, harm):
    folder = write_folder(tmp_path / "pets")
    data = nl.load_dataset(folder)
    (file,) = own_cache.rglob("*.safetensors")
    harm(file)
    with pytest.warns(UserWarning, match="decoded anew"):
        again = nl.load_dataset(folder)
    assert again.fingerprint == data.fingerprint


def test_a_cache_that_cannot_be_read_only_warns(load, monkeypatch):
    data = load()

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(nl.Dataset, "open", refuse)
    with pytest.warns(UserWarning, match="Permission denied.*decoded anew"):
        assert load().fingerprint == data.fingerprint


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_others_may_read_what_is_kept_as_they_may_any_file(load, own_cache, tmp_path):
    load()
    (file,) = own_cache.rglob("*.safetensors")
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("value", ["", ".", "here"])
def test_a_cache_folder_that_is_no_whole_path_counts_as_unset(load, monkeypatch, tmp_path, value):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    load()
    assert files_below(tmp_path / "work") == []
    assert len(list((tmp_path / "home").rglob("normlab/decoded/*.safetensors"))) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="there are no users' ids")
def test_a_user_without_a_home_loads_and_keeps_data(load, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # as in a container: of no known user
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(RuntimeError):
        Path.home()
    assert_is_served(load, load())
    assert len(list((tmp_path / "temporary/normlab-987654").rglob("*.safetensors"))) == 1


# --- sources name no path --------------------------------------------------------------------


def test_no_source_holds_a_path(tmp_path, load):
    loaded = load()
    write_idx(tmp_path)
    for data in (
        loaded,
        loaded.subset(4),
        loaded.with_validation(0.4),
        nl.load_dataset(tmp_path / "pets", input_shape=(1, 4, 4)),
        nl.load_dataset("mnist", tmp_path, input_shape=(1, 14, 14)),
    ):
        assert "/" not in data.source
        assert str(tmp_path) not in repr(data)


# --- the real MNIST --------------------------------------------------------------------------


def test_the_real_mnist_has_its_well_known_statistics(real_data_root, no_network):
    data = nl.load_dataset("mnist", real_data_root, download=False)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.mean[0] == pytest.approx(0.1307, abs=5e-5)
    assert data.std[0] == pytest.approx(0.3081, abs=5e-5)
    # How often each digit occurs, as LeCun's files have it.
    assert data.train_labels.bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842),
        *(5421, 5918, 6265, 5851, 5949),
    ]
    assert data.classes == tuple("0123456789")
