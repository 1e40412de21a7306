"""Checks of the data before the first step: the classes, their number and order, and the number of workers."""

import logging
import os
import re

from timm.data import ImageNetInfo

from data.datasets.base import Images
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
    return found


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


def check_same_classes(train: Images, val: Images, name: str) -> None:
    """Raises UserError unless train and val have the same classes: by name if both have names, else by number."""
    if train.class_names is None or val.class_names is None:
        if train.num_classes != val.num_classes:
            raise UserError(
                f"{name}: train has {train.num_classes} classes and val has {val.num_classes}. "
                "Give both the same classes."
            )
        return
    only_train = sorted(set(train.class_names) - set(val.class_names))
    only_val = sorted(set(val.class_names) - set(train.class_names))
    if only_train or only_val:
        raise UserError(
            f"{name}: train and val have different classes. Only in train: {_few(only_train)}; only in val: "
            f"{_few(only_val)}. Give both the same class folders."
        )
    for label, (in_train, in_val) in enumerate(zip(train.class_names, val.class_names, strict=True)):
        if in_train != in_val:
            raise UserError(
                f"{name}: label {label} means {in_train!r} in train but {in_val!r} in val. Number the classes alike in "
                "both maps."
            )


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


def _few(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
