"""Writes files so that readers find the old contents or the new, never a part of either."""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"  # suffix of files that are being written; a killed process leaves its own behind


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what the body makes there, a file or a folder, becomes `path`.

    If the body raises, `path` stays as it was and nothing is left behind.

    Raises:
        OSError: any error of the file system, with `path` as its file name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        _remove(temporary)
    _sync_folder(path.parent)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a temporary file, flushes it to the disk, and renames it to `path`.

    Raises:
        OSError: any error of the file system, with `path` as its file name; `path` is unchanged.
    """
    with replace_atomically(path) as temporary, open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replaces the file `path` by one that holds `text` in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def link_atomically(source: Path, path: Path) -> None:
    """Makes `path` a hard link to the finished file `source`, or a copy where the file system has no hard links."""
    with replace_atomically(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            write_atomically(temporary, lambda file: file.write(source.read_bytes()))


def append(path: Path, data: bytes) -> None:
    """Appends all of `data` to the file, or nothing.

    Raises:
        OSError: any error of the file system, with `path` as its file name; the file is as long as before.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        error.filename = str(path)
        raise


def _remove(temporary: Path) -> None:
    """Removes a temporary file or folder. A rename between two hard links of one file does nothing and leaves both."""
    try:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    except OSError:
        log.warning("%s: cannot be removed", temporary)  # the next start of the run removes it


def _sync_folder(folder: Path) -> None:
    """Flushes a rename to the disk, on file systems that can do so."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)
