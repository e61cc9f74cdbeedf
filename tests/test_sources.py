"""Where images come from: the bundled digits, files, downloads, folders, and the cache."""

import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import normlab as nl
from normlab import folders, sources

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


@pytest.mark.parametrize("wrong", [(28, 28), (2, 28, 28), (1, 0, 28), (1, 28.0, 28)])
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
    empty_a_class: (ValueError, "no png or jpg"),
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


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Which data sets were decoded instead of taken from the cache."""
    names = []
    decode, read = folders._decode, sources._read_known
    monkeypatch.setattr(folders, "_decode", lambda *args: names.append("folder") or decode(*args))
    monkeypatch.setattr(sources, "_read_known", lambda *args: names.append("known") or read(*args))
    return names


def load_known(root):
    return nl.load_dataset("mnist", root, download=False)


def load_folder(root):
    return nl.load_dataset(root / "pets")


@pytest.fixture(params=[load_known, load_folder])
def load(request, tmp_path):
    """Loads a small MNIST or a folder of images, both below tmp_path."""
    write_idx(tmp_path)
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
    with pytest.warns(UserWarning, match="damaged; it is decoded anew") as caught:
        again = load()
    assert str(file) in str(caught[0].message)
    assert again.fingerprint == data.fingerprint
    assert nl.Dataset.open(file).fingerprint == data.fingerprint


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


# --- sources name no path --------------------------------------------------------------------


def test_no_source_holds_a_path(tmp_path, load):
    loaded = load()
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
