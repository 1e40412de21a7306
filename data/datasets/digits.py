"""The demonstration data: scikit-learn's 1,797 handwritten digits as an image folder of JPEGs.

    python -m data.datasets.digits DIR

writes DIR/train/<digit>/*.jpg and DIR/val/<digit>/*.jpg once; a second call finds them and does nothing.
"""

import logging
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError

log = logging.getLogger(__name__)

SIZE = 32  # pixels; the scans have 8
VAL_SHARE = 0.2


def write_demo(root: Path) -> None:
    """Writes the data to `root`, aside first and then renamed as a whole, unless it is there already.

    Raises:
        UserError: scikit-learn is missing, `root` holds something else, or it cannot be written.
    """
    if all((root / split).is_dir() for split in ("train", "val")):
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"DATA.DATA_PATH: {root} holds something else than the demo data. Give a folder that is new.")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError("The demo data come from scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    aside = root.with_name(f"{root.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write(digits.images, digits.target, aside)
        os.replace(aside, root)
    except OSError as error:
        raise UserError(f"DATA.DATA_PATH: {root} cannot be written: {error}. Give another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("wrote %d digits to %s", len(digits.target), root)


def val_scans(target: np.ndarray) -> np.ndarray:
    """The numbers of the held-out scans, sorted: a fixed fifth of each digit's scans in `target` (n,)."""
    draw = np.random.RandomState(0)  # this generator's numbers never change with numpy's version
    chosen = []
    for digit in np.unique(target):
        scans = draw.permutation(np.flatnonzero(target == digit))
        chosen.append(scans[: round(VAL_SHARE * len(scans))])
    return np.sort(np.concatenate(chosen))


def _write(images: np.ndarray, target: np.ndarray, root: Path) -> None:
    held_out = set(val_scans(target).tolist())
    for number, (values, digit) in enumerate(zip(images, target, strict=True)):
        folder = root / ("val" if number in held_out else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))  # scans count 0…16
        large = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        large.save(folder / f"{number:04d}.jpg", quality=95)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(argv) != 1 or argv[0].startswith("-"):
        log.error("usage: python -m data.datasets.digits DIR")
        return UserError.exit_code
    try:
        write_demo(Path(argv[0]))
    except UserError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
