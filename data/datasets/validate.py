"""What must hold of the data before the first step: the classes, their number and their order."""

import logging
import os
import re
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from utils.errors import UserError

log = logging.getLogger(__name__)

_SYNSET = re.compile(r"n\d{8}")


def check_labels_have_no_gaps(map_file: Path, labels: np.ndarray) -> None:
    """Raises UserError unless the labels are 0…K-1, each with an image (a gap is most often a mistake in the map)."""
    present = np.unique(labels)
    missing = np.setdiff1d(np.arange(len(present)), present)
    if len(missing):
        raise UserError(
            f"{map_file}: no image has label {missing[0]}, although labels go up to {present[-1]}. Number the classes "
            "from 0 without gaps."
        )


def check_num_classes(found: int, wanted: int, what: str) -> int:
    """`found` classes in the data (called `what`) against MODEL.NUM_CLASSES `wanted`, 0 meaning what is found."""
    if wanted not in (0, found):
        raise UserError(
            f"{what} has {found} classes, but MODEL.NUM_CLASSES is {wanted}. "
            "Take the number from the data: --opts MODEL.NUM_CLASSES 0"
        )
    return found


def check_num_workers(workers: int, processes: int) -> None:
    """DATA.NUM_WORKERS of each of `processes` on this machine: more than cores are slower, far more a mistake."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    what = f"DATA.NUM_WORKERS {workers} for each of {processes} process(es) on this machine, which has {cores} cores"
    advice = f"--opts DATA.NUM_WORKERS {max(1, cores // processes)}"
    if workers * processes > max(64, 8 * cores):
        raise UserError(f"{what}, are too many. Take fewer: {advice}")
    if workers * processes > cores:
        log.warning("%s: more than work at a time. Better take %s", what, advice)


def check_same_classes(train: list[str] | None, val: list[str] | None, num_train: int, num_val: int, what: str) -> None:
    """Train and val must have the same classes: by name where both have names, else by their number."""
    if train is not None and val is not None:
        only_train = sorted(set(train) - set(val))
        only_val = sorted(set(val) - set(train))
        if only_train or only_val:
            raise UserError(
                f"{what}: train and val have different classes. Only in train: {_few(only_train)}; only in val: "
                f"{_few(only_val)}. Give both the same class folders."
            )
        if train != val:
            first = next(i for i, pair in enumerate(zip(train, val, strict=True)) if pair[0] != pair[1])
            raise UserError(
                f"{what}: label {first} means {train[first]!r} in train but {val[first]!r} in val. Number the classes "
                "alike in both maps."
            )
    elif num_train != num_val:
        raise UserError(f"{what}: train has {num_train} classes and val has {num_val}. Give both the same classes.")


def check_imagenet_order(class_names: list[str], what: str) -> None:
    """1,000 classes named by WordNet ids must be ImageNet-1K's, in sorted order: released weights mean that order."""
    if len(class_names) != 1000 or not all(_SYNSET.fullmatch(name) for name in class_names):
        return
    expected = ImageNetInfo("imagenet-1k").label_names()
    for label, (found, right) in enumerate(zip(class_names, expected, strict=True)):
        if found != right:
            raise UserError(
                f"{what}: label {label} is {found}, where ImageNet-1K has {right}. Its classes are its 1,000 synsets "
                "numbered in sorted order; make the class folders or the map agree with that."
            )


def _few(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
