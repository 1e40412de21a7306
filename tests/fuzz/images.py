"""Bad images: damaged, truncated, with a wrong size in the header, or of another format than their name says.

Each is decoded in a child of this process, and must become an RGB image or a `BadImage` that names it. main.py then
evaluates folders of 50 of them: each must be evaluated or skipped by name.
"""

import io
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import ExifTags, Image

from data.codecs.pillow_decode import BadImage, decode, upright
from tests._forked import forked
from tests._report import Report
from tests._tiny import run_main, write_images, write_recipe
from tests.fuzz.oracle import MEMORY, TIMEOUT, find_problem, run_briefly
from tests.fuzz.sampling import sample_cases

IN_ONE_FOLDER = 50
EXPANDED = 178_956_970  # pixels beyond which Pillow refuses


def _encoded() -> dict[str, bytes]:
    """Returns a small valid image in each supported format, and in some others."""
    values = np.random.RandomState(0).randint(0, 256, (40, 36, 3), np.uint8)
    rgb = Image.fromarray(values)
    grey16 = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    kinds = {
        "jpeg": (rgb, "JPEG", {}), "progressive": (rgb, "JPEG", {"progressive": True}),
        "cmyk": (rgb.convert("CMYK"), "JPEG", {}), "grey": (rgb.convert("L"), "JPEG", {}),
        "exif": (rgb, "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0"}),
        "turned": (rgb, "JPEG", {"exif": turned}), "turned png": (rgb, "PNG", {"exif": turned}),
        "avif": (rgb, "AVIF", {"exif": turned}), "jpeg 2000": (rgb, "JPEG2000", {}), "png": (rgb, "PNG", {}),
        "palette": (rgb.convert("P"), "PNG", {"transparency": 3}), "rgba": (rgb.convert("RGBA"), "PNG", {}),
        "grey16": (grey16, "PNG", {}), "one bit": (rgb.convert("1"), "PNG", {}), "bmp": (rgb, "BMP", {}),
        "ppm": (rgb, "PPM", {}), "tiff": (rgb, "TIFF", {}), "lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "deflated": (rgb, "TIFF", {"compression": "tiff_deflate"}), "float": (rgb.convert("F"), "TIFF", {}),
        "webp": (rgb, "WEBP", {}), "lossless": (rgb, "WEBP", {"lossless": True}), "gif": (rgb.convert("P"), "GIF", {}),
        "ico": (rgb, "ICO", {}), "pcx": (rgb, "PCX", {}), "eps": (rgb, "EPS", {}), "tga": (rgb, "TGA", {}),
    }  # fmt: skip
    encoded = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[name] = buffer.getvalue()
    encoded["svg"] = b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>"
    encoded["html"] = b"<html>404 not found</html>"
    encoded["script"] = b"#!/bin/sh\ntouch executed\n"
    encoded["postscript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch executed) (w) file\n"
    return encoded


VALID = _encoded()


@st.composite
def images(draw) -> tuple[str, bytes]:
    """Draws (a description of the change, the bytes)."""
    name = draw(st.sampled_from(sorted(VALID)))
    data = VALID[name]
    change = draw(
        st.sampled_from(["flip", "flip", "cut", "insert", "splice", "size", "zeros", "repeat", "tail", "noise"])
    )
    rng = random.Random(draw(st.integers(0, 2**32)))
    place = rng.randrange(len(data))
    if change == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 8, 64))):
            changed[rng.randrange(min(len(data), rng.choice((40, 400, len(data)))))] ^= 1 << rng.randrange(8)
        data = bytes(changed)
    elif change == "cut":
        data = data[:place]
    elif change == "insert":
        data = data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]
    elif change == "splice":
        other = VALID[rng.choice(sorted(VALID))]
        data = data[:place] + other[rng.randrange(len(other)) :]
    elif change == "size":  # sizes in the header
        changed = bytearray(data)
        start = rng.randrange(min(len(data), 200))
        number = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0", b"\xff\xff", b"\0\0"))
        changed[start : start + len(number)] = number
        data = bytes(changed)
    elif change == "zeros":
        data = data[:place] + bytes(len(data) - place)
    elif change == "repeat":
        data = data * rng.choice((2, 50))
    elif change == "tail":
        data = data + rng.randbytes(1000)
    else:
        data = data[: rng.randrange(20)] + rng.randbytes(len(data))
    return f"{name}: {change}", data


def run(count: int, seed: int) -> Report:
    report = Report("images", seed)
    cases = sample_cases(images(), count, seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        args = _train_model(root)
        for start in range(0, count, IN_ONE_FOLDER):
            _check(cases[start : start + IN_ONE_FOLDER], root, args, report)
    return report


def _check(cases: list[tuple[str, bytes]], root: Path, args: list, report: Report) -> None:
    decoded = forked(lambda: _decode_all(cases), TIMEOUT, MEMORY)
    problem = dict(re.findall(r"WRONG (\d+) (.*)", decoded.output))
    evaluated_problem = _evaluate_together(cases, root / f"data{report.count}", args)
    if decoded.code != 0 or decoded.executed or "Traceback" in decoded.output:
        evaluated_problem = f"decoding: {decoded.code} {decoded.output[-800:]} {decoded.executed}"
    for number, (change, data) in enumerate(cases):
        output = problem.get(str(number), "") or evaluated_problem
        report.add(change.split(": ")[1], not output, f"{change}, {data[:40]!r}…: {output}")


def _train_model(root: Path) -> list:
    args = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
    outcome = forked(lambda: run_main([*args, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]))
    if outcome.code != 0:
        raise RuntimeError(outcome.output)
    return [*args[:2], "--eval", "--pretrained", root / "logs" / "tiny" / "default" / "checkpoints" / "last.pth"]


def _decode_all(cases: list[tuple[str, bytes]]) -> int:
    torch.set_num_threads(1)
    for number, (_, data) in enumerate(cases):
        try:
            image = decode(data, "the/path")
            image = decode(upright(data, "the/path"), "the/path")
        except BadImage as error:
            if error.path != "the/path" or not error.reason:
                print(f"WRONG {number} no reason: {error}")
            continue
        if image.mode != "RGB" or image.width * image.height > EXPANDED:
            print(f"WRONG {number} {image.mode} {image.size}")
    return 0


def _evaluate_together(cases: list[tuple[str, bytes]], data: Path, args: list) -> str:
    """Runs main.py --eval on all of them: each must be evaluated or skipped by name."""
    for name in ("blue", "green"):
        (data / "val" / name).mkdir(parents=True)
    for number, (_, content) in enumerate(cases):
        (data / "val" / ("blue", "green")[number % 2] / f"{number:03d}.jpg").write_bytes(content)
    Image.new("RGB", (40, 36)).save(data / "val" / "green" / "sound.jpg")
    outcome = run_briefly([*args, "--data-path", data, "--opts", "DATA.MAX_BAD_IMAGES", "1000"], data)
    if problem := find_problem(outcome, [data], codes=(0,)):
        return problem
    evaluated = int(re.search(r"(\d+) images: top-1", outcome.output).group(1))
    left_out = set(re.findall(r"bad image left out: \S+/(\d{3})\.jpg: .", outcome.output))
    if (data / "executed").exists():
        return "executed"
    total = len(cases) + 1
    return "" if evaluated + len(left_out) == total else f"{evaluated} evaluated, {len(left_out)} left out of {total}"
