"""Packs a data set for fast training: images made smaller, as JPEGs in tiles, in a few large files.

    python -m tools.pack_dataset PACKED --data-path DIR                       an image folder, 500 pixels (about 67 GB)
    python -m tools.pack_dataset PACKED --data-path DIR --zip --size 400      the zip layout, 400 pixels (about 48 GB)
    python -m tools.pack_dataset PACKED --verify                              reads all and compares checksums

then train with --data-path PACKED --opts DATA.DATASET packed.

Training images whose longer side has more than --size pixels are made smaller, none is made larger, and all are encoded
anew as JPEGs of --quality, which loses a little once. Validation images stay as they are, byte for byte, so that
evaluation gives the same figures. Images of at most 64 pixels are stored without loss.

What is packed appears under its name when it is complete. Interrupted, the same command goes on at the last finished
file. An image that cannot be decoded stops the packing, or is left out while there are no more of them than
--max-bad-images.
"""

import argparse
import collections
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from config import get_config
from data.build import build_datasets
from data.codecs.pillow_decode import BadImage
from data.datasets.base import Images, dataset_digest
from data.datasets.pack_writer import ImageEncoder, ShardWriter, folder_lock
from data.datasets.packed import FORMAT, INDEX, open_packed
from utils.distributed.process_group import DistInfo
from utils.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 16  # images that a process handles at a time
SIZE = 500  # longer side of training images, pixels
QUALITY = 90  # of training images as JPEG
SECONDS_BETWEEN_LINES = 10.0
RANGES = {"size": (65, 2048), "quality": (50, 100), "workers": (1, 1024), "max-bad-images": (0, 10**9)}  # of flags

# Work for several processes ------------------------------------------------------------------------------------------

_work: Callable[[int], object] | None = None  # of a worker process


