"""Image folders: `<root>/<class>/**/<image>`, in the order of torchvision's ImageFolder.

One exception: classes named 0…K-1 are in the order of numbers, as in timm, so that label N is class N.
"""

import logging
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.codecs.pillow_decode import EXTENSIONS
from data.datasets.index import Index, Strings
from utils.errors import UserError

log = logging.getLogger(__name__)


def index_folder(root: Path, allow_empty: bool = False) -> tuple[Index, list[Path]]:
    """Walks `root`. Returns its index, and every directory visited (the index depends on them).

    Args:
        allow_empty: whether a class folder may have no images; all of them must not.

    Raises:
        UserError: no class folders, a class folder without an image, a link to a folder that contains it.
    """
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} has no class folders. Expected {root}/<class>/<image>.jpg")
    names = in_order_of_numbers(names) or names
    walk = _Walk(root)
    labels = array("i")

    def paths() -> Iterator[str]:
        for label, name in enumerate(names):
            count = 0
            for directory, files in sorted(walk.below(root / name, ())):
                for file in sorted(files):
                    yield f"{directory}/{file}"[len(f"{root}/") :]
                    labels.append(label)
                    count += 1
            if not count and not allow_empty:
                raise UserError(
                    f"The class folder {root / name} has no images (files ending in {', '.join(EXTENSIONS)}). "
                    "Remove the folder, or put the images of this class into it."
                )

    strings = Strings.pack(paths())
    if not labels:
        raise UserError(f"The class folders in {root} have no images (files ending in {', '.join(EXTENSIONS)}).")
    warn_about_ignored(str(root), walk.ignored)
    if walk.hidden:
        log.warning("%s: %d hidden files or folders (names that begin with a dot) are ignored", root, walk.hidden)
    return Index(strings, np.array(labels, np.int32), names), walk.visited


def in_order_of_numbers(names: Sequence[str]) -> list[str] | None:
    """The names in the order of numbers, if they are the numbers 0…K-1, with or without leading zeros; else None."""
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return None
    ordered = sorted(names, key=int)
    return ordered if [int(name) for name in ordered] == list(range(len(names))) else None


def composed(name: str) -> str:
    """`name` with composed letters. macOS decomposes them, so that equal names may differ in their bytes."""
    return unicodedata.normalize("NFC", name)


def ending(path: str) -> str:
    """The ending of a file's name, in lower case and with its dot; "" for none."""
    return os.path.splitext(path)[1].lower()


def warn_about_ignored(root: str, counts: Counter[str]) -> None:
    """Warns about the files that are not images: how many have which ending, the most frequent ones first."""
    if not counts:
        return
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {ending or 'without an ending'}" for ending, count in ordered[:20]]
    shown += [f"{len(counts) - len(shown)} more endings"] if len(counts) > len(shown) else []
    total = counts.total()
    log.warning(
        "%s: %d %s not read as images: %s. Images end in %s",
        root, total, "file is" if total == 1 else "files are", ", ".join(shown), " ".join(EXTENSIONS),
    )  # fmt: skip


class _Walk:
    """Counts the files that are not images, and remembers the visited directories."""

    def __init__(self, root: Path):
        self.visited = [root]
        self.ignored: Counter[str] = Counter()  # number of files by ending
        self.hidden = 0

    def below(self, directory: Path, ancestors: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
        """(directory, names of the images in it) for `directory` and all below it; links are followed.

        `ancestors`: (device, inode) of the directories above.
        """
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            raise UserError(f"{directory} is a link to a folder that contains it. Remove the link.")
        self.visited.append(directory)
        files, folders = [], []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self.hidden += 1
                elif entry.is_dir():
                    folders.append(entry.name)
                elif ending(entry.name) not in EXTENSIONS:
                    self.ignored[ending(entry.name)] += 1
                elif entry.is_file():
                    files.append(entry.name)
                else:
                    self.ignored[f"{ending(entry.name)} (a broken link, a pipe or a device)"] += 1
        yield str(directory), files
        for folder in folders:
            yield from self.below(directory / folder, (*ancestors, identity))
