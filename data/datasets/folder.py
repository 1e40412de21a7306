"""Image folders: `<root>/<class>/**/<image>`, classes and images in the order of torchvision's ImageFolder."""

import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.datasets.index import Index, Strings
from utils.errors import UserError

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def index_folder(root: Path) -> tuple[Index, list[Path]]:
    """Walks `root`. Returns its index, and every directory visited (what the index depends on).

    Raises:
        UserError: no class folders, a class folder without an image, a link that leads back into itself.
    """
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} has no class folders. Expected {root}/<class>/<image>.jpg")
    walk = _Walk(root)
    labels = array("i")

    def paths() -> Iterator[str]:
        for label, name in enumerate(names):
            found = 0
            for directory, files in sorted(walk.below(root / name, ())):
                for file in sorted(files):
                    yield f"{directory}/{file}"[len(f"{root}/") :]
                    labels.append(label)
                    found += 1
            if not found:
                raise UserError(
                    f"The class folder {root / name} has no images (files ending in {', '.join(ENDINGS)}). "
                    "Remove the folder, or put the images of this class into it."
                )

    strings = Strings.pack(paths())
    if walk.ignored:
        log.warning(
            "%s: %d files are not images by their ending and are left out, e.g. %s", root, walk.ignored, walk.example
        )
    if walk.hidden:
        log.warning("%s: %d hidden files or folders (names with a dot at the start) are left out", root, walk.hidden)
    return Index(strings, np.array(labels, np.int32), names), walk.visited


class _Walk:
    """Directories visited so far, and the files in them that are no images."""

    def __init__(self, root: Path):
        self.visited = [root]
        self.ignored = 0
        self.hidden = 0
        self.example = ""

    def below(self, directory: Path, ancestors: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
        """(directory, names of the images in it) for `directory` and all below it; links are followed."""
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
                elif entry.name.lower().endswith(ENDINGS) and entry.is_file():
                    files.append(entry.name)
                else:
                    self.ignored += 1
                    self.example = entry.path
        yield str(directory), files
        for folder in folders:
            yield from self.below(directory / folder, (*ancestors, identity))
