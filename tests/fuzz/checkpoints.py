"""Checkpoints: pickles that try to run something, files with sound checksums and unsound contents, hostile safetensors.

Each is given to main.py: to evaluate, to start from, to continue from, or as the newest of a run's folder. Whatever is
in it: nothing runs, and it is loaded or refused by name.
"""

import io
import json
import os
import random
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st

from tests._forked import forked
from tests._report import Report
from tests._tiny import run_main, write_images, write_recipe
from tests.fuzz.oracle import run_briefly, wrong_about
from tests.fuzz.pickles import FAMILIES, LIES, WRAPPINGS, check_they_run, register_extension
from tests.fuzz.sampling import sample_cases

USES = ("--eval --pretrained", "--eval --resume", "--pretrained", "--resume", "folder")
ANOTHER = (None, 0, -1, 2**70, float("nan"), float("inf"), "", "x", b"x", True, [], [1], {}, {"a": 1}, (), {1: {2: 3}})
HOSTILE_TENSORS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t * float("nan"),
    lambda t: t.new_zeros(()),
    lambda t: t.new_zeros((0,)),
    lambda t: t[None],
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.complex64),
    lambda t: t.bool(),
    lambda t: t.to(torch.float64),
    lambda t: t.to_sparse(),
    lambda t: t.flatten()[:1].expand(1 << 20, 1 << 20),
    lambda t: t.to("meta"),
    lambda t: t.flatten()[: t.numel() // 2],
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to(torch.float8_e4m3fn),
)


@st.composite
def cases(draw) -> tuple[str, str, int]:
    """(family, use, seed)."""
    family = draw(
        st.sampled_from(["pickles", "lies", "records", "entries", "entries", "tensors", "safetensors", "files"])
    )
    return family, draw(st.sampled_from(USES)), draw(st.integers(0, 2**32))


def run(count: int, seed: int) -> Report:
    """`count` files: a pickle of each family that can run something first, then drawn ones."""
    tally = Report("checkpoints", seed)
    all_cases = [(family, USES[number % len(USES)], seed + number) for number, family in enumerate(FAMILIES)]
    random.Random(seed).shuffle(all_cases)
    all_cases = [*all_cases[:count], *sample_cases(cases(), max(1, count - len(all_cases)), seed)][:count]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        words = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        short = ["--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0"]
        made = forked(lambda: run_main([*words, *short]))
        canary = forked(lambda: _in(root, check_they_run))
        if made.code != 0 or canary.code != 0:
            raise RuntimeError(made.said + canary.said)
        run_folder = root / "logs" / "tiny" / "default"
        sound = (run_folder / "checkpoints" / "last.pth").read_bytes()
        register_extension()
        for number, (family, use, case_seed) in enumerate(all_cases):
            draws = random.Random(case_seed)
            what, data, name = _pickle(family, draws) if family in FAMILIES else MAKERS[family](sound, draws)
            family = "pickles" if family in FAMILIES else family
            folder = root / str(number)
            folder.mkdir()
            outcome, file = _use(use, folder, run_folder, name, data, words, short)
            wrong = wrong_about(outcome, [file, file.parent])
            if (folder / "executed").exists():
                wrong = "executed"
            elif family == "pickles" and outcome.code != 2:
                wrong = wrong or f"it was taken: code {outcome.code}"
            tally.add(f"{family}, code {outcome.code}", not wrong, f"case {number}, {what}, {use}: {wrong}")
            shutil.rmtree(folder)
    return tally


def _in(folder: Path, call: Callable[[], None]) -> None:
    os.chdir(folder)
    call()


def _use(use: str, folder: Path, run_folder: Path, name: str, data: bytes, words: list, short: list):
    """Starts main.py with the file `data` as `use` says; returns the outcome and the file."""
    words = [*words[:-1], folder]
    if use == "folder":
        copy = folder / "tiny" / "default"
        shutil.copytree(run_folder, copy)
        file = copy / "checkpoints" / "last.pth"
        for other in file.parent.glob("*.pth"):
            other.unlink()
        file.write_bytes(data)
        return run_briefly([*words, *short], folder), file
    file = folder / name
    file.write_bytes(data)
    return run_briefly([*words, *use.split(), file, *short], folder), file


# ---------------------------------------------------------------- what is in the files


