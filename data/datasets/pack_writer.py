"""Writes packed data (data/datasets/packed.py): downscales images, encodes them as tiled JPEGs, and fills shards.

A shard gets its name when it is complete, and then an index of its own; the index of the split is written when all
shards are complete. So packing that was interrupted continues after the last complete shard.
"""

import fcntl
import io
import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.codecs.pillow_decode import BadImage, decode, upright
from data.codecs.tiled_jpeg import encode
from data.datasets.base import Images
from data.datasets.index import Index, Strings
from data.datasets.packed import INDEX, Pack, shard_path
from utils.errors import UserError
from utils.files import TEMPORARY, write_atomically
from utils.locks import try_lock

log = logging.getLogger(__name__)

MAX_LOSSLESS_SIZE = 64  # longer side, pixels: JPEG would damage such small images and save nothing
SHARD_BYTES = 1 << 31


class EncodedImage(NamedTuple):
    """The bytes to store and the label of one image; for a bad image `content` is None and `reason` is why."""

    content: bytes | None
    label: int
    reason: str = ""


@dataclass(frozen=True)
class ImageEncoder:
    """Encodes the images of a split for storage.

    size: longer side in pixels, None to store them unchanged.
    exif_orientation: turn images that are encoded again as their EXIF orientation says, because that gets lost.
    """

    images: Images
    size: int | None
    quality: int
    exif_orientation: bool = False

    def __call__(self, i: int) -> EncodedImage:
        try:
            source, label = self.images.read(i)
            turned = upright(source, self.images.path(i)) if self.exif_orientation else source
            image = decode(turned, self.images.path(i))
        except BadImage as error:
            return EncodedImage(None, -1, str(error))
        if self.size is None:
            return EncodedImage(source if isinstance(source, bytes) else encode_png(image), label)
        if max(image.size) <= MAX_LOSSLESS_SIZE:
            return EncodedImage(encode_png(image), label)
        return EncodedImage(encode(downscale(image, self.size), self.quality), label)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def downscale(image: Image.Image, size: int) -> Image.Image:
    """`image` with a longer side of at most `size` pixels and the same aspect ratio."""
    factor = size / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@dataclass
class Shard:
    """The images written to a shard so far, a row for each; `next` is the index of the image to continue with."""

    number: int
    next: int
    bad: list[str]
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # offset, size, CRC, label
    names: list[str] = field(default_factory=list)
    bytes: int = 0

    def pack(self, class_names: list[str] | None, num_classes: int, settings: dict[str, Any]) -> Pack:
        offset, size, crc, label = np.array(self.rows, np.int64).reshape(-1, 4).T
        columns: dict[str, np.ndarray] = {
            "shard": np.full(len(label), self.number, np.int32),
            "offset": offset,
            "size": size.astype(np.int32),
            "crc": crc.astype(np.uint32),
        }
        index = Index(Strings.pack(self.names), label.astype(np.int32), class_names, columns)
        return Pack(index, num_classes, settings | {"next": self.next, "bad": self.bad})


