"""The zip layout: `train.zip` with `train_map.txt`, `val.zip` with `val_map.txt`.

Forked workers cannot share Python's ZipFile, because they would share its file position, and it keeps one object per
member. Here the central directory becomes a few columns of the index, and each read gives its own position.
"""

import logging
import mmap
import os
import struct
import weakref
import zipfile
import zlib
from array import array
from io import FileIO
from pathlib import Path

import numpy as np

from data.codecs.pillow_decode import BadImage
from data.datasets.folder import composed
from data.datasets.index import Index
from data.datasets.map_file import class_names_from_paths, read_map
from data.datasets.read_file import check_size
from utils.errors import UserError

log = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_ENCRYPTED = 0x1


def index_zip(archive: Path, map_file: Path, allow_gaps: bool = False) -> tuple[Index, list[Path]]:
    """Indexes the members of `archive` that `map_file` lists. Returns the index and the files it depends on.

    Columns: `offset` of the local header, `compressed` and `size` in bytes, `crc`, `method` (0 stored, 8 deflated).

    Args:
        allow_gaps: whether a label may be without an image.

    Raises:
        UserError: missing or damaged archive; a member that is missing, encrypted or compressed by another method; a
            bad line of the map; labels with gaps.
    """
    paths, labels = read_map(map_file, allow_gaps=allow_gaps)
    columns = {name: array("q") for name in ("offset", "compressed", "size", "crc", "method")}
    try:
        with zipfile.ZipFile(archive) as members:
            for i in range(len(paths)):
                member = _member(members, paths[i], map_file)
                values = (
                    member.header_offset,
                    member.compress_size,
                    member.file_size,
                    member.CRC,
                    member.compress_type,
                )
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    except FileNotFoundError:
        raise UserError(f"{archive} is missing. The zip layout needs it together with {map_file}.") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive} cannot be read as a zip file: {error}. Copy it again.") from error
    arrays = {name: np.array(column, np.int64) for name, column in columns.items()}
    return Index(paths, labels, class_names_from_paths(paths, labels, allow_gaps), arrays), [archive, map_file]


def _member(members: zipfile.ZipFile, name: str, map_file: Path) -> zipfile.ZipInfo:
    try:
        member = members.getinfo(name)
    except KeyError:
        alike = next((each for each in members.namelist() if composed(each) == composed(name)), None)
        hint = f" It has {alike!a}, and the map {name!a}, which differ in Unicode normalisation alone." if alike else ""
        raise UserError(
            f"{members.filename} has no member {name!r}, which {map_file} lists.{hint} Correct or remove the line, or "
            "add the image."
        ) from None
    if member.flag_bits & _ENCRYPTED:
        raise UserError(f"{members.filename}: the member {name!r} is encrypted. Pack the images without a password.")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"{members.filename}: the member {name!r} has compression method {member.compress_type}; only stored and "
            "deflated ones are read. Pack it again: zip -0 -r FILE.zip FOLDER"
        )
    return member


class ZipImages:
    """The images of an indexed zip. Forked workers share one file descriptor, because each read gives its position.

    cache_mode:
        "no": each read goes to the file.
        "part": the same, after the kernel was asked to read this process's part of the file (part `local_rank` of
            `local_world_size`) into the page cache, which all processes of the machine share.
        "full": each process of the machine copies the whole file once into memory, which workers forked later share.
            Spawned workers cannot see it and read from the file.
    """

    def __init__(
        self,
        archive: Path,
        index: Index,
        cache_mode: str = "no",
        local_rank: int = 0,
        local_world_size: int = 1,
    ):
        self.archive = archive
        self.index = index
        self.num_classes = int(index.labels.max()) + 1
        self.class_names = index.class_names
        self._file = open(archive, "rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._copy: mmap.mmap | None = None
        if cache_mode == "part":
            _read_ahead(self._file.fileno(), local_rank, local_world_size)
        elif cache_mode == "full":
            self._copy = _copy_to_memory(self._file, archive, copies=local_world_size)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_copy": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_file": open(state["archive"], "rb", buffering=0)}
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return f"{self.archive}:{self.index.paths[i]}"

    def read(self, i: int) -> tuple[bytes, int]:
        """The encoded image and its label.

        Raises:
            BadImage: it is larger than 1 GiB, or the archive is damaged there (the CRC is checked).
        """
        columns = {name: int(column[i]) for name, column in self.index.columns.items()}
        check_size(max(columns["size"], columns["compressed"]), self.path(i))
        try:
            header = self._bytes(columns["offset"], _LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\x03\x04":
                raise ValueError("no member begins at the offset in the zip's directory")
            start = columns["offset"] + _LOCAL_HEADER.size + name_length + extra_length
            content = self._bytes(start, columns["compressed"])
            if columns["method"] == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(columns["size"], 1))
            if len(content) != columns["size"] or zlib.crc32(content) != columns["crc"]:
                raise ValueError("the size or CRC of the member is wrong")
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise BadImage(self.path(i), f"damaged zip: {error}") from error
        return content, int(self.index.labels[i])

    def _bytes(self, start: int, length: int) -> bytes:
        if self._copy is not None:
            return self._copy[start : start + length]
        return os.pread(self._file.fileno(), length, start)


def _read_ahead(descriptor: int, local_rank: int, local_world_size: int) -> None:
    if not hasattr(os, "posix_fadvise"):
        log.warning("DATA.CACHE_MODE part (--cache-mode) has no effect: this system has no posix_fadvise")
        return
    size = os.fstat(descriptor).st_size
    start, stop = (size * (local_rank + i) // local_world_size for i in (0, 1))
    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _copy_to_memory(file: FileIO, archive: Path, copies: int) -> mmap.mmap:
    size = os.fstat(file.fileno()).st_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size * copies > memory:
        raise UserError(
            f"DATA.CACHE_MODE full (--cache-mode) would copy {archive} ({size / 2**30:.1f} GiB) {copies} time(s), and "
            f"this machine has {memory / 2**30:.1f} GiB of memory. Use --cache-mode part."
        )
    copy = mmap.mmap(-1, size)
    with memoryview(copy) as view:
        done = 0
        while done < size:
            count = file.readinto(view[done : done + (1 << 24)])
            if not count:
                raise UserError(f"{archive} became shorter while it was read. Start again.")
            done += count
    return copy
