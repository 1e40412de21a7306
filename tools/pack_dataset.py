"""Packs an image dataset into a few large files for fast reading.

    python -m tools.pack_dataset PACKED --data-path DIR                       an image folder, 500 pixels (about 67 GB)
    python -m tools.pack_dataset PACKED --data-path DIR --zip --size 400      zip archives, 400 pixels (about 48 GB)
    python -m tools.pack_dataset PACKED --verify                              reads everything, compares checksums

Then train with --data-path PACKED --opts DATA.DATASET packed.

Training images whose longer side exceeds --size pixels are made smaller, and none is enlarged; all are encoded again as
JPEGs of --quality, with a small loss that occurs once. Validation images are copied byte for byte, so that evaluation
gives the same metrics. Images of at most 64 pixels are stored losslessly.

Files appear under their names only when they are complete. After an interruption the same command continues after the
last finished file. An image that cannot be decoded stops the packing; up to --max-bad-images of them are left out.
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
from data.datasets.packed import FORMAT, INDEX, PackedImages, open_packed
from utils.cli import CliParser, log_to_stdout, number, run_cli, user_path
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.orphans import end_with_parent
from utils.paths import expand_user

log = logging.getLogger(__name__)

CHUNK = 16  # images per task of a worker process
LOG_INTERVAL = 10.0  # seconds


@dataclass(frozen=True)
class PackOptions:
    """The dataset to pack and how.

    Attributes:
        dataset, zipped: as DATA.DATASET and DATA.ZIP_MODE.
        size: longer side of training images at most, in pixels.
        quality: of training images as JPEG.
        exif_orientation: as DATA.EXIF_ORIENTATION.
    """

    output: Path
    data_path: str
    dataset: str = "imagenet"
    zipped: bool = False
    size: int = 500
    quality: int = 90
    exif_orientation: bool = False
    workers: int = 1
    max_bad_images: int = 0


# Worker processes ----------------------------------------------------------------------------------------------------

_function: Callable[[int], object] | None = None  # set in each worker process


def _init_worker(function: Callable[[int], object]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it and stops its workers
    end_with_parent()


def _run_chunk(indices: range) -> list[object]:
    assert _function is not None
    return [_function(i) for i in indices]


def map_in_order(function: Callable[[int], object], indices: range, workers: int) -> Generator:
    """Yields `function(i)` for each of `indices` in order, computed a little ahead by `workers` processes.

    Raises:
        UserError: a process died.
    """
    chunks = iter([indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)])
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _init_worker, (function,))
    try:
        pending: collections.deque[Future] = collections.deque()
        for chunk in chunks:
            pending.append(pool.submit(_run_chunk, chunk))
            if len(pending) > 3 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"One of the {workers} packing processes died, most often from lack of memory. Run the same command with "
            f"fewer: --workers {max(1, workers // 2)}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class PackProgress:
    """Logs every few seconds how much of a split is done, and when the rest will be."""

    def __init__(self, split: str, total: int, folder: Path):
        self.split, self.total, self.folder = split, total, folder
        self.started = self.logged = time.monotonic()
        self.images = self.bytes = 0  # done since `started`
        self.warned = False

    def add(self, done: int, size: int) -> None:
        """Counts one image of `size` bytes; `done` is the number of images done, including those of earlier runs."""
        self.images += 1
        self.bytes += size
        if time.monotonic() - self.logged < LOG_INTERVAL:
            return
        self.logged = time.monotonic()
        rate = self.images / (self.logged - self.started)
        remaining = self.total - done
        remaining_bytes = self.bytes / self.images * remaining
        log.info(
            "%s: %s of %s images (%.1f %%), %.0f images/s, %.1f GB remaining, done %s",
            self.split,
            f"{done:,}",
            f"{self.total:,}",
            100 * done / self.total,
            rate,
            remaining_bytes / 1e9,
            time.strftime("%a %d %b %H:%M", time.localtime(time.time() + remaining / rate)),
        )
        free = shutil.disk_usage(self.folder).free
        if remaining_bytes > free and not self.warned:
            self.warned = True
            log.warning("%s has only %.1f GB free: it will be full before the end", self.folder, free / 1e9)


# The command ---------------------------------------------------------------------------------------------------------


def pack(options: PackOptions) -> None:
    """Packs both splits of a dataset.

    Raises:
        UserError: an error in the data, the folder, the disk or the flags.
    """
    root, output = Path(expand_user(options.data_path, "--data-path")), options.output
    if output.resolve() == root.resolve():
        raise UserError(f"{output}: packed data cannot be written into the folder they are made from. Give another.")
    opts = {
        "DATA.DATA_PATH": options.data_path,
        "DATA.DATASET": options.dataset,
        "DATA.ZIP_MODE": options.zipped,
        "DATA.CACHE_MODE": "no",
        "DATA.NUM_WORKERS": 0,  # --workers processes read the images
        "DATA.EXIF_ORIENTATION": options.exif_orientation,
        "MODEL.NUM_CLASSES": 0,
    }
    config = get_config(None, [word for item in opts.items() for word in item])
    data = build_datasets(config, DistInfo.single(torch.device("cpu")))
    for split, images in (("train", data.train_images), ("val", data.val)):
        if (output / split / INDEX).exists():
            log.info("%s is already complete", output / split)
        else:
            pack_split(options, split, images)
    log.info("Train with: --data-path %s --opts DATA.DATASET packed", output)


def pack_split(options: PackOptions, split: str, images: Images) -> None:
    """Packs one split, continuing an earlier run."""
    root, folder = Path(expand_user(options.data_path, "--data-path")), options.output / split
    settings = {
        "format": FORMAT,
        "source": f"{options.dataset} {root.resolve()}",
        "contents": dataset_digest(images),
    }
    if split == "train":
        settings |= {"size": options.size, "quality": options.quality}
    if options.exif_orientation:  # left out otherwise, as in data packed before there was this option
        settings |= {"exif_orientation": True}
    size = options.size if split == "train" else None
    encoder = ImageEncoder(images, size, options.quality, options.exif_orientation)
    try:
        with folder_lock(folder):
            packed = ShardWriter(
                images=images,
                folder=folder,
                settings=settings,
                names=lambda i: images.path(i).removeprefix(f"{root}/"),
                encode=partial(map_in_order, encoder, workers=options.workers),
                progress=PackProgress(split, len(images), folder).add,
                max_bad=options.max_bad_images,
            ).run()
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}. Finished files are kept: fix the cause, for example free disk "
            "space, and run the same command again."
        ) from error
    total, count = int(packed.index.columns["size"].sum(dtype=np.int64)), len(packed.index)
    bad = f", {len(packed.settings['bad'])} left out" if packed.settings["bad"] else ""
    log.info("%s: %s images, %.3g GB, %.1f kB each%s", folder, f"{count:,}", total / 1e9, total / 1e3 / count, bad)


def verify(output: Path, workers: int) -> None:
    """Reads every image of packed data. Raises UserError if one is damaged; names the first few."""
    for split in ("train", "val"):
        images = open_packed(output, split)
        progress = PackProgress(split, len(images), output)
        damaged = []
        for i, (size, problem) in enumerate(map_in_order(Check(images), range(len(images)), workers)):
            if problem:
                damaged.append(problem)
            progress.add(i + 1, size)
        if damaged:
            raise UserError(
                f"{len(damaged)} of {len(images)} images of {output / split} are damaged: {'; '.join(damaged[:5])}. "
                "Copy these files again, or pack the dataset again."
            )
        log.info("%s: all %s images match their checksums", output / split, f"{len(images):,}")


@dataclass(frozen=True)
class Check:
    """Reads an image. Returns its size in bytes, and what is wrong with it or ""."""

    images: PackedImages

    def __call__(self, i: int) -> tuple[int, str]:
        try:
            return len(self.images.read(i)[0]), ""
        except BadImage as error:
            return 0, str(error)


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m tools.pack_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default, cores = PackOptions(Path(), ""), len(os.sched_getaffinity(0))
    parser.add_argument("output", metavar="PACKED", type=user_path, help="folder to write")
    parser.add_argument("--data-path", metavar="DIR", help="folder of the dataset to pack")
    parser.add_argument("--dataset", metavar="NAME", default=default.dataset, help="as DATA.DATASET (imagenet)")
    parser.add_argument("--zip", dest="zipped", action="store_true", help="the dataset is in zip archives")
    parser.add_argument(
        "--size", metavar="N", type=number(int, 65, 2048), default=default.size,
        help="longer side of training images, pixels (500)",
    )  # fmt: skip
    parser.add_argument(
        "--quality", metavar="N", type=number(int, 50, 100), default=default.quality,
        help="JPEG quality of training images (90)",
    )  # fmt: skip
    parser.add_argument(
        "--exif-orientation", action="store_true", help="turn images as EXIF says, for DATA.EXIF_ORIENTATION True"
    )
    parser.add_argument(
        "--workers", metavar="N", type=number(int, 1, 1024), default=cores, help="processes (one per core)"
    )
    parser.add_argument(
        "--max-bad-images", metavar="N", type=number(int, 0, 10**9), default=0,
        help="bad images to leave out before stopping (0)",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read packed data and compare checksums")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code."""
    log_to_stdout()

    def program() -> int:
        options = vars(build_parser().parse_args(argv))
        if options.pop("verify"):
            verify(options["output"], options["workers"])
            return 0
        if not options["data_path"]:
            raise UserError("--data-path DIR is missing: the folder of the dataset to pack.")
        try:
            pack(PackOptions(**options))
        except KeyboardInterrupt:
            log.info("Finished files are kept, and the same command continues after them.")
            raise
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
