"""Packed data: the images of a split in a few large files, made by `tools/pack_dataset.py`, with an index beside them.

A split is a folder: `index.npz` and shards `00000.pack`, `00001.pack`, …, which are encoded images one behind the
other. Training images are in tiles (`data/codecs/tiled_jpeg.py`). The index says for each image where its bytes lie, their
CRC-32, its label and what it was called where it was packed. It is numpy buffers, read once and shared by forked
workers.
"""

import json
import logging
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.codecs.pillow_decode import BadImage
from data.codecs.tiled_jpeg import TiledJpeg
from data.datasets.index import Index, Strings
from utils.errors import UserError
from utils.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 1  # raised when what a pack holds changes
INDEX = "index.npz"
LAYOUT = "{root}/train/index.npz and {root}/val/index.npz, each with *.pack beside it"
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int32, "crc": np.uint32}


@dataclass(frozen=True)
class Pack:
    """What the index file of a split (or of one shard of it) holds.

    columns: of `index`: `shard` (number), `offset` and `size` (bytes), `crc` (CRC-32); settings: how it was packed.
    """

    index: Index
    num_classes: int
    settings: dict[str, object]

    def save(self, path: Path) -> None:
        """Raises OSError as the file system says."""
        head = {
            "format": FORMAT,
            "class_names": self.index.class_names,
            "num_classes": self.num_classes,
            "settings": self.settings,
        }
        arrays = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), "labels": self.index.labels}
        arrays |= {"blob": self.index.paths.blob, "ends": self.index.paths.ends, **self.index.columns}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Pack":
        """Raises UserError when the file is damaged or of another format, FileNotFoundError when it is missing."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["format"] != FORMAT:
                    raise UserError(
                        f"{path} is of pack format {head['format']}, and this program reads {FORMAT}. Pack the data "
                        "again: python -m tools.pack_dataset"
                    )
                columns = {name: arrays[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
                index = Index(Strings(arrays["blob"], arrays["ends"]), arrays["labels"], head["class_names"], columns)
                pack = cls(index, int(head["num_classes"]), dict(head["settings"]))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}). Copy it again, or pack the data again.") from error
        if any(len(values) != len(index) for values in (index.paths, *columns.values())):
            raise UserError(f"{path} is damaged: its columns differ in length. Copy it again, or pack the data again.")
        return pack


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.pack"


class PackedImages:
    """The images of a packed split. Forked workers share the open shards: reads carry their position."""

    def __init__(self, folder: Path, pack: Pack):
        """Raises UserError when a shard is missing or is shorter than the index says."""
        self.folder = folder
        self.index = pack.index
        self.class_names = pack.index.class_names
        self.num_classes = pack.num_classes
        sizes = shard_sizes(pack.index.columns)
        for number, size in enumerate(sizes):
            path = shard_path(folder, number)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes and should have {size:,}"
                raise UserError(f"{path} {what}. Copy it again, or pack the data again into another folder.")
        self._files = _Files(folder, len(sizes))

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return f"{shard_path(self.folder, int(self.index.columns['shard'][i]))}:{self.index.paths[i]}"

    def read(self, i: int) -> tuple[bytes, int]:
        """The encoded image, a TiledJpeg where it is in tiles, and its label. Raises BadImage when it is damaged."""
        shard, offset, size, crc = (int(self.index.columns[name][i]) for name in _COLUMNS)
        try:
            content = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise BadImage(self.path(i), "damaged pack: its size or CRC is wrong")
        return TiledJpeg(content) if TiledJpeg.recognises(content) else content, int(self.index.labels[i])


class _Files:
    """File descriptors of the shards by number, opened again where this is unpickled (workers that are spawned)."""

    def __init__(self, folder: Path, count: int):
        self._opened = (folder, count)
        self._files = [open(shard_path(folder, number), "rb", buffering=0) for number in range(count)]

    def __getitem__(self, number: int) -> int:
        return self._files[number].fileno()

    def __reduce__(self) -> tuple:
        return _Files, self._opened


def shard_sizes(columns: dict[str, np.ndarray]) -> list[int]:
    """How many bytes each shard must have."""
    sizes = np.zeros(int(columns["shard"].max()) + 1, np.int64)
    np.maximum.at(sizes, columns["shard"], columns["offset"] + columns["size"])
    return sizes.tolist()


def open_packed(root: Path, split: str) -> PackedImages:
    """The packed images in `root/<split>`.

    Raises:
        UserError: there are none, packing them has not ended, or they are damaged.
    """
    folder = root / split
    try:
        pack = Pack.load(folder / INDEX)
    except FileNotFoundError:
        if list(folder.glob("*.pack*")):
            raise UserError(
                f"DATA.DATA_PATH: {folder} is not packed to the end. Give the same command of tools.pack_dataset "
                "again, and it goes on where it stopped."
            ) from None
        raise UserError(
            f"DATA.DATA_PATH: {folder / INDEX} is missing. Expected {LAYOUT.format(root=root)}; "
            "python -m tools.pack_dataset makes them."
        ) from None
    return PackedImages(folder, pack)
