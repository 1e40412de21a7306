"""Map files: lists of a split's images with their labels, for the zip layout and ImageNet-22K.

Two formats are read: lines `path<TAB>label`, and one JSON array of `[path, label]` pairs.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.datasets.index import Strings
from utils.errors import UserError

MAX_GAPPY_CLASSES = 1_000_000  # with gaps, a mistyped label would otherwise make a list of as many class names
_LINE = re.compile(rb"(.+)\t *(\d{1,9}) *")


def read_map(path: Path, num_classes: int | None = None, allow_gaps: bool = False) -> tuple[Strings, np.ndarray]:
    """Reads the map file `path`.

    Args:
        num_classes: labels must be below this; None when labels must be 0…K-1, each with an image.
        allow_gaps: whether a label may be without an image nevertheless.

    Returns:
        the images' paths, (n,), and their labels, (n,) int32.

    Raises:
        UserError: missing or empty file; a line (entry) that is not a path and a label, with its number; labels with
            gaps.
    """
    limit = num_classes or (MAX_GAPPY_CLASSES if allow_gaps else 2**31)
    labels = array("i")

    def paths() -> Iterator[str]:
        for where, image, label in _entries(path):
            if not 0 <= label < limit:
                raise UserError(f"{where}: label {label} is not in 0…{limit - 1}. Correct this entry of the map.")
            if ".." in image.split("/"):
                raise UserError(f"{where}: {image!r} points outside the data. Remove this entry, or the '..' in it.")
            labels.append(label)
            yield image

    strings = Strings.pack(paths())
    if not labels:
        raise UserError(f"{path} lists no images. Expected lines `path<TAB>label`.")
    array_of_labels = np.array(labels, np.int32)
    if num_classes is None and not allow_gaps:
        _check_no_gaps(path, array_of_labels)
    return strings, array_of_labels


def _check_no_gaps(path: Path, labels: np.ndarray) -> None:
    """Raises UserError unless the labels are 0…K-1, each with an image: a gap is most often a mistake in the map."""
    present = np.unique(labels)
    missing = np.setdiff1d(np.arange(len(present)), present)
    if len(missing):
        raise UserError(
            f"{path}: no image has label {missing[0]}, although labels go up to {present[-1]}. Number the classes "
            "from 0 without gaps."
        )


def _entries(path: Path) -> Iterator[tuple[str, str, int]]:
    """(location in the file, path, label) of each entry."""
    try:
        with open(path, "rb") as file:
            is_json = file.read(64).lstrip()[:1] == b"["
            file.seek(0)
            yield from _json_entries(path, file.read()) if is_json else _line_entries(path, file)
    except FileNotFoundError:
        raise UserError(f"The map file {path} is missing. It lists the images: lines `path<TAB>label`.") from None
    except OSError as error:
        raise UserError(f"The map file {path} cannot be read: {error}") from error


def _line_entries(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(lines, start=1):
        line = line.strip(b"\r\n")
        if not line:
            continue
        where = f"{path}, line {number}"
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise UserError(f"{where}: expected `path<TAB>label` with a whole number as label, found {line[:100]!r}.")
        yield where, _decode_path(parts[1], where), int(parts[2])


def _json_entries(path: Path, text: bytes) -> Iterator[tuple[str, str, int]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Copy the file again.") from error
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, entry {number}"
        match entry:
            case [str(image), int(label)] if image and not isinstance(label, bool):
                yield where, _decode_path(image.encode("utf-8", "surrogatepass"), where), label
            case _:
                raise UserError(f"{where}: expected [path, label], found {str(entry)[:100]}.")


def _decode_path(image: bytes, where: str) -> str:
    try:
        return image.decode().strip("/")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the path is not UTF-8 ({error}). Write the map as UTF-8.") from error


def class_names_from_paths(paths: Strings, labels: np.ndarray, allow_gaps: bool = False) -> list[str] | None:
    """Class names by label, if the first folder of each image's path names its class, one folder for each label.

    None otherwise (flat lists, another nesting, a label without an image). With `allow_gaps`, a label without an image
    has the name "".
    """
    names: dict[int, str] = {}
    for i, label in enumerate(labels.tolist()):
        folder, slash, _ = paths[i].partition("/")
        if not slash or names.setdefault(label, folder) != folder:
            return None
    count = max(names, default=-1) + 1
    if len(set(names.values())) != len(names) or (len(names) != count and not allow_gaps):
        return None
    return [names.get(label, "") for label in range(count)]
