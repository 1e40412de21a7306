"""Data sets: map-style sources of encoded images, their labels and their names.

`images.read(i)` gives the encoded bytes (or an opened image) and the label of image `i`. Reading, decoding and
transforming are separate, so that a decoder can be chosen without touching a data set.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from data.datasets.folder import index_folder
from data.datasets.index import Index, cached
from data.datasets.map_file import class_names_from_paths, read_map
from data.datasets.read_file import read_file
from data.datasets.zip_archive import ZipImages, index_zip
from utils.config.rules import IMAGENET_22K_CLASSES
from utils.errors import UserError

LAYOUT_FOLDER = "{root}/train/<class>/<image>.jpg and {root}/val/<class>/<image>.jpg"
LAYOUT_ZIP = "{root}/train.zip, train_map.txt, val.zip, val_map.txt (maps: lines `path<TAB>label`)"
LAYOUT_22K = "{root}/ILSVRC2011fall_whole_map_train.txt and …_val.txt, and the images they list by path below {root}"


class Images(Protocol):
    """A map-style source of images. `class_names` is by label, None when unknown."""

    num_classes: int

    @property
    def class_names(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """The name of image `i` in messages."""

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        """Image `i`, encoded or opened, and its label. Raises BadImage."""


class FolderImages:
    """The image files below `root` that `index` lists."""

    def __init__(self, root: Path, index: Index, num_classes: int):
        self.root = root
        self.index = index
        self.num_classes = num_classes
        self.class_names = index.class_names

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return f"{self.root}/{self.index.paths[i]}"

    def read(self, i: int) -> tuple[bytes, int]:
        return read_file(self.path(i)), int(self.index.labels[i])


def dataset_digest(images: Images) -> str:
    """Digest of the number of images, the class names, and every image's path and label; pixels are not read.

    Data sets of timm have no list of paths: theirs is a digest of the number of images and the class names.
    """
    digest = hashlib.blake2b(json.dumps([len(images), images.class_names]).encode(), digest_size=16)
    index = getattr(images, "index", None)
    if index is not None:
        for buffer in (index.paths.blob, index.paths.ends, index.labels):
            digest.update(np.ascontiguousarray(buffer).data)
    return digest.hexdigest()


def open_folder(root: Path, split: str) -> FolderImages:
    """Opens `root/<split>/<class>/**/<image>`. Raises UserError when the folder is missing or has another layout."""
    folder = root / split
    if not folder.is_dir():
        hint = " There are zip files here: add --zip." if (root / f"{split}.zip").is_file() else _nearby(root, split)
        raise UserError(f"DATA.DATA_PATH: {folder} is missing. Expected {LAYOUT_FOLDER.format(root=root)}.{hint}")
    try:
        index = cached(root, split, lambda: index_folder(folder, allow_empty=split != "train"))
    except OSError as error:
        raise UserError(f"DATA.DATA_PATH: {folder} cannot be read: {error}. Repair or remove that") from error
    return FolderImages(folder, index, len(index.class_names or ()))


def _nearby(root: Path, split: str) -> str:
    """A hint where the folder of the split is if `root` is one level too high or too deep; else ""."""
    if (root.parent / split).is_dir() and root.name in ("train", "val"):
        return f" It is one level higher: give --data-path {root.parent}."
    with os.scandir(root) as entries:
        found = sorted(entry.path for entry in entries if os.path.isdir(os.path.join(entry.path, split)))
    return f" There is one a level deeper: give --data-path {found[0]}." if found else ""


def open_zip(root: Path, split: str, cache_mode: str, local_rank: int, local_world_size: int) -> ZipImages:
    """Opens `root/<split>.zip` with `<split>_map.txt`; for the last three arguments see ZipImages."""
    archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
    for file in (archive, map_file):
        if not file.is_file():
            raise UserError(f"DATA.DATA_PATH: {file} is missing. Expected with --zip: {LAYOUT_ZIP.format(root=root)}.")
    index = cached(root, f"{split}_zip", lambda: index_zip(archive, map_file, allow_gaps=split != "train"))
    return ZipImages(archive, index, cache_mode, local_rank, local_world_size)


def open_imagenet_22k(root: Path, split: str) -> FolderImages:
    """Opens the images below `root` that ImageNet-22K's map file of `split` lists; 21,841 classes."""
    map_file = root / f"ILSVRC2011fall_whole_map_{split}.txt"
    if not map_file.is_file():
        raise UserError(f"DATA.DATA_PATH: {map_file} is missing. Expected {LAYOUT_22K.format(root=root)}.")

    def build() -> tuple[Index, list[Path]]:
        paths, labels = read_map(map_file, IMAGENET_22K_CLASSES)
        names = class_names_from_paths(paths, labels)
        return Index(paths, labels, names if names and len(names) == IMAGENET_22K_CLASSES else None), [map_file]

    return FolderImages(root, cached(root, f"22k_{split}", build), IMAGENET_22K_CLASSES)
