"""Bad data sets: image folders, zips with map files and ImageNet-22K's lists, each with unexpected contents.

main.py trains on each for some steps, or names the problem and its place. A secret file next to the data must not show
up in any message: paths that lead out of the data are not followed.
"""

import io
import json
import os
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests._report import Report
from tests._tiny import write_images, write_recipe
from tests.fuzz.oracle import find_problem, run_briefly
from tests.fuzz.sampling import sample_cases

SECRET = "the secret beside the data"


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), (30, 200, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()
Change = Callable[[Path, random.Random], None]


# ---------------------------------------------------------------- image folders


def _name(entry: bytes) -> Change:
    def add(root: Path, rng: random.Random) -> None:
        with open(os.path.join(os.fsencode(root / "train" / "blue"), entry), "wb") as file:
            file.write(JPEG)

    return add


def _class(entry: bytes, both: bool = True) -> Change:
    def add(root: Path, rng: random.Random) -> None:
        for split in ("train", "val") if both else ("train",):
            folder = os.path.join(os.fsencode(root / split), entry)
            os.mkdir(folder)
            with open(os.path.join(folder, b"a.jpg"), "wb") as file:
                file.write(JPEG)

    return add


def _link(place: str, target: str) -> Change:
    return lambda root, rng: (root / place).symlink_to(target)


def _cache(content: Callable[[random.Random], bytes]) -> Change:
    return lambda root, rng: (root / ".swin_index_train.npz").write_bytes(content(rng))


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _head(stamps: object, classes: object, version: int = 1) -> np.ndarray:
    head = {"format": version, "stamps": stamps, "class_names": classes}
    return np.frombuffer(json.dumps(head).encode(), np.uint8)


def _cache_of(rng: random.Random) -> bytes:
    """Returns an index cache that claims to be valid, but is not."""
    blob = np.frombuffer(b"blue/0.jpg../../secret.jpg", np.uint8)
    ends = np.array([10, 26], np.int64)
    labels = rng.choice((np.array([0, 1], np.int32), np.array([0, 9], np.int32), np.array([-5, 0], np.int32),
                           np.array([0.5, 1]), np.array([[0], [1]]), np.array(["a", "b"])))  # fmt: skip
    stamps = rng.choice(({}, {"../..": [1]}, 5, {"train": "x"}))
    return _npz(
        head=_head(stamps, rng.choice((["blue", "green"], None, 5, ["a"]))), labels=labels, blob=blob, ends=ends
    )


def _pickled_cache(rng: random.Random) -> bytes:
    class Runs:
        def __reduce__(self):
            return os.system, ("touch executed",)

    return _npz(head=np.array([Runs()], object), labels=np.array([Runs()], object))


def _deeper(split: Path) -> None:
    split.rename(split.parent / "moved")
    split.mkdir()
    (split.parent / "moved").rename(split / "images")


FOLDERS: dict[str, Change] = {
    "apple's hidden twin": _name(b"._0.jpg"),
    "hidden folder": _class(b".git", both=False),
    "newline": _name(b"a\nb.jpg"),
    "no text": _name(b"\xff\xfe.jpg"),
    "longest name": _name(b"x" * 251 + b".jpg"),
    "blank": _name(b" .jpg"),
    "class of no text": _class(b"\xff\xe9"),
    "class with newline": _class(b"a\nb"),
    "class named like an image": _class(b"a.jpg"),
    "class in train alone": _class(b"more", both=False),
    "class in train alone, of no text": _class(b"\xff\xe9", both=False),
    "class in train alone, with newline": _class(b"a\nb", both=False),
    "empty class in val": lambda root, rng: (root / "val" / "empty").mkdir(),
    "one level too deep": lambda root, rng: [_deeper(root / split) for split in ("train", "val")],
    "named by numbers": lambda root, rng: [_class(b"%d" % i)(root, rng) for i in range(rng.choice((3, 12)))],
    "no image": lambda root, rng: (root / "train" / "blue" / "notes.jpg").write_text("not an image"),
    "empty image": lambda root, rng: (root / "train" / "blue" / "0.jpg").write_bytes(b""),
    "empty class": lambda root, rng: (root / "train" / "empty").mkdir(),
    "no classes": lambda root, rng: (root / "train").rename(root / "gone") and (root / "train").mkdir(),
    "no val": lambda root, rng: (root / "val").rename(root / "validation"),
    "train is a file": lambda root, rng: (root / "train").rename(root / "t") and (root / "train").write_text("x"),
    "loop": _link("train/blue/loop", ".."),
    "loop to itself": _link("train/blue/self.jpg", "self.jpg"),
    "dangling": _link("train/blue/gone.jpg", "/nowhere/at/all.jpg"),
    "class is a dangling link": _link("train/dangling", "/nowhere"),
    "link to everything": _link("train/blue/root", "/proc/self"),
    "pipe": lambda root, rng: os.mkfifo(root / "train" / "blue" / "pipe.jpg"),
    "link to a device": _link("train/blue/zero.jpg", "/dev/zero"),
    "folder named like an image": lambda root, rng: (root / "train" / "blue" / "folder.jpg").mkdir(),
    "nested": lambda root, rng: (root / "train" / "blue" / "/".join("x" * 200)).mkdir(parents=True),
    "cache of noise": _cache(lambda rng: rng.randbytes(rng.choice((0, 3, 1000)))),
    "cache cut short": _cache(lambda rng: _cache_of(rng)[: rng.randrange(1500)]),
    "cache with a bit flipped": _cache(lambda rng: _flipped(_cache_of(rng), rng)),
    "cache that lies": _cache(_cache_of),
    "cache that runs something": _cache(_pickled_cache),
    "cache is a folder": lambda root, rng: (root / ".swin_index_train.npz").mkdir(),
    "read-only": lambda root, rng: [os.chmod(path, 0o555) for path in (root, root / "train", root / "val")],
}


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# ---------------------------------------------------------------- zips and their maps


def _write_zip(path: Path, members: list[tuple[str, bytes]], **kwargs) -> None:
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, content in members:
            archive.writestr(name, content)


PLAIN = [(f"{name}/{i}.jpg", JPEG) for name in ("blue", "green") for i in range(6)]
PLAIN_MAP = "".join(f"{name}\t{name.startswith('green'):d}\n" for name, _ in PLAIN)


def _members(*more: tuple[str, bytes], **kwargs) -> Change:
    return lambda root, rng: _write_zip(root / "train.zip", [*PLAIN, *more], **kwargs)


def _more(*names: str) -> Change:
    """Adds members of these names, which the map lists too."""

    def add(root: Path, rng: random.Random) -> None:
        _write_zip(root / "train.zip", [*PLAIN, *((name, JPEG) for name in names)])
        (root / "train_map.txt").write_text(PLAIN_MAP + "".join(f"{name}\t0\n" for name in names))

    return add


def _bytes_of(path: str, change: Callable[[bytes, random.Random], bytes]) -> Change:
    return lambda root, rng: (root / path).write_bytes(change((root / path).read_bytes(), rng))


def _flag(bit: int) -> Callable[[bytes, random.Random], bytes]:
    """Sets a flag of the first member in the central directory."""

    def change(data: bytes, rng: random.Random) -> bytes:
        place = data.index(b"PK\x01\x02") + 8
        return data[:place] + bytes([data[place] | bit]) + data[place + 1 :]

    return change


def _field(offset: int, size: int) -> Callable[[bytes, random.Random], bytes]:
    """Changes a field of a member's entry in the central directory."""

    def change(data: bytes, rng: random.Random) -> bytes:
        place = data.index(b"PK\x01\x02") + offset
        number = rng.choice((0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, rng.randrange(2 ** (8 * size))))
        return data[:place] + number.to_bytes(size, "little") + data[place + size :]

    return change


def _bomb(root: Path, rng: random.Random) -> None:
    """Adds 200 MB of zeros, compressed, half of the time with the size of a small image in the directory."""
    _write_zip(root / "train.zip", [("bomb.jpg", bytes(200 << 20)), *PLAIN], compression=zipfile.ZIP_DEFLATED)
    (root / "train_map.txt").write_text(PLAIN_MAP + "bomb.jpg\t0\n")
    if rng.random() < 0.5:
        data = bytearray((root / "train.zip").read_bytes())
        struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 5000)
        (root / "train.zip").write_bytes(data)


