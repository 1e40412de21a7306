"""Checkpoint files that carry the SHA-256 of their own contents.

A file of `torch.save` is a zip archive. Its records have CRC-32 checksums, its directory has none; so the digest of all
that was written stands in the archive's comment, which PyTorch and every zip program pass over.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import torch

CHUNK = 1 << 22  # bytes
_MARK = b"sha256:"
_SEAL_LENGTH = len(_MARK) + 64
_LENGTH_FIELD = 2  # bytes at the end of an archive without comment that say how long the comment is: none
_TAIL = _LENGTH_FIELD + _SEAL_LENGTH


class _Hashing:
    """A file that is written through, hashing all but the length of the comment that the archive does not have yet."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self._held = b""

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

    def seal(self) -> None:
        """Ends the archive with its digest as comment."""
        self._put(b"")
        self._file.write(_SEAL_LENGTH.to_bytes(_LENGTH_FIELD, "little"))
        self._file.write(_MARK + self._sha256.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._file.write(data)


def save(contents: dict, file: BinaryIO) -> None:
    """`torch.save` of `contents` to `file`, with the digest.

    Raises:
        OSError, RuntimeError: as `file` and PyTorch do; PyTorch wraps an error of the file in one of its own.
    """
    hashing = _Hashing(file)
    torch.save(contents, hashing)
    hashing.seal()


def verify_digest(path: Path) -> bool | None:
    """Whether the file's contents have the digest that it carries; None where it carries none.

    Raises:
        OSError: it cannot be read.
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
        left = size - _TAIL
        while left and (chunk := file.read(min(CHUNK, left))):
            sha256.update(chunk)
            left -= len(chunk)
    found = sha256.hexdigest().encode()
    return not left and tail == _SEAL_LENGTH.to_bytes(_LENGTH_FIELD, "little") + _MARK + found