@dataclass
class ShardWriter:
    """Packs one split into `folder`, continuing where an earlier attempt stopped.

    settings: everything that determines the result; an attempt with other settings cannot be continued.
    names: the original path of an image, by index.
    encode: images of a range of indices, in order, as `ImageEncoder` makes them.
    progress: is called with the number of images done and the bytes of the last one.
    """

    images: Images
    folder: Path
    settings: dict[str, Any]
    names: Callable[[int], str]
    encode: Callable[[range], Generator[EncodedImage, None, None]]
    progress: Callable[[int, int], None]
    max_bad: int

    def run(self) -> Pack:
        parts = self.finished_parts()
        start, bad = (parts[-1].settings["next"], list(parts[-1].settings["bad"])) if parts else (0, [])
        total = len(self.images)
        if start:
            log.info("%s: %s of %s images are packed already", self.folder.name, f"{start:,}", f"{total:,}")
        with closing(self.encode(range(start, total))) as stream:
            while start < total:
                shard = Shard(len(parts), start, bad)
                path = shard_path(self.folder, shard.number)
                write_atomically(path, partial(self.fill, shard=shard, stream=stream))
                if not shard.rows:
                    path.unlink()  # all remaining images of the split were bad
                    break
                parts.append(shard.pack(self.images.class_names, self.images.num_classes, self.settings))
                parts[-1].save(self.part_path(shard.number))
                start = shard.next
        return self.finish(parts, bad)

    def fill(self, file: io.BufferedIOBase, shard: Shard, stream: Iterator[EncodedImage]) -> None:
        """Writes images from `stream` to `file` until the shard has SHARD_BYTES."""
        for content, label, reason in stream:
            i, shard.next = shard.next, shard.next + 1
            if content is None:
                self.count_bad(reason, shard.bad)
                continue
            file.write(content)
            shard.rows.append((shard.bytes, len(content), zlib.crc32(content), label))
            shard.names.append(self.names(i))
            shard.bytes += len(content)
            self.progress(shard.next, len(content))
            if shard.bytes >= SHARD_BYTES:
                return

    def count_bad(self, reason: str, bad: list[str]) -> None:
        bad.append(reason)
        if len(bad) > self.max_bad:
            raise UserError(
                f"{reason}. That is bad image {len(bad)}, and --max-bad-images allows {self.max_bad}. Repair or remove "
                f"it, or leave such images out: --max-bad-images {max(10, 2 * self.max_bad)}"
            )
        log.warning("bad image left out: %s", reason)

    def part_path(self, number: int) -> Path:
        """The index of one shard, which is kept until all shards are complete."""
        return self.folder / f"{number:05d}.npz"

    def finished_parts(self) -> list[Pack]:
        """The shards that an earlier attempt completed. Removes its unfinished files."""
        for unfinished in self.folder.glob(f".*{TEMPORARY}"):
            unfinished.unlink()
        parts: list[Pack] = []
        while self.part_path(len(parts)).is_file():
            path = self.part_path(len(parts))
            parts.append(Pack.load(path))
            if not isinstance(parts[-1].settings.get("next"), int) or not isinstance(
                parts[-1].settings.get("bad"), list
            ):
                raise UserError(f"{path} is damaged: it does not say where to continue. Remove {self.folder}.")
            saved = {key: value for key, value in parts[-1].settings.items() if key not in ("next", "bad")}
            if saved != self.settings:
                changed = [key for key in self.settings if saved.get(key) != self.settings[key]]
                raise UserError(
                    f"{self.folder} was begun with another {' and '.join(changed)}: "
                    f"{', '.join(f'{key} {saved.get(key)}, now {self.settings[key]}' for key in changed)}. Give the "
                    "same as before or another folder, or remove this one."
                )
        return parts

    def finish(self, parts: list[Pack], bad: list[str]) -> Pack:
        """Joins the indices of the shards into the index of the split."""
        if not parts:
            raise UserError(f"{self.folder.name}: none of its images can be decoded. There is nothing to pack.")
        indices = [part.index for part in parts]
        names = Strings.pack(index.paths[i] for index in indices for i in range(len(index)))
        columns = {name: np.concatenate([index.columns[name] for index in indices]) for name in indices[0].columns}
        labels = np.concatenate([index.labels for index in indices])
        index = Index(names, labels, indices[0].class_names, columns)
        pack = Pack(index, parts[0].num_classes, self.settings | {"bad": bad})
        pack.save(self.folder / INDEX)
        for number in range(len(parts)):
            self.part_path(number).unlink()
        return pack


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Makes `folder` and locks it against other packing processes. Raises UserError when another one has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(fcntl.flock, lock, folder, "two processes that pack into it would not notice each other"):
            raise UserError(f"{folder}: another process is packing into it. Wait for it, or give another folder.")
        yield
    finally:
        os.close(lock)
