"""What labels mean: the classes of train, of val and of given weights are brought together by their names.

Labels are numbers that each source of images counts for itself. The numbering that counts is that of train, and in an
evaluation that of the weights; validation labels are translated to it. Val may lack some of the classes.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from data.datasets.base import Images
from data.datasets.folder import composed, in_order_of_numbers
from utils.config.rules import IMAGENET_22K_CLASSES
from utils.errors import UserError

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class WeightClasses:
    """The classes of given weights: their names by label if they are stored there, and the classifier's outputs.

    `source` is the name of the weights in messages.
    """

    source: str
    names: list[str] | None
    outputs: int | None


class RelabelledImages:
    """Images with other labels: those of `class_names`, or `num_classes` without names, instead of their own."""

    def __init__(self, images: Images, labels: Sequence[int], class_names: list[str] | None, num_classes: int):
        """`labels`: the new label by the old one."""
        self.images = images
        self.labels = np.array(labels, np.int32)
        self.class_names = class_names
        self.num_classes = num_classes
        index = getattr(images, "index", None)
        if index is not None:
            self.index = replace(index, labels=self.labels[index.labels], class_names=class_names)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return self.images.path(i)

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        source, label = self.images.read(i)
        return source, int(self.labels[label])


def names_of(images: Images) -> list[str] | None:
    """Class names by label; None if one is unknown, as of a label without images in a map."""
    return None if images.class_names is None or "" in images.class_names else images.class_names


def relabel(images: Images, class_names: list[str]) -> Images:
    """`images` with the labels of `class_names`, among which are all names of `images`.

    Raises:
        UserError: a name occurs twice, so that it has no label of its own.
    """
    if images.class_names is None or images.class_names == class_names:
        return images
    for names in (class_names, [name for name in images.class_names if name]):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise UserError(
                f"{images.path(0)}: two classes of these data or of the weights are called {twice!r}, so that labels "
                "cannot be matched by name. Give each class a name of its own."
            )
    numbers = {name: label for label, name in enumerate(class_names)}
    labels = [numbers.get(name, -1) for name in images.class_names]  # -1: "", a label without images
    return RelabelledImages(images, labels, class_names, len(class_names))


def relabel_by_number(images: Images) -> Images:
    """`images` with the classes in the order of numbers, if they are named 0…K-1."""
    ordered = in_order_of_numbers(images.class_names or [])
    return images if ordered is None else relabel(images, ordered)


def match_val_to_train(train: Images, val: Images, name: str) -> Images:
    """`val` with the labels of `train`: by name if both have names, else by number. Warns about classes without images.

    Raises:
        UserError: a class of val that train does not have, or the same classes with other labels.
    """
    if train.class_names is None or val.class_names is None:
        if val.num_classes > train.num_classes:
            raise UserError(
                f"{name}: train has {train.num_classes} classes and val has {val.num_classes}. "
                "Give val no classes that train does not have."
            )
        if val.num_classes < train.num_classes:
            val = RelabelledImages(val, range(val.num_classes), None, train.num_classes)
        _warn_about_missing(val, name)
        return val
    only_train, only_val = _differences(train.class_names, val.class_names)
    if only_val:
        raise UserError(
            f"{name}: train and val have different classes. Only in train: {few(only_train)}; only in val: "
            f"{few(only_val)}. {normalisation_hint(only_train, only_val)}Give val no classes that train does not have."
        )
    if not only_train and len(train.class_names) == len(val.class_names):
        for label, (in_train, in_val) in enumerate(zip(train.class_names, val.class_names, strict=True)):
            if in_train != in_val:
                raise UserError(
                    f"{name}: label {label} means {in_train!r} in train but {in_val!r} in val. Number the classes "
                    "alike in both maps."
                )
    val = relabel(val, train.class_names)
    _warn_about_missing(val, name)
    return val


def match_val_to_weights(val: Images, weights: WeightClasses | None, configured: int, name: str) -> Images:
    """`val` with the labels of the weights to evaluate, or ImageNet-1K's if val has some of its synsets.

    Args:
        weights: None if they are not known.
        configured: MODEL.NUM_CLASSES.

    Raises:
        UserError: the weights name their classes, and val has others.
    """
    names, outputs = val.class_names, weights.outputs if weights else None
    if weights and weights.names and names:
        val = _match_to_names(val, weights.names, f"{weights.source}: was trained on other classes than the data's")
    elif names and (outputs or configured) in (1000, IMAGENET_22K_CLASSES) and configured in (0, 1000):
        synsets = ImageNetInfo("imagenet-1k").label_names()
        if set(filter(None, names)) <= set(synsets):
            val = relabel(val, synsets)
        elif outputs == IMAGENET_22K_CLASSES and _is_numbered(names, len(synsets)):
            val = _by_imagenet_number(val, synsets)
    _warn_about_missing(val, name)
    return val


def _match_to_names(val: Images, known: list[str], problem: str) -> Images:
    """`val` with the labels of `known`; ImageNet's classes may be synsets in one and numbers in the other."""
    names = val.class_names or []
    only_known, only_val = _differences(known, names)
    if not only_val:
        if not only_known and names != known:
            log.info("the labels of the validation images are translated by class name to those of the weights")
        return relabel(val, known)
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if known == synsets and _is_numbered(names, len(synsets)):
        return _by_imagenet_number(val, synsets)
    if _is_numbered(known, len(synsets)) and set(filter(None, names)) <= set(synsets):
        numbers = {synset: str(number) for number, synset in enumerate(synsets)}
        labels = [known.index(numbers[each]) if each else -1 for each in names]
        return RelabelledImages(val, labels, known, len(known))
    raise UserError(
        f"{problem}. Only in the weights: {few(only_known)}; only in the data: {few(only_val)}. "
        f"{normalisation_hint(only_known, only_val)}Give the data it was trained on, or start a new run from its "
        "weights with --pretrained"
    )


