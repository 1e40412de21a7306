"""utils/files.py: the old contents or the new, never a part of either."""

import os
import resource
import signal
from pathlib import Path

import pytest

from tests._forked import forked
from utils.files import append, link_atomically, replace_atomically, write_atomically


def test_write_atomically_keeps_the_old_file_when_the_write_fails(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_link_atomically_replaces_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, path = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"1")
    for _ in range(2):  # the second time, both names are the same file already
        link_atomically(source, path)
        assert source.samefile(path)
    write_atomically(source, lambda file: file.write(b"2"))
    assert path.read_bytes() == b"1"

    def no_links(*args):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", no_links)
    link_atomically(source, path)
    assert path.read_bytes() == b"2" and not source.samefile(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_append_writes_all_or_nothing(tmp_path: Path):
    path = tmp_path / "lines"
    append(path, b"first\n")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        try:
            append(path, b"second line\n")
        except OSError as error:
            print(error.filename)

    assert forked(limited).output.strip() == str(path)
    assert path.read_bytes() == b"first\n"


def test_replace_atomically_takes_files_and_folders(tmp_path: Path):
    with replace_atomically(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("1")
    assert (tmp_path / "folder" / "file").read_text() == "1"
    with pytest.raises(ValueError, match="stop"), replace_atomically(tmp_path / "other") as temporary:
        temporary.mkdir()
        raise ValueError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
