"""Packed data: the images of a split in a few large files with an index, made by `tools/pack_dataset.py`.

A split is a folder: `index.npz` and shards `00000.pack`, `00001.pack`, …, each a sequence of encoded images. Training
images are tiled JPEGs (`data/codecs/tiled_jpeg.py`). The index has for each image the position of its bytes, their
CRC-32, its label and its original path, in numpy buffers, which are read once and shared by forked workers.
"""

import json
import logging
import os
import re
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.codecs.pillow_decode import BadImage
from data.codecs.tiled_jpeg import TiledJpeg
from data.datasets.index import Index, Strings
from data.datasets.read_file import check_size
from utils.errors import UserError
from utils.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 1  # raised when the contents of a pack change
INDEX = "index.npz"
LAYOUT = "{root}/train/index.npz and {root}/val/index.npz, each with its *.pack files"
MAX_CLASSES = 1_000_000  # a head for more would fill the memory before anything else is noticed
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int32, "crc": np.uint32}
_SHARD_NAME = re.compile(r"([0-9]{5,})\.pack")


@dataclass(frozen=True)
class Pack:
    """The contents of the index file of a split (or of one shard of it).

    The columns of `index` are `shard` (number), `offset` and `size` (bytes), `crc` (CRC-32); `settings` tells how the
    split was packed.
    """

    index: Index
    num_classes: int
    settings: dict[str, Any]  # as JSON has them

    def save(self, path: Path) -> None:
        """Writes the index file. Raises OSError."""
        head = {
            "format": FORMAT,
            "class_names": self.index.class_names,
            "num_classes": self.num_classes,
            "settings": self.settings,
        }
        arrays: dict[str, Any] = {
            "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
            "labels": self.index.labels,
        }
        arrays |= {"blob": self.index.paths.blob, "ends": self.index.paths.ends, **self.index.columns}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Pack":
        """Reads an index file, which is untrusted input. Raises UserError when it is damaged or has another format,
        FileNotFoundError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                _refuse_compression(arrays.zip)
                head = json.loads(arrays["head"].tobytes())
                if head["format"] != FORMAT:
                    raise UserError(
                        f"{path} has pack format {head['format']}, and this program reads {FORMAT}. Pack the data "
                        "again: python -m tools.pack_dataset"
                    )
                blob, ends = _vector("blob", arrays["blob"], np.uint8), _vector("ends", arrays["ends"], np.int64)
                labels = _vector("labels", arrays["labels"], np.int32)
                columns = {name: _vector(name, arrays[name], dtype) for name, dtype in _COLUMNS.items()}
            index = Index(Strings(blob, ends), labels, _class_names(head), columns)
            pack = cls(index, int(head["num_classes"]), dict(head["settings"]))
            _check_rows(index, pack.num_classes)
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # for hostile files, zipfile and numpy raise almost any exception
            reason = str(error) or type(error).__name__
            raise UserError(f"{path} is damaged ({reason}). Copy it again, or pack the data again.") from error
        return pack


def _refuse_compression(archive: zipfile.ZipFile) -> None:
    """The index is stored as it is, so it cannot expand to more memory than its file has."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")


