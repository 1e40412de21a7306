"""utils/locks.py: a held lock is told from a file system without locks, for everything that takes one."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from data.datasets.pack_writer import folder_lock
from models.pretrained import download
from utils.errors import UserError
from utils.locks import try_lock, wait_for_lock
from utils.tracking.run_dir import RunDir

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def failing(number: int):
    def lock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return lock


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_it_warns_and_goes_on(number: int, caplog: pytest.LogCaptureFixture):
    assert try_lock(failing(number), 0, Path("there/lock"), "two runs meet")
    wait_for_lock(failing(number), 0, Path("there/lock"), "two runs meet")
    assert caplog.text.count(f"there/lock: this file system has no locks ({os.strerror(number)}), so two runs") == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_held_lock_is_no_warning(number: int, caplog: pytest.LogCaptureFixture):
    assert not try_lock(failing(number), 0, Path("lock"), "two runs meet")
    assert not caplog.text


@pytest.mark.parametrize("number", NO_LOCKS)
def test_runs_packs_and_downloads_work_without_locks(number: int, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with RunDir(tmp_path / "run").lock(), folder_lock(tmp_path / "packed"), open(tmp_path / "part", "ab") as part:
        download._wait_for_lock(part, tmp_path / "part", "https://host/file")
    assert caplog.text.count("this file system has no locks") == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_held_folder_is_refused(number: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(UserError, match="another run is live"), RunDir(tmp_path / "run").lock():
        pass
    with pytest.raises(UserError, match="another process is packing"), folder_lock(tmp_path / "packed"):
        pass
