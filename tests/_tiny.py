"""A run of main.py that takes a second: a small Swin on a few coloured images."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

RECIPE = """
DATA: {IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}
MODEL:
  NAME: tiny
  NUM_CLASSES: 0
  DROP_RATE: 0.1
  DROP_PATH_RATE: 0.1
  SWIN: {EMBED_DIM: 16, DEPTHS: [2, 2], NUM_HEADS: [1, 2], WINDOW_SIZE: 4}
TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 1, BASE_LR: 0.1, EMA_DECAY: 0.9}
AMP_ENABLE: False
PRINT_FREQ: 2
"""
COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30)}


def write_images(root: Path, train: int = 20, val: int = 8) -> Path:
    """Writes `train` and `val` images of two classes below `root`, and returns `root`."""
    for split, count in (("train", train // 2), ("val", val // 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + 5 * (i % 7)) for c in colour)
                Image.new("RGB", (40, 36), shade).save(root / split / name / f"{i}.jpg")
    return root


def write_recipe(folder: Path) -> Path:
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder / "tiny.yaml"


def run_main(argv: Sequence[str]) -> int:
    """Runs main.py with this command line in this process on the CPU, and restores logging afterwards."""
    import main

    logger, is_available = logging.getLogger(), torch.cuda.is_available
    handlers, level = list(logger.handlers), logger.level
    torch.cuda.is_available = lambda: False
    try:
        return main.main([str(word) for word in argv])
    finally:
        torch.cuda.is_available = is_available
        logger.handlers[:] = handlers
        logger.setLevel(level)