def _vector(name: str, values: np.ndarray, dtype: type) -> np.ndarray:
    """(n,) of `dtype`, which holds each of `values` exactly; none is negative. Raises ValueError."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of whole numbers")
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= np.iinfo(dtype).max:
        raise ValueError(f"{name} has numbers outside 0…{np.iinfo(dtype).max}")
    return values.astype(dtype, copy=False)


def _class_names(head: dict[str, object]) -> list[str] | None:
    """The class names of an index, as many as it has classes. Raises ValueError."""
    names, count = head["class_names"], head["num_classes"]
    if type(count) is not int or not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"num_classes is {str(count)[:50]}, not a number in 1…{MAX_CLASSES}")
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is not a list of {count} names")
    return names


def _check_rows(index: Index, num_classes: int) -> None:
    """Raises ValueError unless each image has a path, a label of a class, and a position that a file can have."""
    if {len(index.paths), *map(len, index.columns.values())} != {len(index)}:
        raise ValueError("its columns differ in length")
    if len(index) == 0:
        raise ValueError("it lists no images")
    if index.labels.max() >= num_classes:
        raise ValueError(f"it has label {index.labels.max()}, and num_classes is {num_classes}")
    if index.columns["offset"].max() > np.iinfo(np.int64).max - np.iinfo(np.int32).max:
        raise ValueError("it has an offset beyond the end of any file")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.pack"


class PackedImages:
    """The images of a packed split. Forked workers share the open shards, because each read gives its position."""

    def __init__(self, folder: Path, pack: Pack):
        """Raises UserError when a shard is missing, cannot be read, or has another size than in the index."""
        self.folder = folder
        self.index = pack.index
        self.class_names = pack.index.class_names
        self.num_classes = pack.num_classes
        _refuse_missing_shards(folder, pack.index.columns["shard"])
        self.settings = pack.settings
        sizes = shard_sizes(pack.index.columns)
        for number, size in enumerate(sizes):
            path = shard_path(folder, number)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found:,} bytes and should have {size:,}"
                raise UserError(f"{path} {problem}. Copy it again, or pack the data again into another folder.")
        try:
            self._shards = _OpenShards(folder, len(sizes))
        except OSError as error:
            raise UserError(
                f"{folder}: {error}. Make its {len(sizes)} *.pack files readable, and allow as many open files "
                "(ulimit -n)."
            ) from error

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return f"{shard_path(self.folder, int(self.index.columns['shard'][i]))}:{self.index.paths[i]}"

    def read(self, i: int) -> tuple[bytes, int]:
        """The encoded image (a TiledJpeg if it has tiles) and its label.

        Raises:
            BadImage: it is damaged, or larger than 1 GiB.
        """
        shard, offset, size, crc = (int(self.index.columns[name][i]) for name in _COLUMNS)
        check_size(size, self.path(i))
        try:
            content = os.pread(self._shards[shard], size, offset)
        except OSError as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise BadImage(self.path(i), "damaged pack: the size or CRC of the image is wrong")
        if TiledJpeg.recognises(content):
            try:
                content = TiledJpeg.checked(content)
            except ValueError as error:
                raise BadImage(self.path(i), f"damaged table of tiles: {error}") from error
        return content, int(self.index.labels[i])


class _OpenShards:
    """File descriptors of the shards by number. Unpickling, as in spawned workers, opens the files again."""

    def __init__(self, folder: Path, count: int):
        self._arguments = (folder, count)
        self._files = [open(shard_path(folder, number), "rb", buffering=0) for number in range(count)]
        for file in self._files:
            weakref.finalize(self, file.close)

    def __getitem__(self, number: int) -> int:
        return self._files[number].fileno()

    def __reduce__(self) -> tuple:
        return _OpenShards, self._arguments


def _refuse_missing_shards(folder: Path, numbers: np.ndarray) -> None:
    """Raises UserError unless `folder` has all shards from 0 to the last of `numbers`.

    A number that no file has is found before anything of that size is allocated.
    """
    found = {int(match[1]) for name in os.listdir(folder) if (match := _SHARD_NAME.fullmatch(name))}
    missing = next(number for number in range(len(found) + 1) if number not in found)
    if missing <= int(numbers.max()):
        raise UserError(
            f"{shard_path(folder, missing)} is missing, and the index lists images in shards up to {numbers.max()}. "
            "Copy it again, or pack the data again into another folder."
        )


def shard_sizes(columns: dict[str, np.ndarray]) -> list[int]:
    """The size of each shard in bytes, from the columns of the index."""
    sizes = np.zeros(int(columns["shard"].max()) + 1, np.int64)
    np.maximum.at(sizes, columns["shard"], columns["offset"] + columns["size"])
    return sizes.tolist()


def open_packed(root: Path, split: str) -> PackedImages:
    """Opens the packed images in `root/<split>`.

    Raises:
        UserError: there are none, packing has not finished, or they are damaged.
    """
    folder = root / split
    try:
        pack = Pack.load(folder / INDEX)
    except FileNotFoundError:
        if list(folder.glob("*.pack*")):
            raise UserError(
                f"DATA.DATA_PATH: packing {folder} has not finished. Run the same command of tools.pack_dataset again: "
                "it continues where it stopped."
            ) from None
        raise UserError(
            f"DATA.DATA_PATH: {folder / INDEX} is missing. Expected {LAYOUT.format(root=root)}; "
            "python -m tools.pack_dataset makes them."
        ) from None
    return PackedImages(folder, pack)
