"""The demo data: 1,797 handwritten digits, written as an image folder of JPEGs.

    python -m data.datasets.digits DIR

writes DIR/train/<digit>/*.jpg and DIR/val/<digit>/*.jpg once; a second call finds them and does nothing.

`digits.npz` holds the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI
Machine Learning Repository, https://doi.org/10.24432/C50P49), licensed CC BY 4.0, in the order in which scikit-learn
(BSD-3-Clause) redistributes it as `load_digits`: `images` (1797, 8, 8) uint8 in 0…16, `labels` (1797,) uint8.
"""

import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import replace_atomically
from utils.paths import expand_user

log = logging.getLogger(__name__)

DIGITS = Path(__file__).with_suffix(".npz")
SIZE = 32  # pixels; the scans have 8
VAL_FRACTION = 0.2


def write_demo(root: Path) -> None:
    """Writes the data to a temporary folder and renames it to `root`, unless `root` has them already.

    Raises:
        UserError: `root` contains something else, or cannot be written.
    """
    if all((root / split).is_dir() for split in ("train", "val")):
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"DATA.DATA_PATH: {root} contains something other than the demo data. Give a new folder.")
    with np.load(DIGITS, allow_pickle=False) as digits:
        images, labels = digits["images"], digits["labels"]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(root) as temporary:
            _write(images, labels, temporary)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"DATA.DATA_PATH: {root} cannot be written: {reason}. Give another folder.") from error
    log.info("wrote %d digits to %s", len(labels), root)


def val_indices(labels: np.ndarray) -> np.ndarray:
    """Sorted indices of the validation images: a fixed fifth of each digit's images in `labels` (n,)."""
    generator = np.random.RandomState(0)  # its numbers never change with numpy's version
    chosen = []
    for digit in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == digit))
        chosen.append(indices[: round(VAL_FRACTION * len(indices))])
    return np.sort(np.concatenate(chosen))


def _write(images: np.ndarray, labels: np.ndarray, root: Path) -> None:
    val = set(val_indices(labels).tolist())
    for i, (values, digit) in enumerate(zip(images, labels, strict=True)):
        folder = root / ("val" if i in val else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))
        grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=95)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(argv) != 1 or argv[0].startswith("-"):
        log.error("usage: python -m data.datasets.digits DIR")
        return UserError.exit_code
    try:
        write_demo(Path(expand_user(argv[0], "DIR")))
    except UserError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
