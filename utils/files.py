"""Writing files so that whoever reads them finds the old contents or the new, never half of either."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"  # how files that are being written end; one that is left over belongs to a process that was killed


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a new file beside `path`, brings it to the disk, then renames it to `path`.

    Raises:
        OSError: as the file system says, with `path` as its file name; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        _remove(temporary)
    _sync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of the file, all of it or nothing.

    Raises:
        OSError: as the file system says, with `path` as its file name; the file is as long as before.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def link_atomically(source: Path, path: Path) -> None:
    """Makes `path` another name of the finished file `source`, or a copy of it where the file system has no links."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(path, lambda file: file.write(source.read_bytes()))
        return
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing and leaves both
    _sync_folder(path.parent)


def _remove(temporary: Path) -> None:
    """Where not even this can be done, what stays is removed at the next start."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        log.warning("%s: cannot be removed", temporary)


def _sync_folder(folder: Path) -> None:
    """Brings a rename to the disk. Not every file system can; then there is nothing to bring."""
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
