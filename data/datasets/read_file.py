"""Reads one encoded image from a file of the user's, which may be a pipe, a device, or far too large."""

import os
import stat
from typing import BinaryIO

from data.codecs.pillow_decode import BadImage

MAX_IMAGE_BYTES = 1 << 30  # of one encoded image, wherever it lies


def read_file(path: str) -> bytes:
    """The contents of the file. Raises BadImage for what is not a file, is larger than 1 GiB, or cannot be read."""
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(path, "is not a file")
            check_size(status.st_size, path)
            return file.read()
    except (OSError, ValueError) as error:
        raise BadImage(path, f"cannot be read: {error}") from error


def read_at_most(file: BinaryIO, path: str) -> bytes:
    """The rest of an opened file called `path`. Raises BadImage if it is larger than 1 GiB, OSError."""
    content = file.read(MAX_IMAGE_BYTES + 1)
    check_size(len(content), path)
    return content


def check_size(size: int, path: str) -> None:
    """Raises BadImage for an encoded image of more than 1 GiB."""
    if size > MAX_IMAGE_BYTES:
        raise BadImage(path, "is larger than 1 GiB")


def _open_nonblocking(path: str, flags: int) -> int:
    """Opens a named pipe without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
