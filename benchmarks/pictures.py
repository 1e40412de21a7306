"""JPEGs to measure the data path with: real ones from a zip, or made up, as an image folder and packed."""

import io
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.codecs.pillow_decode import BadImage, decode
from utils.errors import UserError
from utils.paths import REPO_ROOT

log = logging.getLogger(__name__)

MADE_UP = 256  # images, where no zip is given
CLASSES = 10


def load(archive: Path | None, limit: int) -> tuple[list[bytes], str]:
    """Up to `limit` JPEGs of `archive`, spread over it, or made-up ones; and a sentence that says what they are.

    Raises:
        UserError: no zip file, or no JPEGs that can be decoded in it.
    """
    if archive is None:
        images = [made_up(i) for i in range(min(limit, MADE_UP))]
        return images, f"{len(images)} made-up JPEGs (none were given), {_mean(images)}."
    try:
        with zipfile.ZipFile(archive) as members:
            names = sorted(name for name in members.namelist() if name.lower().endswith((".jpeg", ".jpg")))
            names = names[:: max(1, len(names) // limit)][:limit]
            images = [members.read(name) for name in names]
        for name, image in zip(names, images, strict=True):
            decode(image, f"--images {archive}: {name}")
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--images {archive} cannot be read: {error}. Give a zip file of JPEGs.") from error
    except BadImage as error:
        raise UserError(f"{error}. Give a zip file of sound JPEGs.") from error
    if not images:
        raise UserError(f"--images {archive} has no JPEGs (names ending in .jpg or .jpeg). Give a zip file of JPEGs.")
    return images, f"{len(images)} JPEGs of {archive.name}, {_mean(images)}."


def made_up(seed: int) -> bytes:
    """A JPEG of 500 × 375 pixels with edges and grain, about as large as ImageNet's."""
    draws = np.random.RandomState(seed)
    coarse = Image.fromarray(draws.randint(0, 256, (12, 16, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    picture = Image.fromarray(np.clip(smooth + draws.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _mean(images: list[bytes]) -> str:
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    width, height = np.mean(sizes, axis=0)
    return f"on average {width:.0f} × {height:.0f} pixels and {np.mean([len(i) for i in images]) / 1e3:.0f} kB"


def write_folder(root: Path, images: list[bytes]) -> Path:
    """`root/train/<class>/<number>.jpg` and the same again below `root/val`."""
    for split in ("train", "val"):
        for i, image in enumerate(images):
            path = root / split / f"class{i % CLASSES}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if split == "train":
                path.write_bytes(image)
            else:
                os.link(root / "train" / path.relative_to(root / split), path)
    return root


def pack(root: Path, output: Path, size: int) -> Path:
    """The images of the folder `root`, packed by the project's own tool. Raises UserError when that fails."""
    words = ["-m", "tools.pack_dataset", str(output), "--data-path", str(root), "--size", str(size)]
    done = subprocess.run([sys.executable, *words], cwd=REPO_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip()[-1000:]}")
    return output