def _map(text: str | bytes) -> Change:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return lambda root, rng: (root / "train_map.txt").write_bytes(data)


ZIPS: dict[str, Change] = {
    "path that climbs out": _more("../../secret.jpg"),
    "absolute path": _more("/etc/secret.jpg"),
    "backslashes": _more("blue\\7.jpg"),
    "same name twice": _members(("blue/0.jpg", JPEG), ("blue/0.jpg", b"other")),
    "a folder as member": _more("blue/"),
    "encrypted": _bytes_of("train.zip", _flag(1)),
    "strong encryption": _bytes_of("train.zip", _flag(0x41)),
    "patched data": _bytes_of("train.zip", _flag(0x20)),
    "bzip2": _members(compression=zipfile.ZIP_BZIP2),
    "lzma": _members(compression=zipfile.ZIP_LZMA),
    "bomb": _bomb,
    "other method": _bytes_of("train.zip", _field(10, 2)),
    "other checksum": _bytes_of("train.zip", _field(16, 4)),
    "other packed size": _bytes_of("train.zip", _field(20, 4)),
    "other size": _bytes_of("train.zip", _field(24, 4)),
    "other name length": _bytes_of("train.zip", _field(28, 2)),
    "other extra length": _bytes_of("train.zip", _field(30, 2)),
    "other place": _bytes_of("train.zip", _field(42, 4)),
    "bits flipped": _bytes_of("train.zip", _flipped),
    "cut short": _bytes_of("train.zip", lambda data, rng: data[: rng.randrange(len(data))]),
    "prefixed": _bytes_of("train.zip", lambda data, rng: b"#!/bin/sh\n" + data),
    "no zip": _bytes_of("train.zip", lambda data, rng: rng.randbytes(500)),
    "empty zip": lambda root, rng: _write_zip(root / "train.zip", []),
    "zip is a folder": lambda root, rng: (root / "train.zip").unlink() or (root / "train.zip").mkdir(),
    "zip is missing": lambda root, rng: (root / "train.zip").unlink(),
    "map is missing": lambda root, rng: (root / "train_map.txt").unlink(),
    "map is a folder": lambda root, rng: (root / "train_map.txt").unlink() or (root / "train_map.txt").mkdir(),
    "map is empty": _map(""),
    "map of noise": lambda root, rng: (root / "train_map.txt").write_bytes(rng.randbytes(300)),
    "windows lines": _map(PLAIN_MAP.replace("\n", "\r\n")),
    "byte order mark": _map("\ufeff" + PLAIN_MAP),
    "utf-16": _map(PLAIN_MAP.encode("utf-16")),
    "no tab": _map(PLAIN_MAP.replace("\t", " ")),
    "two tabs": _map(PLAIN_MAP.replace("\t", "\t\t")),
    "negative label": _map(PLAIN_MAP + "blue/0.jpg\t-1\n"),
    "huge label": _map(PLAIN_MAP + "blue/0.jpg\t999999999\n"),
    "label beyond numbers": _map(PLAIN_MAP + f"blue/0.jpg\t{'9' * 5000}\n"),
    "gap": _map(PLAIN_MAP + "blue/0.jpg\t3\n"),
    "label is a word": _map(PLAIN_MAP + "blue/0.jpg\tblue\n"),
    "label is a fraction": _map(PLAIN_MAP + "blue/0.jpg\t0.5\n"),
    "other digits": _map(PLAIN_MAP + "blue/0.jpg\t٣\n"),
    "zero bytes": _map(PLAIN_MAP + "blue/\0.jpg\t0\n"),
    "no text in the map": _map(PLAIN_MAP + "blue/\udcff.jpg\t0\n"),
    "not in the zip": _map(PLAIN_MAP + "blue/none.jpg\t0\n"),
    "climbs out": _map(PLAIN_MAP + "../../secret.jpg\t0\n"),
    "long line": _map(PLAIN_MAP + "x" * 1_000_000 + "\t0\n"),
    "a list in JSON": _map(json.dumps([[name, 0] for name, _ in PLAIN])),
    "broken JSON": _map('[["blue/0.jpg", 0], '),
    "deep JSON": _map("[" * 100_000),
    "other JSON": _map('[["blue/0.jpg"], {"a": 1}, 5, null, ["blue/0.jpg", true], ["blue/0.jpg", 1e999]]'),
    "surrogates in JSON": _map('[["\\ud800.jpg", 0]]'),
    "other classes": _map(PLAIN_MAP + "green/0.jpg\t2\n"),
}


