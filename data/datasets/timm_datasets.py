"""Data sets by the names of timm's `create_dataset`: `torch/cifar10` (torchvision), `hfds/…` (Hugging Face)."""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch.utils.data
from PIL import Image

from data.codecs.pillow_decode import EXTENSIONS, BadImage
from data.datasets.folder import ending, warn_about_ignored
from data.datasets.read_file import read_at_most, read_file
from utils.errors import UserError

log = logging.getLogger(__name__)

TORCH_FOLDERS = ("torch/image_folder", "torch/folder")
_NEVER_DOWNLOADED = (*TORCH_FOLDERS, "torch/imagenet")


class _MapStyle(Protocol):
    """A data set of timm or torchvision: what `_create` returns, or `_EncodedImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, Any]: ...


class TimmImages:
    """A map-style data set that timm made."""

    def __init__(self, name: str, dataset: _MapStyle, class_names: list[str]):
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
            image, label = self.dataset[i]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadImage(self.path(i), f"cannot be read: {error}") from error
        if not isinstance(label, int | np.integer) or not 0 <= label < self.num_classes:
            raise BadImage(self.path(i), f"its label is {label!r}, not a number in 0…{self.num_classes - 1}")
        return image, int(label)


def open_timm(name: str, root: Path, is_training: bool) -> TimmImages:
    """Opens the data set that timm's `create_dataset` calls `name`, and downloads it to `root` if it is missing.

    Raises:
        UserError: the data set is not map-style, needs a package that is missing, or cannot be opened or downloaded.
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
    # The default loader of torchvision's folders clips 16-bit images, so they are read here and decoded by our codecs.
    if hasattr(dataset, "loader"):
        dataset.loader = read_file
    # timm's ImageDataset replaces an undecodable image by the next one without a word; its reader does not.
    reader = getattr(dataset, "reader", None)
    return TimmImages(name, dataset if reader is None else _EncodedImages(name, reader), _class_names(name, dataset))


def _is_image(path: str, ignored: Counter[str]) -> bool:
    """Whether a file has the ending of an image; counts the others. torchvision's list of endings is shorter."""
    if ending(path) in EXTENSIONS:
        return True
    ignored[ending(path)] += 1
    return False


class _Reader(Protocol):
    """A reader of timm: file object and label by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[BinaryIO, int]: ...


class _EncodedImages(torch.utils.data.Dataset):
    """The images of a timm reader as (encoded bytes, label)."""

    def __init__(self, name: str, reader: _Reader):
        self.name = name
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        file, label = self.reader[i]
        with file:
            return read_at_most(file, f"{self.name}, sample {i}"), label


def _create(name: str, root: Path, splits: tuple[str, ...]) -> _MapStyle:
    """The first of `splits` that the data set has."""
    from timm.data import create_dataset

    if name.lower().startswith("torch/"):
        if name.lower() not in _NEVER_DOWNLOADED:
            root.mkdir(parents=True, exist_ok=True)
        elif not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        create = partial(create_dataset, name=name, root=str(root), split=splits[0])
        ignored: Counter[str] = Counter()  # by ending
        if name.lower() in TORCH_FOLDERS:
            # A class without validation images is warned about later.
            is_valid = partial(_is_image, ignored=ignored)
            create = partial(create, is_valid_file=is_valid, allow_empty=splits[0] != "train")
        try:
            dataset = create()
            warn_about_ignored(f"{root}, {splits[0]}", ignored)
            return dataset
        except RuntimeError as error:  # torchvision's error for missing files
            log.info("%s is not in %s (%s): downloading it", name, root, str(error).splitlines()[0])
            return create(download=True)
    errors = []
    for split in splits:
        try:
            return create_dataset(name, root=str(root), split=split)
        except ValueError as error:  # Hugging Face's error for an unknown split
            errors.append(f"{split}: {error}")
    raise ValueError("; ".join(errors))


def _class_names(name: str, dataset: _MapStyle) -> list[str]:
    reader = getattr(dataset, "reader", None)
    if reader is not None:
        by_label = {label: str(class_name) for class_name, label in (reader.class_to_idx or {}).items()}
    else:
        classes = getattr(dataset, "classes", None) or []
        by_label = {i: each if isinstance(each, str) else ", ".join(each) for i, each in enumerate(classes)}
    if not by_label or sorted(by_label) != list(range(len(by_label))):
        raise UserError(f"DATA.DATASET {name!r} does not name its classes, so it cannot be used for classification.")
    return [by_label[label] for label in range(len(by_label))]
