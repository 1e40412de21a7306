"""The data sets: map-style sources of encoded images, their labels and their names.

Each gives `len(images)`, `images.read(i) -> (encoded bytes or picture, label)` (raising `BadImage`),
`images.path(i)` for messages, and `class_names` (by label, None when unknown). Reading, decoding and transforming
are separate, so that a decoder can be chosen without touching a data set.
"""

import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.utils.data
from PIL import Image

from data.codecs.pillow_decode import BadImage
from data.datasets.folder import index_folder
from data.datasets.index import Index, cached
from data.datasets.map_file import names_from_paths, read_map
from data.datasets.validate import check_labels_have_no_gaps
from data.datasets.zip_archive import ZipImages, index_zip
from utils.errors import UserError

log = logging.getLogger(__name__)

IMAGENET_22K_CLASSES = 21841

LARGEST_FILE = 1 << 30  # bytes

LAYOUT_FOLDER = "{root}/train/<class>/<image>.jpg and {root}/val/<class>/<image>.jpg"
LAYOUT_ZIP = "{root}/train.zip, train_map.txt, val.zip, val_map.txt (maps: lines `path<TAB>label`)"
LAYOUT_22K = "{root}/ILSVRC2011fall_whole_map_train.txt and …_val.txt, and the images they list by path below {root}"


class Images(Protocol):
    """A map-style source of images."""

    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """What messages call image `i`."""

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        """Image `i`, encoded or as a picture, and its label. Raises BadImage."""


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe without a writer would keep whoever opens it waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


class FolderImages:
    """Image files below `root`, as an index lists them."""

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
        try:
            with open(self.path(i), "rb", opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                    raise BadImage(self.path(i), "is not a file, or one larger than any image")
                return file.read(), int(self.index.labels[i])
        except (OSError, ValueError) as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error


class TimmImages:
    """A map-style data set that timm made."""

    def __init__(self, name: str, dataset: torch.utils.data.Dataset, class_names: list[str]):
        self.name = name
        self.dataset = dataset
        self.num_classes = len(class_names)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, i: int) -> str:
        return f"{self.name}, sample {i}"

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        try:
            picture, label = self.dataset[i]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error
        if not isinstance(label, int | np.integer) or not 0 <= label < self.num_classes:
            raise BadImage(self.path(i), f"its label is {label!r}, not a number in 0…{self.num_classes - 1}")
        return picture, int(label)


def dataset_digest(images: Images) -> str:
    """Two data sets with the same have the same names and labels in the same order; the pictures are not looked at.

    Of timm's data sets, which have no list of names, the number of images and the classes.
    """
    digest = hashlib.blake2b(json.dumps([len(images), images.class_names]).encode(), digest_size=16)
    index = getattr(images, "index", None)
    if index is not None:
        for buffer in (index.paths.blob, index.paths.ends, index.labels):
            digest.update(np.ascontiguousarray(buffer))
    return digest.hexdigest()


def open_folder(root: Path, split: str) -> FolderImages:
    """`root/<split>/<class>/**/<image>`. Raises UserError when the folder is missing or not of this layout."""
    folder = root / split
    if not folder.is_dir():
        hint = " There are zip files here: add --zip." if (root / f"{split}.zip").is_file() else ""
        raise UserError(f"DATA.DATA_PATH: {folder} is missing. Expected {LAYOUT_FOLDER.format(root=root)}.{hint}")
    try:
        index = cached(root, split, lambda: index_folder(folder))
    except OSError as error:
        raise UserError(f"DATA.DATA_PATH: {folder} cannot be read: {error}. Mend or remove that") from error
    return FolderImages(folder, index, len(index.class_names))


def open_zip(root: Path, split: str, cache_mode: str, share: int, shares: int) -> ZipImages:
    """`root/<split>.zip` with `<split>_map.txt`; for the last three arguments see ZipImages."""
    archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
    for file in (archive, map_file):
        if not file.is_file():
            raise UserError(f"DATA.DATA_PATH: {file} is missing. Expected with --zip: {LAYOUT_ZIP.format(root=root)}.")
    index = cached(root, f"{split}_zip", lambda: index_zip(archive, map_file))
    check_labels_have_no_gaps(map_file, index.labels)
    return ZipImages(archive, index, cache_mode, share, shares)


