"""JPEGs of other encoders (libjpeg-turbo's cjpeg, mozjpeg, ffmpeg, ImageMagick) decode to Pillow's pixels, also when
mutated. An encoder that is not installed is skipped."""

import io
import random
import shutil
import subprocess
from collections.abc import Callable

import pytest
from PIL import Image

from tests.data.codecs.test_crop_decode import assert_equal_to_pillow, decoded_natively, mutated, needs_decoder, noisy

__all__ = ["decoded_natively"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_decoder, pytest.mark.filterwarnings("ignore")]

SIZES = [(100, 80), (33, 47), (129, 140), (8, 9), (200, 17)]
MUTATIONS = 150  # of each file


def _is_mozjpeg(program: str) -> bool:
    return "mozjpeg" in subprocess.run([program, "-version"], capture_output=True, text=True).stderr.lower()


def _find_cjpeg(mozjpeg: bool) -> str | None:
    names = ["cjpeg", "mozjpeg-cjpeg", "/opt/mozjpeg/bin/cjpeg"]
    return next((path for path in map(shutil.which, names) if path and _is_mozjpeg(path) == mozjpeg), None)


def _encode(command: list[str], image: Image.Image) -> bytes:
    """What `command` writes for `image`, given as PPM; empty if it does not support an option."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    done = subprocess.run(command, input=buffer.getvalue(), capture_output=True)
    return done.stdout if done.returncode == 0 and done.stdout.startswith(b"\xff\xd8") else b""


def _cjpeg(program: str) -> list[list[str]]:
    options = [
        f"-sample {sampling} -quality {quality}" for sampling in ("1x1", "2x1", "2x2") for quality in (30, 75, 97)
    ]
    options += ["-optimize", "-progressive", "-arithmetic", "-grayscale", "-baseline -quality 10", "-rgb"]
    options += ["-restart 1", "-restart 1B", "-restart 5B -sample 2x1", "-sample 1x2", "-sample 4x1", "-dct float"]
    return [[program, *option.split()] for option in options]


def _mozjpeg(program: str) -> list[list[str]]:
    options = ["-baseline", "-baseline -notrellis", "-baseline -quant-table 2", "-revert", "-tune-ssim -baseline"]
    return [*_cjpeg(program), *([program, *option.split()] for option in options)]


def _ffmpeg(program: str) -> list[list[str]]:
    options = [f"-pix_fmt {layout} -q:v {q}" for layout in ("yuvj420p", "yuvj422p", "yuvj444p") for q in (2, 12, 31)]
    options += ["-pix_fmt yuvj420p -huffman default", "-pix_fmt yuvj420p -huffman optimal", "-pix_fmt gray"]
    before = [program, "-v", "error", "-f", "ppm_pipe", "-i", "-", "-frames:v", "1", "-c:v", "mjpeg", "-strict", "-1"]
    return [[*before, *option.split(), "-f", "image2pipe", "-"] for option in options]


def _imagemagick(program: str) -> list[list[str]]:
    options = [f"-sampling-factor {sampling}" for sampling in ("4:4:4", "4:2:2", "4:2:0", "1x2", "4x1")]
    options += ["-quality 5", "-quality 100", "-interlace JPEG", "-colorspace Gray", "-colorspace CMYK", "-strip"]
    options += ["-define jpeg:optimize-coding=false", "-density 300 -comment words", "-orient RightTop"]
    return [[program, "ppm:-", *option.split(), "jpeg:-"] for option in options]


ENCODERS: dict[str, tuple[Callable[[], str | None], Callable[[str], list[list[str]]]]] = {
    "cjpeg": (lambda: _find_cjpeg(mozjpeg=False), _cjpeg),
    "mozjpeg": (lambda: _find_cjpeg(mozjpeg=True), _mozjpeg),
    "ffmpeg": (lambda: shutil.which("ffmpeg"), _ffmpeg),
    "ImageMagick": (lambda: shutil.which("magick") or shutil.which("convert"), _imagemagick),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_files_of_another_encoder(name: str, decoded_natively: dict[bool, int]):
    find, commands_of = ENCODERS[name]
    program = find()
    if program is None:
        pytest.skip(f"{name} is not installed")
    files = []
    for command in commands_of(program):
        files += [_encode(command, noisy(size, i)) for i, size in enumerate(SIZES)]
    files = [content for content in files if content]
    if not files:
        pytest.skip(f"{program} writes no JPEGs")
    for i, content in enumerate(files):
        for seed in range(20):
            assert_equal_to_pillow(content, 1000 * i + seed)
    assert decoded_natively[True] > 4 * len(files)  # of 20; progressive files and some others are left to Pillow
    for i, content in enumerate(files):
        for seed in range(MUTATIONS):
            assert_equal_to_pillow(mutated(content, random.Random(1000 * i + seed)), seed)
