"""Small generated images in the layouts that `data/` reads, and a configuration to read them with."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from yacs.config import CfgNode

from config import get_config
from utils.distributed.process_group import DistInfo


def draw(seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Image.Image:
    """A smooth image of `size` (width, height), different for each seed."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_folder(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Writes `root/<class>/<number>.jpg`, `counts[class]` of them."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.jpg").write_bytes(encode(draw(seed + 1000 * c + i)))


def write_splits(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    write_folder(root / "train", train)
    write_folder(root / "val", val, seed=500)
    return root


def write_zip(root: Path, split: str, names: list[str], labels: list[int], method: int = zipfile.ZIP_STORED) -> None:
    """Writes `root/<split>.zip` with an image for each name, and its map."""
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
        for i, name in enumerate(names):
            archive.writestr(name, encode(draw(i)))
    lines = [f"{name}\t{label}\n" for name, label in zip(names, labels, strict=True)]
    (root / f"{split}_map.txt").write_text("".join(lines))


def age(root: Path, seconds: float = 100) -> None:
    """Makes everything below `root` older by `seconds`, so that its index is cached."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in [*files, "."]:
            path = os.path.join(folder, name)
            time = os.stat(path).st_mtime - seconds
            os.utime(path, (time, time))


def data_config(root: Path, *opts: object) -> CfgNode:
    """The defaults with small images, no workers and the data's number of classes; then `opts` (KEY VALUE …)."""
    small = ["DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", 48, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 0]
    return get_config(None, [*small, "MODEL.NUM_CLASSES", 0, *opts])


# Evaluation requires weights; tests that only read data never open them.
EVALUATE = ("EVAL_MODE", True, "MODEL.RESUME", "unread.pth")


def process(rank: int = 0, world_size: int = 1) -> DistInfo:
    return DistInfo(rank, world_size, rank, world_size, torch.device("cpu"))
