"""Packed data: the images of a split in a few large files with an index, made by `tools/pack_dataset.py`.

A split is a folder: `index.npz` and shards `00000.pack`, `00001.pack`, …, each a sequence of encoded images. Training
images are tiled JPEGs (`data/codecs/tiled_jpeg.py`). The index has for each image the position of its bytes, their
CRC-32, its label and its original path, in numpy buffers, which are read once and shared by forked workers.
"""

import json
import logging
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.codecs.pillow_decode import BadImage
from data.codecs.tiled_jpeg import TiledJpeg
from data.datasets.index import Index, Strings
from utils.errors import UserError
from utils.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 1  # raised when the contents of a pack change
INDEX = "index.npz"
LAYOUT = "{root}/train/index.npz and {root}/val/index.npz, each with its *.pack files"
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int32, "crc": np.uint32}


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
        """Reads an index file. Raises UserError when it is damaged or has another format, FileNotFoundError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["format"] != FORMAT:
                    raise UserError(
                        f"{path} has pack format {head['format']}, and this program reads {FORMAT}. Pack the data "
                        "again: python -m tools.pack_dataset"
                    )
                columns = {name: arrays[name].astype(dtype, copy=False) for name, dtype in _COLUMNS.items()}
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
    """The images of a packed split. Forked workers share the open shards, because each read gives its position."""

    def __init__(self, folder: Path, pack: Pack):
        """Raises UserError when a shard is missing or has another size than in the index."""
        self.folder = folder
        self.index = pack.index
        self.class_names = pack.index.class_names
        self.num_classes = pack.num_classes
        sizes = shard_sizes(pack.index.columns)
        for number, size in enumerate(sizes):
            path = shard_path(folder, number)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found:,} bytes and should have {size:,}"
                raise UserError(f"{path} {problem}. Copy it again, or pack the data again into another folder.")
        self._shards = _OpenShards(folder, len(sizes))

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return f"{shard_path(self.folder, int(self.index.columns['shard'][i]))}:{self.index.paths[i]}"

    def read(self, i: int) -> tuple[bytes, int]:
        """The encoded image (a TiledJpeg if it has tiles) and its label. Raises BadImage when it is damaged."""
        shard, offset, size, crc = (int(self.index.columns[name][i]) for name in _COLUMNS)
        try:
            content = os.pread(self._shards[shard], size, offset)
        except OSError as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise BadImage(self.path(i), "damaged pack: the size or CRC of the image is wrong")
        return TiledJpeg(content) if TiledJpeg.recognises(content) else content, int(self.index.labels[i])


class _OpenShards:
    """File descriptors of the shards by number. Unpickling, as in spawned workers, opens the files again."""

    def __init__(self, folder: Path, count: int):
        self._arguments = (folder, count)
        self._files = [open(shard_path(folder, number), "rb", buffering=0) for number in range(count)]

    def __getitem__(self, number: int) -> int:
        return self._files[number].fileno()

    def __reduce__(self) -> tuple:
        return _OpenShards, self._arguments


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