def _start(work: Callable[[int], object]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it, and ends its workers


def _chunk(numbers: range) -> list:
    return [_work(i) for i in numbers]


def in_order(work: Callable[[int], object], numbers: range, workers: int) -> Generator:
    """`work(i)` for each of `numbers`, in their order, by `workers` processes that run ahead a little.

    Raises:
        UserError: a process died.
    """
    chunks = iter([numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)])
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (work,))
    try:
        ahead: collections.deque[Future] = collections.deque()
        for chunk in chunks:
            ahead.append(pool.submit(_chunk, chunk))
            if len(ahead) > 3 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"One of the {workers} packing processes is gone, most often for want of memory. Give the same command "
            f"again with fewer: --workers {max(1, workers // 2)}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """Says every few seconds how far the packing of a split is, and when it will be done."""

    def __init__(self, split: str, total: int, folder: Path):
        self.split, self.total, self.folder = split, total, folder
        self.begun = self.said = time.monotonic()
        self.fresh = self.bytes = 0  # what this attempt has done
        self.warned = False

    def add(self, done: int, size: int) -> None:
        self.fresh += 1
        self.bytes += size
        if time.monotonic() - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = time.monotonic()
        rate = self.fresh / (self.said - self.begun)
        left = self.total - done
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left / rate))
        missing = self.bytes / self.fresh * left
        log.info(
            "%s: %s of %s images (%.1f %%), %.0f images/s, %.1f GB to come, done %s",
            self.split,
            f"{done:,}",
            f"{self.total:,}",
            100 * done / self.total,
            rate,
            missing / 1e9,
            end,
        )
        free = shutil.disk_usage(self.folder).free
        if missing > free and not self.warned:
            self.warned = True
            log.warning("%s has room for %.1f GB only: it will be full before the end", self.folder, free / 1e9)


# The command ---------------------------------------------------------------------------------------------------------


def pack(
    output: Path, data_path: str, dataset: str, zipped: bool, size: int, quality: int, workers: int, max_bad: int
) -> None:
    """Packs both splits of a data set into `output`.

    Raises:
        UserError: anything the user can mend: in the data, the folder, the disk or the flags.
    """
    opts = ["DATA.DATA_PATH", data_path, "DATA.DATASET", dataset, "DATA.ZIP_MODE", zipped, "DATA.CACHE_MODE", "no"]
    config = get_config(None, [*opts, "MODEL.NUM_CLASSES", 0])
    root = Path(data_path).expanduser()
    if output.resolve() == root.resolve():
        raise UserError(f"{output}: packed data cannot lie where they are made from. Give another folder.")
    data = build_datasets(config, DistInfo.single(torch.device("cpu")))
    for split, images in (("train", data.train), ("val", data.val)):
        folder = output / split
        if (folder / INDEX).exists():
            log.info("%s is complete already", folder)
            continue
        packer = ImageEncoder(images, size if split == "train" else None, quality)
        settings = {"format": FORMAT, "source": f"{dataset} {root.resolve()}", "contents": dataset_digest(images)}
        if split == "train":
            settings |= {"size": size, "quality": quality}
        names = lambda i, images=images: images.path(i).removeprefix(f"{root}/")  # noqa: E731
        try:
            with folder_lock(folder):
                progress = Progress(split, len(images), folder)
                packed = partial(in_order, packer, workers=workers)
                whole = ShardWriter(images, folder, settings, names, packed, progress.add, max_bad).run()
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}. What is finished is kept: make room or mend it, and give the "
                "same command again."
            ) from error
        total, count = int(whole.index.columns["size"].sum(dtype=np.int64)), len(whole.index)
        left_out = f", {len(whole.settings['bad'])} left out" if whole.settings["bad"] else ""
        log.info(
            "%s: %s images, %.3g GB, %.1f kB each%s", folder, f"{count:,}", total / 1e9, total / 1e3 / count, left_out
        )
    log.info("Train with: --data-path %s --opts DATA.DATASET packed", output)


def verify(output: Path, workers: int) -> None:
    """Reads every image of packed data. Raises UserError when one is damaged, and names the first few."""
    for split in ("train", "val"):
        images = open_packed(output, split)
        progress = Progress(split, len(images), output)
        bad = []
        for i, (size, reason) in enumerate(in_order(Check(images), range(len(images)), workers)):
            if reason:
                bad.append(reason)
            progress.add(i + 1, size)
        if bad:
            raise UserError(
                f"{len(bad)} of {len(images)} images of {output / split} are damaged: {'; '.join(bad[:5])}. Copy these "
                "files again, or pack the data again."
            )
        log.info("%s: all %s images are as they were packed", output / split, f"{len(images):,}")


@dataclass(frozen=True)
class Check:
    """Size in bytes of an image, and what is wrong with it."""

    images: Images

    def __call__(self, i: int) -> tuple[int, str]:
        try:
            return len(self.images.read(i)[0]), ""
        except BadImage as error:
            return 0, str(error)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}. `python -m tools.pack_dataset --help` lists all flags, with examples.")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.pack_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("output", metavar="PACKED", type=Path, help="folder to write")
    parser.add_argument("--data-path", metavar="DIR", help="folder of the data set to pack")
    parser.add_argument("--dataset", metavar="NAME", default="imagenet", help="its kind, as DATA.DATASET (imagenet)")
    parser.add_argument("--zip", dest="zipped", action="store_true", help="it is in the zip layout")
    parser.add_argument("--size", metavar="N", type=int, default=SIZE, help="longer side for training, pixels (500)")
    parser.add_argument("--quality", metavar="N", type=int, default=QUALITY, help="of JPEGs for training (90)")
    parser.add_argument("--workers", metavar="N", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--max-bad-images", metavar="N", type=int, default=0, help="to leave out before stopping (0)")
    parser.add_argument("--verify", action="store_true", help="read what is packed and compare checksums")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        args = build_parser().parse_args(argv)
        for flag, (low, high) in RANGES.items():
            value = getattr(args, flag.replace("-", "_"))
            if not low <= value <= high:
                raise UserError(f"--{flag} {value}: it must be {low} to {high}.")
        if args.verify:
            verify(args.output, args.workers)
        elif args.data_path:
            pack(
                args.output,
                args.data_path,
                args.dataset,
                args.zipped,
                args.size,
                args.quality,
                args.workers,
                args.max_bad_images,
            )
        else:
            raise UserError("--data-path DIR is missing: the folder of the data set to pack.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