def _is_numbered(names: Sequence[str], count: int) -> bool:
    return len(names) == count and in_order_of_numbers(names) is not None


def _by_imagenet_number(val: Images, synsets: list[str]) -> Images:
    log.warning("the classes 0…%d of the data are taken as ImageNet-1K's synsets in sorted order", len(synsets) - 1)
    return RelabelledImages(val, [int(name) for name in val.class_names or []], synsets, len(synsets))


def _warn_about_missing(val: Images, name: str) -> None:
    """One warning about the classes without validation images."""
    index = getattr(val, "index", None)
    if index is not None:
        missing = np.setdiff1d(np.arange(val.num_classes), index.labels).tolist()
    else:
        present = val.labels.tolist() if isinstance(val, RelabelledImages) else range(val.num_classes)
        missing = sorted(set(range(val.num_classes)) - set(present))
    if missing:
        shown = few([val.class_names[label] if val.class_names else str(label) for label in missing])
        log.warning(
            "%s: %d of %d classes have no validation images (%s). Metrics are those of the images of the other %d, "
            "among the outputs for all %d",
            name, len(missing), val.num_classes, shown, val.num_classes - len(missing), val.num_classes,
        )  # fmt: skip


def warn_about_names(names: Sequence[str], name: str) -> None:
    """Warns about names whose order is easily mistaken (numbers), and about names that only look alike."""
    if names and all(map(_NUMBER.fullmatch, names)):
        text, numbers = sorted(names), sorted(names, key=int)
        if list(names) != numbers:
            label = next(i for i, (here, there) in enumerate(zip(names, numbers, strict=True)) if here != there)
            log.warning(
                "%s: the classes are named by numbers, but are not in their order: label %d is class %r. Name them "
                "0…%d without a gap, or with leading zeros, if label N should be class N",
                name, label, names[label], len(names) - 1,
            )  # fmt: skip
        elif text != numbers:
            label = next(i for i, (here, there) in enumerate(zip(text, numbers, strict=True)) if here != there)
            log.warning(
                "%s: the classes are named by numbers, and label N is class N, as in ImageNetV2 and timm. torchvision "
                "and the original code order such folders as text (label %d is %r): weights trained so, without class "
                "names in their file, have other labels. Leading zeros make both orders the same",
                name, label, text[label],
            )  # fmt: skip
    same = _same_but_for_normalisation(names, names)
    if same:
        log.warning(
            "%s: the classes %s and %s differ in Unicode normalisation alone. Make them one if they are meant to be",
            name, ascii(same[0][0]), ascii(same[0][1]),
        )  # fmt: skip


def _differences(known: Iterable[str], found: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names that only the first, and only the second, has; "" stands for a label without images."""
    first, second = set(filter(None, known)), set(filter(None, found))
    return sorted(first - second), sorted(second - first)


def _same_but_for_normalisation(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    by_form = {composed(name): name for name in first}
    return [(by_form[composed(name)], name) for name in second if by_form.get(composed(name), name) != name]


def normalisation_hint(first: Sequence[str], second: Sequence[str]) -> str:
    """Names that look alike but differ in their bytes, as a sentence for an error; "" if there are none."""
    pairs = _same_but_for_normalisation(first, second)
    if not pairs:
        return ""
    return (
        f"{pairs[0][0]!r} ({ascii(pairs[0][0])}) and {pairs[0][1]!r} ({ascii(pairs[0][1])}) differ in Unicode "
        f"normalisation alone (composed and decomposed letters, as macOS writes them), {len(pairs)} name(s) in all: "
        "rename one of the folders. "
    )


def few(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
