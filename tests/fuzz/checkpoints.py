"""Hostile checkpoints: pickles that run code, files with valid checksums and invalid contents, broken safetensors.

main.py gets each of them to evaluate, to fine-tune, to resume, or as the newest in a run's folder. No code in the file
may run, and the file must be loaded or refused by name.
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
from tests.fuzz.oracle import find_problem, run_briefly
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
    """Tests `count` files: first a pickle of each family that can run code, then sampled ones."""
    report = Report("checkpoints", seed)
    all_cases = [(family, USES[number % len(USES)], seed + number) for number, family in enumerate(FAMILIES)]
    random.Random(seed).shuffle(all_cases)
    all_cases = [*all_cases[:count], *sample_cases(cases(), max(1, count - len(all_cases)), seed)][:count]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        args = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        short = ["--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0"]
        outcome = forked(lambda: run_main([*args, *short]))
        canary = forked(lambda: _in_folder(root, check_they_run))
        if outcome.code != 0 or canary.code != 0:
            raise RuntimeError(outcome.output + canary.output)
        run_folder = root / "logs" / "tiny" / "default"
        valid = (run_folder / "checkpoints" / "last.pth").read_bytes()
        register_extension()
        for number, (family, use, case_seed) in enumerate(all_cases):
            rng = random.Random(case_seed)
            case, data, name = _pickle(family, rng) if family in FAMILIES else MAKERS[family](valid, rng)
            family = "pickles" if family in FAMILIES else family
            folder = root / str(number)
            folder.mkdir()
            outcome, file = _run_with_file(use, folder, run_folder, name, data, args, short)
            problem = find_problem(outcome, [file, file.parent])
            if (folder / "executed").exists():
                problem = "executed"
            elif family == "pickles" and outcome.code != 2:
                problem = problem or f"it was accepted: code {outcome.code}"
            report.add(f"{family}, code {outcome.code}", not problem, f"case {number}, {case}, {use}: {problem}")
            shutil.rmtree(folder)
    return report


def _in_folder(folder: Path, call: Callable[[], None]) -> None:
    os.chdir(folder)
    call()


def _run_with_file(use: str, folder: Path, run_folder: Path, name: str, data: bytes, args: list, short: list):
    """Starts main.py with the file `data` as `use` says. Returns the outcome and the file."""
    args = [*args[:-1], folder]
    if use == "folder":
        copy = folder / "tiny" / "default"
        shutil.copytree(run_folder, copy)
        file = copy / "checkpoints" / "last.pth"
        for other in file.parent.glob("*.pth"):
            other.unlink()
        file.write_bytes(data)
        return run_briefly([*args, *short], folder), file
    file = folder / name
    file.write_bytes(data)
    return run_briefly([*args, *use.split(), file, *short], folder), file


# ---------------------------------------------------------------- contents of the files


def _pickles(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    return _pickle(rng.choice(sorted(FAMILIES)), rng)


def _pickle(family: str, rng: random.Random) -> tuple[str, bytes, str]:
    wrapping = rng.choice(sorted(WRAPPINGS))
    return f"{family} in {wrapping}", WRAPPINGS[wrapping](FAMILIES[family]), "evil.pth"


def _lies(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    lie, wrapping = rng.choice(sorted(LIES)), rng.choice(sorted(WRAPPINGS))
    return f"{lie} in {wrapping}", WRAPPINGS[wrapping](LIES[lie]), "lies.pth"


def _records(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    """Changes the records of a valid file and packs them again, so that all checksums are right."""
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        records = {info.filename: bytearray(archive.read(info)) for info in archive.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    case = rng.choice(
        ["pickle", "pickle", "pickle", "missing", "empty", "byteorder", "version", "packed", "twice", "climbs"]
    )
    compression, extra = zipfile.ZIP_STORED, []
    if case == "pickle":
        for _ in range(rng.choice((1, 2, 5))):
            place = rng.randrange(len(records[pickled]))
            change = rng.choice(("flip", "any", "cut", "opcode"))
            if change == "flip":
                records[pickled][place] ^= 1 << rng.randrange(8)
            elif change == "any":
                records[pickled][place] = rng.randrange(256)
            elif change == "opcode":
                records[pickled][place] = rng.choice(b"RbcoiQPtsau.2}])(NK\x81\x82\x92\x93")
            else:
                del records[pickled][place : place + rng.randrange(1, 30)]
    elif case == "missing":
        del records[rng.choice(sorted(records))]
    elif case == "empty":
        records[rng.choice(sorted(records))] = bytearray()
    elif case == "byteorder":
        for name in records:
            if name.endswith("byteorder"):
                records[name] = bytearray(rng.choice((b"big", b"", b"middle", b"\xff")))
    elif case == "version":
        for name in records:
            if name.endswith("version"):
                records[name] = bytearray(rng.choice((b"99\n", b"", b"x", b"-1", b"9" * 5000)))
    elif case == "packed":
        compression = zipfile.ZIP_DEFLATED
    elif case == "twice":
        extra = [(pickled, WRAPPINGS["bare"](FAMILIES["GLOBAL, REDUCE"]))]
    else:
        extra = [("../../executed", b"x"), ("/executed", b"x"), ("archive/../../executed", b"x")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in [*records.items(), *extra]:
            archive.writestr(name, bytes(content))
    return f"records: {case}", buffer.getvalue(), "records.pth"


def _entries(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    """Replaces entries anywhere in the nested structure by values of other types."""
    contents = torch.load(io.BytesIO(valid), weights_only=True)
    case = []
    for _ in range(rng.choice((1, 1, 2))):
        node, path = contents, []
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            path.append(str(key))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            if isinstance(node, dict) and rng.random() < 0.3:
                del node[key]
                case.append(f"{'.'.join(path)} missing")
            else:
                node[key] = rng.choice(ANOTHER)
                case.append(f"{'.'.join(path)} = {node[key]!r}")
            break
        if not contents:
            break
    if rng.random() < 0.1:
        contents["config"] = rng.choice(
            ("", "x", "a: [", "TRAIN: {EPOCHS: 9}", "!!python/name:os.system", "[" * 9999, "NEW: 1")
        )
        case.append("config")
    return "; ".join(case), _saved(contents), "entries.pth"


def _tensors(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    contents = torch.load(io.BytesIO(valid), weights_only=True)
    harm = rng.randrange(len(HOSTILE_TENSORS))
    moments = contents["optimizer"]["state"]
    place = rng.choice([contents["model"], contents["ema"], moments[rng.choice(list(moments))]])
    name = rng.choice(list(place))
    place[name] = HOSTILE_TENSORS[harm](place[name])
    return f"{name}: {harm}", _saved(contents), "tensors.pth"


def _saved(contents: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def _safetensors(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
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
    case = rng.choice([*headers, "length", "no JSON", "cut", "no text"])
    header = json.dumps(headers.get(case, good)).encode()
    if case == "deep":
        header = b"[" * 100_000
    elif case == "no JSON":
        header = b"{'a': os.system}"
    elif case == "no text":
        header = b'{"\xff\xfe": 1}'
    length = rng.choice((0, 1, 2**63, 2**64 - 1, 10**8 + 1, len(header) + 9)) if case == "length" else len(header)
    data = struct.pack("<Q", length) + header + (b"\xff" * 8 if case == "not finite" else bytes(8))
    return f"safetensors: {case}", data[: len(data) // 2] if case == "cut" else data, "weights.safetensors"


def _files(valid: bytes, rng: random.Random) -> tuple[str, bytes, str]:
    """Makes files that are no checkpoint, or part of one."""
    choices = {
        "cut": valid[: rng.randrange(len(valid))],
        "noise": rng.randbytes(2000),
        "empty": b"",
        "text": b"weights\n",
        "html": b"<html>rate limit exceeded</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "zip of nothing": b"PK\x05\x06" + bytes(18),
        "zeros": bytes(len(valid)),
        "script": b"#!/bin/sh\ntouch executed\n",
        "twice": valid * 2,
        "flipped": _flip(valid, rng),
        "prefixed": b"x" * 10 + valid,
        "tar": WRAPPINGS["tar"](b"x"),
    }
    case = rng.choice(sorted(choices))
    return f"files: {case}", choices[case], rng.choice(("file.pth", "file.safetensors", "file.bin", "file"))


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 10, 200))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
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