def open_imagenet_22k(root: Path, split: str) -> FolderImages:
    """The images below `root` that the map file of ImageNet-22K's `split` lists; 21,841 classes."""
    map_file = root / f"ILSVRC2011fall_whole_map_{split}.txt"
    if not map_file.is_file():
        raise UserError(f"DATA.DATA_PATH: {map_file} is missing. Expected {LAYOUT_22K.format(root=root)}.")

    def build() -> tuple[Index, list[Path]]:
        paths, labels = read_map(map_file, IMAGENET_22K_CLASSES)
        names = names_from_paths(paths, labels)
        return Index(paths, labels, names if names and len(names) == IMAGENET_22K_CLASSES else None), [map_file]

    return FolderImages(root, cached(root, f"22k_{split}", build), IMAGENET_22K_CLASSES)


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def open_timm(name: str, root: Path, is_training: bool) -> TimmImages:
    """The data set that timm's `create_dataset` calls `name` (`torch/cifar10`, `hfds/…`), downloaded where missing.

    Raises:
        UserError: not a map-style one, a package it needs is not installed, or it cannot be had.
    """
    source = name.partition("/")[0].lower()
    if source not in ("torch", "hfds"):
        raise UserError(
            f"DATA.DATASET {name!r}: only map-style data sets work here, torch/… (torchvision) and hfds/… (Hugging "
            "Face); streamed ones (hfids, tfds, wds) have no sample numbers to resume by."
        )
    try:
        dataset = _create(name, root, ("train",) if is_training else ("validation", "val", "test"))
    except ModuleNotFoundError as error:
        raise UserError(f"DATA.DATASET {name!r} needs a package that is missing: pip install {error.name}") from None
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"DATA.DATASET {name!r} cannot be opened in {root}: {error}. Check the name, the folder and the network."
        ) from error
    # torchvision's folder-like sets decode by `loader`, which clips 16-bit images; ours decodes what is read here.
    if hasattr(dataset, "loader"):
        dataset.loader = read_file
    # Likewise timm's own class hides what cannot be decoded behind the next image; below it is the plain reader.
    reader = getattr(dataset, "reader", None)
    return TimmImages(name, dataset if reader is None else EncodedReader(reader), _timm_class_names(name, dataset))


_NEVER_DOWNLOADED = ("torch/image_folder", "torch/folder", "torch/imagenet")


class EncodedReader:
    """A timm reader (file object and label by number) as (encoded bytes, label)."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        file, label = self.reader[i]
        with file:
            return file.read(), label


def _create(name: str, root: Path, splits: tuple[str, ...]) -> torch.utils.data.Dataset:
    from timm.data import create_dataset

    if name.lower().startswith("torch/"):
        if name.lower() not in _NEVER_DOWNLOADED:
            root.mkdir(parents=True, exist_ok=True)
        elif not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        arguments = {"name": name, "root": str(root), "split": splits[0]}
        try:
            return create_dataset(**arguments)
        except RuntimeError as error:  # how torchvision says that the files are not there
            log.info("%s is not in %s (%s): downloading it", name, root, str(error).splitlines()[0])
            return create_dataset(**arguments, download=True)
    refused = []
    for split in splits:
        try:
            return create_dataset(name, root=str(root), split=split)
        except ValueError as error:  # how Hugging Face says that there is no such split
            refused.append(f"{split}: {error}")
    raise ValueError("; ".join(refused))


def _timm_class_names(name: str, dataset: torch.utils.data.Dataset) -> list[str]:
    reader = getattr(dataset, "reader", None)
    if reader is not None:
        by_label = {label: str(class_name) for class_name, label in (reader.class_to_idx or {}).items()}
    else:
        classes = getattr(dataset, "classes", None) or []
        by_label = {i: each if isinstance(each, str) else ", ".join(each) for i, each in enumerate(classes)}
    if not by_label or sorted(by_label) != list(range(len(by_label))):
        raise UserError(f"DATA.DATASET {name!r} does not name its classes, so it cannot be used for classification.")
    return [by_label[label] for label in range(len(by_label))]
