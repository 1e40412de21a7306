"""Packed data by a stranger: arrays of another type or size in the index, shards and tiled JPEGs changed under right
checksums.

main.py trains on each for some steps and leaves bad images out by name, or names the index or shard and a way out.
"""

import json
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from data.codecs.tiled_jpeg import encode
from tests._report import Report
from tests._tiny import write_recipe
from tests.fuzz.oracle import find_problem, run_briefly
from tests.fuzz.sampling import sample_cases

IMAGES = 8
HEAD = ("format", "class_names", "num_classes", "settings")
Arrays = dict[str, np.ndarray]

# Each makes another array out of one of the index.
ARRAYS: dict[str, Callable[[np.ndarray, random.Random], np.ndarray]] = {
    "0-d": lambda values, rng: np.array(values[0]),
    "2-d": lambda values, rng: values[:, None],
    "empty": lambda values, rng: values[:0],
    "one less": lambda values, rng: values[:-1],
    "one more": lambda values, rng: np.append(values, values[:1]),
    "NaN": lambda values, rng: np.full(len(values), np.nan),
    "infinite": lambda values, rng: np.full(len(values), np.inf),
    "text": lambda values, rng: values.astype("U20"),
    "bytes": lambda values, rng: values.astype("S20"),
    "dates": lambda values, rng: values.astype("M8[s]"),
    "truth values": lambda values, rng: values.astype(bool),
    "complex": lambda values, rng: values.astype(complex),
    "records": lambda values, rng: np.zeros(len(values), [("a", "i4")]),
    "other byte order": lambda values, rng: values.astype(">i8"),
    "unsigned": lambda values, rng: values.astype(np.uint64) + np.uint64(2**63),
    "negative": lambda values, rng: values.astype(np.int64) * -1 - 1,
    "one negative": lambda values, rng: _with_one(values, -rng.choice((1, 2, 2**31)), rng),
    "one too high": lambda values, rng: _with_one(values, rng.choice((2, 7, 255, 2**31 - 1, 2**31, 2**40)), rng),
    "one of the highest": lambda values, rng: _with_one(values, rng.choice((2**62, 2**63 - 1)), rng),
    "reversed": lambda values, rng: values[::-1].copy(),
    "zeros": lambda values, rng: np.zeros_like(values),
}

HEADS: list[object] = [
    None, True, 0, -1, 1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "2", [], [1, 2], ["a"], {},
    ["blue", "blue"], ["blue", None], ["x" * 100_000, "\x1b[31m"], [[]], {"size": [[]]}, {"bad": 5},
]  # fmt: skip


def _with_one(values: np.ndarray, number: int, rng: random.Random) -> np.ndarray:
    values = values.astype(np.int64)
    values[rng.randrange(len(values))] = number
    return values


def _change_tiles(jpeg: bytes, rng: random.Random) -> bytes:
    """Changes numbers of the table, the header of the JPEG, or any bytes, or cuts it off."""
    changed = bytearray(jpeg)
    kind = rng.randrange(5)
    if kind < 2:  # length, width, height, blocks, offsets, lengths of the tiles
        at = rng.choice((4, 15, 17, 19, 21, 23, 25, 27, 29))
        struct.pack_into(">H", changed, at, rng.choice((0, 1, 15, 16, 17, 31, 999, 0x7FFF, 0xFFFF)))
    elif kind == 2:  # the frame: height, width, components, sampling
        frame = jpeg.index(b"\xff\xc0")
        changed[frame + rng.randrange(2, 19)] = rng.choice((0, 1, 2, 3, 4, 0x11, 0x22, 0xFF))
    elif kind == 3:
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(15, len(changed))] = rng.randrange(256)
    else:
        del changed[rng.randrange(15, len(changed)) :]
    return bytes(changed)


