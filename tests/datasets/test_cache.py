"""Decoded data sets in the user's cache folder."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import normlab as nl
from normlab.datasets import folders, loading
from tests.datasets.made_up import files_below, write_folder, write_picture


@pytest.fixture
def decoded(monkeypatch):
    """Which data sets were decoded instead of taken from the cache."""
    names = []
    decode, read = folders._decode, loading._read_digits
    monkeypatch.setattr(folders, "_decode", lambda *args: names.append("folder") or decode(*args))
    monkeypatch.setattr(loading, "_read_digits", lambda *args: names.append("own") or read(*args))
    return names


@pytest.fixture
def folder(tmp_path):
    """A folder of images."""
    return write_folder(tmp_path / "pets")


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_the_second_load_does_not_decode(name, folder, decoded):
    first = nl.load_dataset(folder if name == "folder" else name)
    assert decoded
    decoded.clear()
    second = nl.load_dataset(folder if name == "folder" else name)
    assert decoded == []
    assert second.fingerprint == first.fingerprint
    for field in ("name", "classes", "source", "test_name", "mean", "std"):
        assert getattr(second, field) == getattr(first, field)


def test_an_added_and_a_moved_file_are_noticed(folder):
    nl.load_dataset(folder)
    write_picture(folder / "train/dog/9.png", (1, 2, 3))
    assert nl.load_dataset(folder).train_labels.bincount().tolist() == [3, 4]
    (folder / "train/dog/9.png").rename(folder / "train/cat/9.png")
    assert nl.load_dataset(folder).train_labels.bincount().tolist() == [4, 3]


def test_the_shape_asked_for_is_part_of_what_is_kept(folder):
    shapes = [None, (1, 5, 6), (3, 8, 8), None]
    loaded = [nl.load_dataset(folder, input_shape=shape).input_shape for shape in shapes]
    assert loaded == [(3, 5, 6), (1, 5, 6), (3, 8, 8), (3, 5, 6)]


def test_a_picture_exchanged_at_equal_size_and_time_is_noticed(tmp_path):
    folder = write_folder(tmp_path / "pets", suffix="bmp")
    nl.load_dataset(folder)
    path = folder / "test/dog/1.bmp"
    before = path.stat()
    write_picture(path, (1, 2, 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert nl.load_dataset(folder).test_images[-1, :, 0, 0].tolist() == [1, 2, 3]


def cut_in_half(content):
    return content[: len(content) // 2]


def one_pixel_other(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [cut_in_half, one_pixel_other, emptied])
def test_a_damaged_cache_file_is_named_and_replaced(folder, own_cache, damage):
    data = nl.load_dataset(folder)
    (file,) = own_cache.rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged.* decoded anew") as caught:
        again = nl.load_dataset(folder)
    assert str(file) in str(caught[0].message)
    assert again.fingerprint == data.fingerprint
    assert_is_served(folder, data)


def assert_is_served(folder, data):
    """The cache holds the data set, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nl.load_dataset(folder).fingerprint == data.fingerprint


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


def nest(file):
    save_file(load_file(file), file, metadata={"about": "[" * 100_000})


def in_the_way(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [poison, exchange, nest, in_the_way])
def test_what_is_in_the_cache_by_mistake_is_not_believed(tmp_path, own_cache, harm):
    folder = write_folder(tmp_path / "pets")
    data = nl.load_dataset(folder)
    (file,) = own_cache.rglob("*.safetensors")
    harm(file)
    with pytest.warns(UserWarning, match="decoded anew"):
        again = nl.load_dataset(folder)
    assert again.fingerprint == data.fingerprint


def test_a_cache_that_cannot_be_read_only_warns(folder, monkeypatch):
    data = nl.load_dataset(folder)

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(nl.Dataset, "open", refuse)
    with pytest.warns(UserWarning, match="Permission denied.*decoded anew"):
        assert nl.load_dataset(folder).fingerprint == data.fingerprint


def test_a_cache_that_cannot_be_written_only_warns(folder, own_cache):
    # A file in the place of the folder stops everyone, root too.
    (own_cache / "normlab").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept: .*cannot write") as caught:
        data = nl.load_dataset(folder)
    assert len(caught) == 1
    assert len(data.train_images) > 0


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_others_may_read_what_is_kept_as_they_may_any_file(folder, own_cache, tmp_path):
    nl.load_dataset(folder)
    (file,) = (path for path in own_cache.rglob("*") if path.is_file())
    assert file.suffix == ".safetensors"
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("value", ["", "here"])
def test_a_cache_folder_that_is_no_whole_path_counts_as_unset(folder, monkeypatch, tmp_path, value):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    nl.load_dataset(folder)
    assert files_below(tmp_path / "work") == []
    assert len(list((tmp_path / "home").rglob("normlab/decoded/*.safetensors"))) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="there are no users' ids")
def test_a_user_without_a_home_loads_and_keeps_data(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # as in a container: of no known user
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(RuntimeError):
        Path.home()
    assert_is_served(folder, nl.load_dataset(folder))
    assert len(list((tmp_path / "temporary/normlab-987654").rglob("*.safetensors"))) == 1


@pytest.mark.process
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