# ---------------------------------------------------------------- ImageNet-22K's lists


def _list(text: str) -> Change:
    return lambda root, rng: (root / "ILSVRC2011fall_whole_map_train.txt").write_text(text)


LISTS: dict[str, Change] = {
    "listed, climbs out": _list("../secret.jpg\t0\n"),
    "listed, absolute": _list("/etc/passwd\t0\n"),
    "listed, JSON that climbs out": _list('[["val/../../secret.jpg", 0]]'),
    "listed, label too high": _list("train/blue/0.jpg\t21841\n"),
    "listed, gone": _list("train/blue/gone.jpg\t5\n"),
    "listed, a folder": _list("train/blue\t5\n"),
    "listed, a zero byte": _list('[["train/\\u0000.jpg", 0]]'),
    "listed, a device": _list("zero.jpg\t5\n"),
}

ALL = [("folder", name) for name in FOLDERS] + [("zip", name) for name in ZIPS] + [("list", name) for name in LISTS]


@st.composite
def trees(draw) -> tuple[list[tuple[str, str]], bool, int]:
    """Draws (changes, whether bad images are tolerated, a seed). Some cases have two changes of one layout."""
    layout, name = draw(st.sampled_from(ALL))
    changes = [(layout, name)]
    if draw(st.integers(0, 3)) == 0:
        changes.append(draw(st.sampled_from([change for change in ALL if change[0] == layout and change[1] != name])))
    return changes, draw(st.booleans()), draw(st.integers(0, 2**32))


