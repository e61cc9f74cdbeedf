"""Files that are whole or not there, also when the disk is full."""

import json
import os
from pathlib import Path

import pytest

import normlab as nl
from normlab.cli import main
from normlab.support.files import (
    atomic_write,
    read_json,
    remove_leftovers,
    user_path,
    write_bytes,
    write_json,
    write_text,
)


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("before", [None, b"old"])
def test_the_file_appears_when_it_is_whole(tmp_path, before):
    path = tmp_path / "new" / "file.txt"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    with atomic_write(path) as aside:
        aside.write_bytes(b"half")
        assert (path.read_bytes() if path.exists() else None) == before
        aside.write_bytes(b"whole")
    assert everything_in(path.parent) == {"file.txt": b"whole"}


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, before, failure):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_bytes(before)

    def write():
        with atomic_write(path) as aside:
            aside.write_bytes(b"half")
            raise failure(28, "it went wrong")

    with pytest.raises(failure, match="it went wrong"):
        write()
    assert everything_in(tmp_path) == ({} if before is None else {"file.txt": before})


def test_who_reads_the_old_file_meanwhile_reads_all_of_it(tmp_path):
    path = tmp_path / "file.txt"
    write_bytes(path, b"old")
    with path.open("rb") as reader:
        write_bytes(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
@pytest.mark.parametrize("before", [None, 0o600, 0o664])
def test_a_file_keeps_its_permissions_and_a_new_one_has_the_usual_ones(tmp_path, before):
    path, usual = tmp_path / "file.txt", tmp_path / "usual"
    usual.touch()
    if before is not None:
        path.touch()
        path.chmod(before)
    with atomic_write(path) as aside:
        aside.unlink()
        os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does it
    expected = usual.stat().st_mode & 0o777 if before is None else before
    assert path.stat().st_mode & 0o777 == expected


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"loss": 0.5})
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert everything_in(tmp_path).keys() == {"value.json"}
    assert read_json(path) == {"loss": 0.5}


def test_a_full_disk_leaves_the_old_file_and_is_told_in_a_sentence(tmp_path, full_disk):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*: File too large$") as caught:
        write_bytes(path, bytes(100_000))
    assert str(path) in str(caught.value)
    assert everything_in(tmp_path) == {"file.bin": b"old"}
    write_bytes(path, bytes(100_000))
    assert path.stat().st_size == 100_000


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("a file in the place of the folder")
    path = tmp_path / "runs" / "file.txt"
    with pytest.raises(OSError, match="cannot write") as caught:
        write_text(path, "text")
    assert str(path) in str(caught.value)


def test_a_full_disk_does_not_keep_a_data_set_from_loading(tmp_path, own_cache, full_disk):
    from PIL import Image

    for place in ("train/a", "test/a"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (100, 100), 7).save(tmp_path / place / "0.png")
    with full_disk(), pytest.warns(UserWarning, match="not kept"):
        data = nl.load_dataset(tmp_path)
    assert data.train_images.unique().tolist() == [7]
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_text_is_utf_8_with_the_line_ends_it_was_given(tmp_path):
    write_text(tmp_path / "a.txt", "ä × µ\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä × µ\n".encode()


def test_json_comes_back_as_it_was(tmp_path):
    value = {"lr": 0.1, "names": ["ä", "b"], "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither modes nor, for everybody, links")
def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    page, link = tmp_path / "there" / "page.md", tmp_path / "page.md"
    write_text(page, "old")
    page.chmod(0o640)
    link.symlink_to("there/page.md")
    write_text(link, "new")
    assert link.is_symlink()
    assert page.read_text() == "new"
    assert page.stat().st_mode & 0o777 == 0o640
    assert everything_in(page.parent) == {"page.md": b"new"}


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot synchronise a folder")
def test_a_loss_of_power_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """What would be left after each step: content that is synchronised, names that are."""
    on_disk, seen = {}, []
    fsync, replace = os.fsync, os.replace

    def synchronised(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        on_disk[status.st_ino] = status.st_size
        seen.append(("sync", status.st_ino))

    def moved(source, target):
        content = os.stat(source)
        assert on_disk.get(content.st_ino) == content.st_size == 3
        replace(source, target)
        seen.append(("move", content.st_ino))

    monkeypatch.setattr(os, "fsync", synchronised)
    monkeypatch.setattr(os, "replace", moved)
    path = tmp_path / "runs" / "bn" / "config.json"
    write_bytes(path, b"new")
    assert [what for what, _ in seen] == ["sync", "sync", "sync", "move", "sync"]
    folders = [folder.stat().st_ino for folder in (tmp_path, tmp_path / "runs", path.parent)]
    assert [number for _, number in seen] == [*folders[:2], *[path.stat().st_ino] * 2, folders[2]]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": ', b"\xff\xfe\x00", b'{"loss": NaN}', b"[" * 100_000],
)
def test_damaged_json_is_named_with_what_to_do(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*: delete") as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_two_that_write_one_file_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "a") as one:
        one.write_text("one")
        with atomic_write(tmp_path / "a") as other:
            other.write_text("other")
            assert len(everything_in(tmp_path)) == 2
        assert everything_in(tmp_path).pop("a") == b"other"
    assert everything_in(tmp_path) == {"a": b"one"}


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".weights.safetensors.123.part", "weights.safetensors", "notes.part", ".hidden"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert set(everything_in(tmp_path)) == {"weights.safetensors", "notes.part", ".hidden"}


# --- the home folder --------------------------------------------------------------------------


def write_everywhere(results: nl.Results, tiny, network) -> dict[str, object]:
    """Lets everything that takes a path from a user write below `~`; returns what came back."""
    options = {"device": "cpu", "progress": False}
    one = {"data": tiny, "epochs": 1, **options}
    nl.run_assignment(results.assignment, directory="~/kept", **one)
    return {
        "runs": nl.run_assignment(results.assignment, directory="~/r", kept="~/kept", **one),
        "fit": nl.fit(network, tiny, nl.Recipe(epochs=1), directory="~/fit", **options),
        "sweep": nl.run_sweep(results.assignment, norms=("gn",), directory="~/sweep", **one),
        "report": nl.write_report(results, "~/report"),
        "figure": nl.save_figure(nl.plot_curves(results), "~/a/figure.png"),
        "xlsx": nl.to_spreadsheet("~/example.xlsx"),
    }


def test_a_tilde_is_the_home_folder_everywhere(
    tiny, tiny_assignment, tiny_network, tmp_path, monkeypatch
):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    results = nl.run_assignment(tiny_assignment, data=tiny, epochs=1, device="cpu", progress=False)
    written = write_everywhere(results, tiny, tiny_network())
    assert list(here.iterdir()) == []
    assert {path.name for path in home.iterdir()} == {
        *("kept", "fit", "sweep", "report", "a", "example.xlsx")
    }
    taken = [run for runs in written["runs"].values() for run in runs]
    assert all(run.directory.is_relative_to(home / "kept") for run in taken)
    assert written["figure"] == home / "a" / "figure.png"
    assert main(["run", "mnist-l1", "--dataset", "digits", "--data-root", "~/none"]) == 2


def test_a_home_that_is_not_there_is_told():
    assert user_path("a/~b") == Path("a/~b")
    with pytest.raises(ValueError, match="no home folder for ~nobody-of-this-name/x"):
        user_path("~nobody-of-this-name/x")