def _write_split(folder: Path, images: list[bytes], arrays: Arrays, head: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000.pack").write_bytes(b"".join(images))
    np.savez(folder / "index.npz", head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _valid(seed: int) -> tuple[list[bytes], dict[str, object]]:
    """The images of a split (tiled JPEGs) and the head of its index."""
    noise = np.random.RandomState(seed).randint(0, 256, (IMAGES, 36, 70, 3), np.uint8)
    images = [encode(Image.fromarray(values), 80) for values in noise]
    return images, {"format": 1, "class_names": ["blue", "green"], "num_classes": 2, "settings": {"size": 70}}


def _arrays(images: list[bytes]) -> Arrays:
    sizes = np.array([len(image) for image in images])
    names = [f"train/{i}.jpg".encode() for i in range(len(images))]
    return {
        "labels": np.arange(len(images), dtype=np.int32) % 2,
        "shard": np.zeros(len(images), np.int32),
        "offset": np.cumsum(sizes) - sizes,
        "size": sizes.astype(np.int32),
        "crc": np.array([zlib.crc32(image) for image in images], np.uint32),
        "blob": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([len(name) for name in names]),
    }


def _write_packed(root: Path, kind: str, name: str, change: object, rng: random.Random) -> None:
    """Writes sound packed data with one change in the training split."""
    images, head = _valid(1)
    _write_split(root / "val", images, _arrays(images), head)
    if kind == "tiles":
        images = [_change_tiles(image, rng) if rng.random() < 0.7 else image for image in images]
    arrays = _arrays(images)
    if kind == "head":
        head[name] = change
    if kind == "array":
        arrays[name] = ARRAYS[str(change)](arrays[name], rng)
    _write_split(root / "train", images, arrays, head)
    if kind == "file":
        path = root / "train" / name
        path.write_bytes(_change_file(path.read_bytes(), str(change), rng))


def _change_file(content: bytes, change: str, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if change == "cut":
        return content[: rng.randrange(len(content))]
    if change == "flip":
        for _ in range(rng.choice((1, 4, 40))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif change == "longer":
        changed += rng.randbytes(rng.choice((1, 100)))
    else:
        changed[:] = bytes(len(changed))
    return bytes(changed)


@st.composite
def packs(draw) -> tuple[str, str, object, int]:
    """Draws (kind, what is changed, how, a seed)."""
    kind = draw(st.sampled_from(["array", "array", "head", "tiles", "tiles", "file"]))
    name, change = "", None
    if kind == "array":
        name = draw(st.sampled_from(sorted(_arrays([b""]))))
        change = draw(st.sampled_from(sorted(ARRAYS)))
    elif kind == "head":
        name, change = draw(st.sampled_from(HEAD)), draw(st.sampled_from(HEADS))
    elif kind == "file":
        name = draw(st.sampled_from(["index.npz", "index.npz", "00000.pack"]))
        change = draw(st.sampled_from(["cut", "flip", "flip", "longer", "zeros"]))
    return kind, name, change, draw(st.integers(0, 2**32))


def run(count: int, seed: int) -> Report:
    report = Report("packs", seed)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        recipe = write_recipe(Path(scratch))
        for number, (kind, name, change, case_seed) in enumerate(sample_cases(packs(), count, seed)):
            folder = Path(scratch) / str(number)
            rng = random.Random(case_seed)
            _write_packed(folder / "data", kind, name, change, rng)
            args = ["--cfg", recipe, "--data-path", folder / "data", "--output", folder / "logs", "--opts"]
            args += ["DATA.DATASET", "packed", "DATA.MAX_BAD_IMAGES", rng.choice((0, 100))]
            args += ["DATA.BACKEND", rng.choice(("auto", "reference"))]
            problem = find_problem(run_briefly(args, folder), [folder / "data"])
            report.add(kind, not problem, f"case {number}, {kind} {name} {change!r:.60}, {case_seed}: {problem}")
        os.environ.pop("XDG_CACHE_HOME")
    return report
