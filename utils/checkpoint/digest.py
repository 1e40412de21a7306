"""Checkpoint files that carry the SHA-256 of their own contents.

`torch.save` writes a zip archive. Its records have CRC-32 checksums, but its directory has none. So the digest of the
whole file is stored in the archive's comment, which PyTorch and other zip readers ignore.
"""

import hashlib
import os
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch

CHUNK = 1 << 22  # bytes
_MARK = b"sha256:"
_COMMENT_LENGTH = len(_MARK) + 64
_LENGTH_FIELD = 2  # bytes: the last field of an archive without a comment is the length of the comment, zero
_TAIL = _LENGTH_FIELD + _COMMENT_LENGTH


class _HashingFile:
    """Writes through to `file` and hashes all bytes except the archive's last field, which `write_digest` replaces."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self._held = b""  # the last bytes so far: they may be the length field

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _LENGTH_FIELD:
            view = memoryview(self._held + bytes(view))
            self._held = b""
        self._put(self._held)
        self._held = bytes(view[-_LENGTH_FIELD:])
        self._put(view[:-_LENGTH_FIELD])
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def write_digest(self) -> None:
        """Ends the archive with its digest as the comment."""
        self._file.write(_COMMENT_LENGTH.to_bytes(_LENGTH_FIELD, "little"))
        self._file.write(_MARK + self._sha256.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._file.write(data)


def save(contents: dict, file: BinaryIO) -> None:
    """Writes `contents` to `file` with `torch.save`, followed by the digest.

    Raises:
        OSError, RuntimeError: from `file` and PyTorch; PyTorch wraps an error of the file in a RuntimeError.
    """
    hashing = _HashingFile(file)
    torch.save(contents, cast(IO[bytes], hashing))  # torch needs only write() and flush()
    hashing.write_digest()


def verify_digest(path: Path) -> bool | None:
    """Checks the file against the digest that it carries; None where it carries none.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size < _TAIL:
        return None
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(-_TAIL, os.SEEK_END)
        tail = file.read(_TAIL)
        if tail[_LENGTH_FIELD : _LENGTH_FIELD + len(_MARK)] != _MARK:
            return None
        file.seek(0)
        remaining = size - _TAIL
        while remaining and (chunk := file.read(min(CHUNK, remaining))):
            sha256.update(chunk)
            remaining -= len(chunk)
    expected = _COMMENT_LENGTH.to_bytes(_LENGTH_FIELD, "little") + _MARK + sha256.hexdigest().encode()
    return not remaining and tail == expected