def _pickles(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    return _pickle(draws.choice(sorted(FAMILIES)), draws)


def _pickle(family: str, draws: random.Random) -> tuple[str, bytes, str]:
    wrapping = draws.choice(sorted(WRAPPINGS))
    return f"{family} in {wrapping}", WRAPPINGS[wrapping](FAMILIES[family]), "evil.pth"


def _lies(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    lie, wrapping = draws.choice(sorted(LIES)), draws.choice(sorted(WRAPPINGS))
    return f"{lie} in {wrapping}", WRAPPINGS[wrapping](LIES[lie]), "lies.pth"


def _records(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    """The records of a sound file changed, and packed again: every checksum is right."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        records = {info.filename: bytearray(archive.read(info)) for info in archive.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    what = draws.choice(
        ["pickle", "pickle", "pickle", "missing", "empty", "byteorder", "version", "packed", "twice", "climbs"]
    )
    compression, extra = zipfile.ZIP_STORED, []
    if what == "pickle":
        for _ in range(draws.choice((1, 2, 5))):
            place = draws.randrange(len(records[pickled]))
            change = draws.choice(("flip", "any", "cut", "opcode"))
            if change == "flip":
                records[pickled][place] ^= 1 << draws.randrange(8)
            elif change == "any":
                records[pickled][place] = draws.randrange(256)
            elif change == "opcode":
                records[pickled][place] = draws.choice(b"RbcoiQPtsau.2}])(NK\x81\x82\x92\x93")
            else:
                del records[pickled][place : place + draws.randrange(1, 30)]
    elif what == "missing":
        del records[draws.choice(sorted(records))]
    elif what == "empty":
        records[draws.choice(sorted(records))] = bytearray()
    elif what == "byteorder":
        for name in records:
            if name.endswith("byteorder"):
                records[name] = bytearray(draws.choice((b"big", b"", b"middle", b"\xff")))
    elif what == "version":
        for name in records:
            if name.endswith("version"):
                records[name] = bytearray(draws.choice((b"99\n", b"", b"x", b"-1", b"9" * 5000)))
    elif what == "packed":
        compression = zipfile.ZIP_DEFLATED
    elif what == "twice":
        extra = [(pickled, WRAPPINGS["bare"](FAMILIES["GLOBAL, REDUCE"]))]
    else:
        extra = [("../../executed", b"x"), ("/executed", b"x"), ("archive/../../executed", b"x")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in [*records.items(), *extra]:
            archive.writestr(name, bytes(content))
    return f"records: {what}", buffer.getvalue(), "records.pth"


def _entries(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    """Entries of another kind, anywhere in the tree."""
    contents = torch.load(io.BytesIO(sound), weights_only=True)
    what = []
    for _ in range(draws.choice((1, 1, 2))):
        node, path = contents, []
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draws.choice(keys)
            path.append(str(key))
            if isinstance(node[key], dict | list) and node[key] and draws.random() < 0.7:
                node = node[key]
                continue
            if isinstance(node, dict) and draws.random() < 0.3:
                del node[key]
                what.append(f"{'.'.join(path)} missing")
            else:
                node[key] = draws.choice(ANOTHER)
                what.append(f"{'.'.join(path)} = {node[key]!r}")
            break
        if not contents:
            break
    if draws.random() < 0.1:
        contents["config"] = draws.choice(
            ("", "x", "a: [", "TRAIN: {EPOCHS: 9}", "!!python/name:os.system", "[" * 9999, "NEW: 1")
        )
        what.append("config")
    return "; ".join(what), _saved(contents), "entries.pth"


def _tensors(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    contents = torch.load(io.BytesIO(sound), weights_only=True)
    harm = draws.randrange(len(HOSTILE_TENSORS))
    moments = contents["optimizer"]["state"]
    place = draws.choice([contents["model"], contents["ema"], moments[draws.choice(list(moments))]])
    name = draws.choice(list(place))
    place[name] = HOSTILE_TENSORS[harm](place[name])
    return f"{name}: {harm}", _saved(contents), "tensors.pth"


def _saved(contents: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def _safetensors(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    good = {"head.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    headers = {
        "shape too large": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
        "negative shape": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        "behind the end": {"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}},
        "overlap": good | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        "a hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        "backwards": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        "unknown type": {"a": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}},
        "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
        "a list": ["a"],
        "metadata": {"__metadata__": {"a": 5}} | good,
        "empty": {},
        "sound": good,
        "not finite": good,
        "deep": good,
    }
    what = draws.choice([*headers, "length", "no JSON", "cut", "no text"])
    header = json.dumps(headers.get(what, good)).encode()
    if what == "deep":
        header = b"[" * 100_000
    elif what == "no JSON":
        header = b"{'a': os.system}"
    elif what == "no text":
        header = b'{"\xff\xfe": 1}'
    length = draws.choice((0, 1, 2**63, 2**64 - 1, 10**8 + 1, len(header) + 9)) if what == "length" else len(header)
    data = struct.pack("<Q", length) + header + (b"\xff" * 8 if what == "not finite" else bytes(8))
    return f"safetensors: {what}", data[: len(data) // 2] if what == "cut" else data, "weights.safetensors"


def _files(sound: bytes, draws: random.Random) -> tuple[str, bytes, str]:
    """Not a checkpoint at all, or part of one."""
    choices = {
        "cut": sound[: draws.randrange(len(sound))],
        "noise": draws.randbytes(2000),
        "empty": b"",
        "text": b"weights\n",
        "html": b"<html>rate limit exceeded</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "zip of nothing": b"PK\x05\x06" + bytes(18),
        "zeros": bytes(len(sound)),
        "script": b"#!/bin/sh\ntouch executed\n",
        "twice": sound * 2,
        "flipped": _flip(sound, draws),
        "prefixed": b"x" * 10 + sound,
        "tar": WRAPPINGS["tar"](b"x"),
    }
    what = draws.choice(sorted(choices))
    return f"files: {what}", choices[what], draws.choice(("file.pth", "file.safetensors", "file.bin", "file"))


def _flip(data: bytes, draws: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draws.choice((1, 10, 200))):
        changed[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return bytes(changed)


MAKERS = {
    "pickles": _pickles,
    "lies": _lies,
    "records": _records,
    "entries": _entries,
    "tensors": _tensors,
    "safetensors": _safetensors,
    "files": _files,
}
