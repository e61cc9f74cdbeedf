"""Folders that one process at a time may use."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from normlab.support.locks import InUse, locked, scratch_folder


def test_folders_are_locked_by_one_at_a_time_and_leave_nothing(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    other.mkdir()
    with locked(one, other, one), locked(other):  # the same thread may ask again
        for place in (one, other):
            with pytest.raises(Timeout):
                FileLock(place / ".lock", timeout=0).acquire()
    assert [path.name for path in tmp_path.rglob("*")] == ["other"]  # which was there before
    with FileLock(one / ".lock"):
        with pytest.raises(InUse), locked(other, one, wait=False):
            pytest.fail("it is in use")
        FileLock(other / ".lock", timeout=0).acquire().lock.release()  # the other one is free


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot write .*file: "), locked(tmp_path / "file"):
        pytest.fail("that is no folder")


@pytest.mark.process
def test_a_temporary_folder_outlasts_no_process_that_used_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "normlab-of-another-kind").mkdir()
    code = (
        "import os\n"
        "from normlab.support.locks import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'images').touch()\n"
        "    if os.path.isdir('/dev/shm'):\n"
        "        open(f'/dev/shm/sem.loky-{os.getpid()}-0', 'w').close()  # as joblib does\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    process.wait()
    (killed,) = (path for path in tmp_path.glob("normlab-*") if (path / "images").exists())
    with scratch_folder() as first, scratch_folder() as second:
        assert not killed.exists()
        assert first.is_dir()  # in use: the second does not remove it
        assert second.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["normlab-of-another-kind"]
    assert list(Path("/dev/shm").glob(f"sem.loky-{process.pid}-*")) == []
