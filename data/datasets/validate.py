"""Checks of the data before the first step: the classes, their number and order, and the number of workers."""

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from data.datasets.base import FolderImages, Images
from data.datasets.classes import few
from data.datasets.index import Strings
from utils.errors import UserError

log = logging.getLogger(__name__)

_SYNSET = re.compile(r"n\d{8}")


def check_num_classes(found: int, configured: int, name: str) -> int:
    """Compares MODEL.NUM_CLASSES (0 = as in the data) with the classes `found` in the data called `name`.

    Returns the number of classes.
    """
    if configured not in (0, found):
        raise UserError(
            f"{name} has {found} classes, but MODEL.NUM_CLASSES is {configured}. "
            "Take the number from the data: --opts MODEL.NUM_CLASSES 0"
        )
    if found == 1:
        log.warning("%s has one class only: every prediction is right, and there is nothing to learn", name)
    return found


def check_classes(images: Images, name: str, of_imagenet: bool, known: Collection[str] = ()) -> None:
    """Checks the class names of one split.

    Args:
        of_imagenet: whether 1,000 classes with WordNet ids must be ImageNet-1K's in sorted order.
        known: the names of train or of the weights.

    Raises:
        UserError: see `check_depth` and `check_imagenet_order`.
    """
    if images.class_names is None:
        return
    if isinstance(images, FolderImages):
        check_depth(images.root, images.class_names, images.index.paths, known)
    if of_imagenet:
        check_imagenet_order(images.class_names, name)


def check_num_workers(workers: int, processes: int) -> None:
    """Warns when DATA.NUM_WORKERS of each of `processes` are more than this machine's cores, refuses absurd numbers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"DATA.NUM_WORKERS {workers} for each of {processes} process(es) on this machine, which has {cores} cores"
    advice = f"--opts DATA.NUM_WORKERS {max(1, cores // processes)}"
    if workers * processes > max(64, 8 * cores):
        raise UserError(f"{found}, are too many. Take fewer: {advice}")
    if workers * processes > cores:
        log.warning("%s: more than can run at a time. Better take %s", found, advice)


def check_packed_orientation(settings: dict[str, object], exif_orientation: bool, name: str) -> None:
    """Raises UserError unless the data were packed with the same DATA.EXIF_ORIENTATION: training images lose EXIF."""
    packed = bool(settings.get("exif_orientation", False))
    if packed != exif_orientation:
        raise UserError(
            f"{name}: was packed {'with' if packed else 'without'} --exif-orientation, and DATA.EXIF_ORIENTATION is "
            f"{exif_orientation}. Set it to {packed}, or pack the data again into another folder."
        )


def check_depth(folder: Path, class_names: list[str], paths: Strings, expected: Collection[str] = ()) -> None:
    """Refuses images one or more levels too deep, whose only class is the folder that contains the class folders.

    Warns where the same may be meant for several classes: no class folder has images itself, and each has folders.

    Args:
        folder: of the split. paths: of its images, relative to it.
        expected: names of classes that are known; if the only class is one of them, it is one.
    """
    slashes = np.searchsorted(np.flatnonzero(paths.blob == ord("/")), paths.ends)
    if np.diff(slashes, prepend=0).min() < 2:
        return
    directories = {os.path.dirname(paths[i]) for i in range(len(paths))}
    if len(class_names) == 1 and class_names[0] not in expected:
        common = os.path.commonpath(directories)
        below = sorted({directory[len(common) + 1 :].split("/")[0] for directory in directories})
        if len(below) > 1 and "" not in below:
            raise UserError(
                f"DATA.DATA_PATH: {folder} has one class only, {class_names[0]!r}. Are the classes its folders "
                f"{few(below)}? They are expected in {folder}, and are in {folder / common}: move them up (mv "
                f"'{folder / common}'/* '{folder}'), or make a link {folder.name} -> {folder / common} in another "
                "folder and give that one with --data-path."
            )
    below = sorted({"/".join(directory.split("/")[:2]) for directory in directories})
    if len(class_names) > 1 and len(below) >= 2 * len(class_names):
        log.warning(
            "%s: its %d folders are the classes (%s), and none has images itself, but folders (%s). If those are the "
            "classes, move them up into %s",
            folder, len(class_names), few(class_names), few(below), folder,
        )  # fmt: skip


def check_imagenet_order(class_names: list[str], name: str) -> None:
    """Raises UserError when 1,000 classes with WordNet ids are not ImageNet-1K's in sorted order.

    Released weights assume that order.
    """
    if len(class_names) != 1000 or not all(_SYNSET.fullmatch(class_name) for class_name in class_names):
        return
    expected = ImageNetInfo("imagenet-1k").label_names()
    for label, (found, synset) in enumerate(zip(class_names, expected, strict=True)):
        if found != synset:
            raise UserError(
                f"{name}: label {label} is {found}, where ImageNet-1K has {synset}. Its classes are its 1,000 synsets "
                "numbered in sorted order; make the class folders or the map agree with that."
            )
