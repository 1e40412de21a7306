"""JPEGs for benchmarks of the data path: real ones from a zip, or synthetic; as an image folder and packed."""

import io
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

SYNTHETIC_IMAGES = 256  # at most, if no zip is given
CLASSES = 10


def load_jpegs(archive: Path | None, limit: int) -> tuple[list[bytes], str]:
    """Up to `limit` JPEGs, spread evenly over `archive`, or synthetic ones; and a sentence that describes them.

    Raises:
        UserError: `archive` is not a zip file, or has no JPEGs, or one that cannot be decoded.
    """
    if archive is None:
        images = [synthetic_jpeg(i) for i in range(min(limit, SYNTHETIC_IMAGES))]
        return images, f"{len(images)} synthetic JPEGs (none were given), {_mean_size(images)}."
    try:
        with zipfile.ZipFile(archive) as members:
            names = sorted(name for name in members.namelist() if name.lower().endswith((".jpeg", ".jpg")))
            names = names[:: max(1, len(names) // limit)][:limit]
            images = [members.read(name) for name in names]
        for name, image in zip(names, images, strict=True):
            decode(image, f"--images {archive}: {name}")
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted member
        raise UserError(f"--images {archive} cannot be read: {error}. Give a zip file of JPEGs.") from error
    except BadImage as error:
        raise UserError(f"{error}. Give a zip file of valid JPEGs.") from error
    if not images:
        raise UserError(f"--images {archive} has no JPEGs (names ending in .jpg or .jpeg). Give a zip file of JPEGs.")
    return images, f"{len(images)} JPEGs of {archive.name}, {_mean_size(images)}."


def synthetic_jpeg(seed: int) -> bytes:
    """A JPEG of 500 × 375 pixels with edges and noise, about as large as ImageNet's."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (12, 16, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    image = Image.fromarray(np.clip(smooth + random.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _mean_size(images: list[bytes]) -> str:
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    width, height = np.mean(sizes, axis=0)
    return f"on average {width:.0f} × {height:.0f} pixels and {np.mean([len(i) for i in images]) / 1e3:.0f} kB"


def write_folder(root: Path, images: list[bytes]) -> Path:
    """Writes `root/train/<class>/<number>.jpg`, and hard links to the same files in `root/val`. Returns `root`."""
    for i, image in enumerate(images):
        name = Path(f"class{i % CLASSES}", f"{i:06d}.jpg")
        for split in ("train", "val"):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(image)
        os.link(root / "train" / name, root / "val" / name)
    return root


def pack(root: Path, output: Path, size: int) -> Path:
    """Packs the image folder `root` with tools.pack_dataset and returns `output`. Raises UserError if that fails."""
    arguments = ["-m", "tools.pack_dataset", str(output), "--data-path", str(root), "--size", str(size)]
    result = subprocess.run([sys.executable, *arguments], cwd=REPO_ROOT, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"python {' '.join(arguments)} failed: {result.stderr.strip()[-1000:]}")
    return output
