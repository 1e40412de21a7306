"""Writing packed data (data/datasets/packed.py): images are made smaller and encoded in tiles, and shards are filled with them.

A shard appears under its name when it is complete, with an index of its own; the index of the split is written when all
shards are there. So packing that was interrupted goes on behind the last complete shard.
"""

import fcntl
import hashlib
import io
import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.codecs.pillow_decode import BadImage, decode
from data.codecs.tiled_jpeg import encode
from data.datasets.base import Images
from data.datasets.index import Index, Strings
from data.datasets.packed import INDEX, Pack, shard_path
from utils.errors import UserError
from utils.files import TEMPORARY, write_atomically

log = logging.getLogger(__name__)

LOSSLESS_UP_TO = 64  # longer side, pixels: images as small as that would suffer from JPEG, and gain nothing
SHARD_BYTES = 1 << 31


class EncodedImage(NamedTuple):
    """One image on its way: `content` is None where it is bad, and `reason` then says why."""

    content: bytes | None
    label: int
    reason: str = ""


@dataclass(frozen=True)
class ImageEncoder:
    """What becomes of each image of a split. `size` (longer side, pixels) None: it stays as it is."""

    images: Images
    size: int | None
    quality: int

    def __call__(self, i: int) -> EncodedImage:
        try:
            source, label = self.images.read(i)
            picture = decode(source, self.images.path(i))
        except BadImage as error:
            return EncodedImage(None, -1, str(error))
        if self.size is None:
            return EncodedImage(source if isinstance(source, bytes) else encode_png(picture), label)
        if max(picture.size) <= LOSSLESS_UP_TO:
            return EncodedImage(encode_png(picture), label)
        return EncodedImage(encode(downscale(picture, self.size), self.quality), label)


def encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def downscale(picture: Image.Image, size: int) -> Image.Image:
    """`picture` with a longer side of at most `size` pixels, at the same ratio of sides."""
    factor = size / max(picture.size)
    if factor >= 1:
        return picture
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def dataset_digest(images: Images) -> str:
    """What tells one data set from another: how many images, and a digest of their names and labels where listed."""
    index = getattr(images, "index", None)
    if index is None:
        return f"{len(images)} images"
    digest = hashlib.blake2b(index.paths.blob.tobytes() + index.labels.tobytes(), digest_size=8).hexdigest()
    return f"{len(images)} images, {digest}"


@dataclass
class Shard:
    """What has been written into a shard: a row for each image; `next` is the number of the image to go on with."""

    number: int
    next: int
    bad: list[str]
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # offset, size, CRC, label
    names: list[str] = field(default_factory=list)
    bytes: int = 0

    def pack(self, class_names: list[str] | None, num_classes: int, settings: dict[str, object]) -> Pack:
        offset, size, crc, label = np.array(self.rows, np.int64).reshape(-1, 4).T
        columns = {
            "shard": np.full(len(label), self.number, np.int32),
            "offset": offset,
            "size": size.astype(np.int32),
            "crc": crc.astype(np.uint32),
        }
        index = Index(Strings.pack(self.names), label.astype(np.int32), class_names, columns)
        return Pack(index, num_classes, settings | {"next": self.next, "bad": self.bad})


@dataclass
class ShardWriter:
    """Packs one split into `folder`, going on where an earlier attempt stopped.

    settings: all that decides what is packed; an attempt with others cannot be continued.
    names: what an image is called, by number.
    packed: images by numbers, in their order, as a `Packer` makes them.
    progress: is told how many images are done, and the bytes of the last one.
    """

    images: Images
    folder: Path
    settings: dict[str, object]
    names: Callable[[int], str]
    packed: Callable[[range], Generator[EncodedImage, None, None]]
    progress: Callable[[int, int], None]
    max_bad: int

    def run(self) -> Pack:
        parts = self.finished_parts()
        at, bad = (parts[-1].settings["next"], list(parts[-1].settings["bad"])) if parts else (0, [])
        total = len(self.images)
        if at:
            log.info("%s: %s of %s images are packed already", self.folder.name, f"{at:,}", f"{total:,}")
        with closing(self.packed(range(at, total))) as stream:
            while at < total:
                shard = Shard(len(parts), at, bad)
                path = shard_path(self.folder, shard.number)
                write_atomically(path, lambda file, shard=shard: self.fill(file, shard, stream))
                if not shard.rows:
                    path.unlink()  # all that was left of the split was bad
                    break
                parts.append(shard.pack(self.images.class_names, self.images.num_classes, self.settings))
                parts[-1].save(self.part_path(shard.number))
                at = shard.next
        return self.finish(parts, bad)

    def fill(self, file: io.BufferedIOBase, shard: Shard, stream: Iterator[EncodedImage]) -> None:
        """Writes images from `stream` into `file` until it is as large as a shard."""
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
                f"{reason}. That is bad image {len(bad)}, and --max-bad-images allows {self.max_bad}. Mend or remove "
                f"it, or leave such images out: --max-bad-images {max(10, 2 * self.max_bad)}"
            )
        log.warning("bad image left out: %s", reason)

    def part_path(self, number: int) -> Path:
        """The index of one shard, until all are done."""
        return self.folder / f"{number:05d}.npz"

    def finished_parts(self) -> list[Pack]:
        """The shards that an earlier attempt has finished. What it left unfinished is removed."""
        for left_over in self.folder.glob(f".*{TEMPORARY}"):
            left_over.unlink()
        parts = []
        while self.part_path(len(parts)).is_file():
            parts.append(Pack.load(self.part_path(len(parts))))
            before = {key: value for key, value in parts[-1].settings.items() if key not in ("next", "bad")}
            if before != self.settings:
                changed = [key for key in self.settings if before.get(key) != self.settings[key]]
                raise UserError(
                    f"{self.folder} was begun with another {' and '.join(changed)}: "
                    f"{', '.join(f'{key} {before.get(key)}, now {self.settings[key]}' for key in changed)}. Give the "
                    "same as then, another folder, or remove this one."
                )
        return parts

    def finish(self, parts: list[Pack], bad: list[str]) -> Pack:
        """Joins the indices of the shards."""
        if not parts:
            raise UserError(f"{self.folder.name}: not one of its images can be decoded. There is nothing to pack.")
        indices = [part.index for part in parts]
        names = Strings.pack(index.paths[i] for index in indices for i in range(len(index)))
        columns = {name: np.concatenate([index.columns[name] for index in indices]) for name in indices[0].columns}
        labels = np.concatenate([index.labels for index in indices])
        index = Index(names, labels, indices[0].class_names, columns)
        whole = Pack(index, parts[0].num_classes, self.settings | {"bad": bad})
        whole.save(self.folder / INDEX)
        for number in range(len(parts)):
            self.part_path(number).unlink()
        return whole


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes from packing into it. Raises UserError when one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process is packing into it. Wait for it, or give another folder.") from None
    finally:
        os.close(lock)
