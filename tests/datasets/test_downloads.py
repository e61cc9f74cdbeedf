"""The data sets of torchvision: files that are here, and downloads."""

import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import struct
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

import normlab as nl
from normlab.datasets import downloads
from tests.datasets.made_up import COUNTS, files_below, idx_files, write_folder, write_idx

MNIST = torchvision.datasets.MNIST

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


def test_only_the_raw_files_count_and_changed_ones_say_so(tmp_path):
    arrays = write_idx(tmp_path)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # what torchvision once kept, and would load
        torch.save((torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7)), processed / name)
    data = nl.load_dataset("mnist", tmp_path)
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), arrays["train"][0])
    assert data.source == "MNIST, changed"


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGES = {
    "empty": (IMAGES, lambda _: b""),
    "header cut": (IMAGES, lambda content: content[:6]),
    "images cut": (IMAGES, lambda content: content[:-3]),
    "more than it says": (IMAGES, lambda content: content + b"\x00"),
    "labels for images": (IMAGES, lambda _: idx_files()[0]["train-labels-idx1-ubyte"]),
    "other sizes": (
        IMAGES,
        lambda _: struct.pack(">IIII", 2051, 12, 27, 28) + bytes(12 * 27 * 28),
    ),
    "no images": (IMAGES, lambda _: struct.pack(">IIII", 2051, 0, 28, 28)),
    "labels cut": (LABELS, lambda content: content[:-1]),
    "a label above 9": (LABELS, lambda content: content[:-1] + b"\x0a"),
    "a label too few": (LABELS, lambda _: struct.pack(">II", 2049, 4) + bytes(4)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_to_be_deleted(tmp_path, damage):
    write_idx(tmp_path)
    file, change = DAMAGES[damage]
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"/MNIST is damaged .*delete it"):
        nl.load_dataset("mnist", tmp_path, download=False)


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
    assert data.source == "MNIST"


# --- other files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_missing_files_are_named_with_folder_and_address(tmp_path, no_network, name):
    with pytest.raises(FileNotFoundError) as caught:
        nl.load_dataset(name, tmp_path / "nowhere", download=False)
    assert_says_where_to_put_files(str(caught.value), name, tmp_path / "nowhere")
    assert files_below(tmp_path) == []


def assert_says_where_to_put_files(message, name, root):
    source = downloads.SOURCES[name]
    folder = (root / source.files[0]).parent
    assert message.endswith(f'unpack it from {source.address} into {folder}, or take "digits"')


def test_cifar10_is_read_from_torchvisions_batches(tmp_path, monkeypatch, no_network):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    reader = torchvision.datasets.CIFAR10
    pixels, checksums = {}, {}
    for file in downloads._CIFAR_FILES:
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
    "answer", [sign_in_page, hang_up_half_way, labels_only, no_http, say_nothing]
)
def test_a_failed_download_says_what_to_do_and_leaves_nothing(
    tmp_path, monkeypatch, offered, answer
):
    silence = threading.Event()
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "silence", silence, raising=False)
    monkeypatch.setattr(downloads, "DOWNLOAD_TIMEOUT", 0.3)
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


def test_a_server_that_is_not_there_is_a_failed_download(tmp_path, monkeypatch):
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{closed}cifar.tar.gz")
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        nl.load_dataset("cifar10", tmp_path)
    assert_says_where_to_put_files(str(caught.value), "cifar10", tmp_path)
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