def run(count: int, seed: int) -> Report:
    """Tests `count` data sets: first each change alone, then sampled ones."""
    report = Report("data sets and map files", seed)
    alone = [([change], bool(seed + number & 1), seed + number) for number, change in enumerate(ALL)]
    random.Random(seed).shuffle(alone)
    cases = [*alone[:count], *sample_cases(trees(), max(1, count - len(alone)), seed)][:count]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        recipe = write_recipe(Path(scratch))
        for number, (changes, lenient, case_seed) in enumerate(cases):
            folder = Path(scratch) / str(number)
            description = f"{changes[0][0]}: {', '.join(name for _, name in changes)}"
            problem = _check_dataset(folder, recipe, changes, lenient, random.Random(case_seed))
            report.add(changes[0][0], not problem, f"case {number}, {description}: {problem}")
            for path in folder.rglob("*"):  # read-only folders could not be removed
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
        os.environ.pop("XDG_CACHE_HOME")
    return report


def _check_dataset(
    folder: Path, recipe: Path, changes: list[tuple[str, str]], lenient: bool, rng: random.Random
) -> str:
    root, layout = folder / "data", changes[0][0]
    _write_valid(root, layout)
    (folder / "secret.jpg").write_text(SECRET)
    for _, name in changes:
        try:
            {"folder": FOLDERS, "zip": ZIPS, "list": LISTS}[layout][name](root, rng)
        except (OSError, ValueError):
            continue  # the second change does not apply after the first
    args = ["--cfg", recipe, "--data-path", root, "--output", folder / "logs"]
    args += ["--zip", "--cache-mode", rng.choice(("no", "part", "full"))] if layout == "zip" else []
    args += ["--opts", "DATA.MAX_BAD_IMAGES", 100 * lenient]
    args += ["DATA.DATASET", "imagenet22K", "MODEL.NUM_CLASSES", 21841] if layout == "list" else []
    outcome = run_briefly(args, folder)
    if SECRET in outcome.output or (folder / "executed").exists():
        return f"it left the data folder: {outcome.output[-500:]}"
    return find_problem(outcome, [root])


def _write_valid(root: Path, layout: str) -> None:
    root.mkdir(parents=True)
    if layout == "zip":
        for split in ("train", "val"):
            _write_zip(root / f"{split}.zip", PLAIN)
            (root / f"{split}_map.txt").write_text(PLAIN_MAP)
        return
    write_images(root)
    if layout == "list":
        (root / "zero.jpg").symlink_to("/dev/zero")
        lines = "train/blue/0.jpg\t0\ntrain/green/0.jpg\t1\n"
        for split in ("train", "val"):
            (root / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(lines)
