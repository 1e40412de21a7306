"""Damaged checkpoints: truncated, with flipped bits, overwritten, empty or missing. Which one does a run continue from?

A real run writes `last.pth`, `best.pth` and three numbered checkpoints. Each case damages some of them in a copy of the
folder and asks for the newest. The answer must be the newest intact checkpoint, bitwise equal to what was saved, with a
warning about `last.pth`; or an error that names the folder if none is intact. One case in 25 starts main.py in the
folder, which must end with the same weights as an undisturbed run.
"""

import io
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests._forked import forked
from tests._report import Report
from tests._tiny import run_main, write_images, write_recipe
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError

RESUME_EVERY = 25  # one case in 25 is resumed by main.py
TIMEOUT_SECONDS = 300.0  # for a run of a few seconds, on a busy machine


def run(count: int, seed: int) -> Report:
    """Checks `count` damaged folders."""
    report = Report("damaged checkpoints", seed)
    logging.getLogger().addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        args = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        outcome = forked(lambda: run_main(args), TIMEOUT_SECONDS)
        if outcome.code != 0:
            raise RuntimeError(outcome.output)
        run_folder = root / "logs" / "tiny" / "default"
        final = read_checkpoint(str(run_folder / "checkpoints" / "last.pth"))
        for case in range(count):
            rng = random.Random(f"{seed}/{case}")
            shutil.rmtree(root / "copy", ignore_errors=True)
            copy = root / "copy" / "tiny" / "default"
            shutil.copytree(run_folder, copy)
            _link_newest_to_last(copy / "checkpoints")
            kind, problem = _damage_and_check(copy / "checkpoints", rng)
            if not problem and case % RESUME_EVERY == 0:
                problem = _resume(copy, [*args[:-1], root / "copy"], final)
            report.add(kind, not problem, f"case {case}: {problem}")
    return report


def _link_newest_to_last(folder: Path) -> None:
    """Makes the newest numbered checkpoint a hard link to `last.pth`, as a run does: both are damaged together."""
    newest = CheckpointFolder(folder, keep=0).numbered()[0]
    newest.unlink()
    os.link(folder / "last.pth", newest)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def truncate_to_blocks(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) // 512) * 512]


def flip_one_bit(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, 0, len(data), 1)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, 0, len(data), rng.randrange(2, 64))


def flip_in_directory(data: bytes, rng: random.Random) -> bytes:
    """Flips bits in and after the zip's central directory, which has no checksum."""
    return _flip(data, rng, data.index(b"PK\x01\x02"), len(data), rng.randrange(1, 4))


def flip_in_pickle(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, 0, min(len(data), 4000), rng.randrange(1, 4))


def zero_a_block(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data) // 512) * 512, rng.choice((512, 4096))
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    a, b = (512 * place for place in sorted(rng.sample(range(len(data) // 512), 2)))
    return data[:a] + data[b : b + 512] + data[a + 512 : b] + data[a : a + 512] + data[b + 512 :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(data))


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 1000))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate, truncate_to_blocks, flip_one_bit, flip_bits, flip_in_directory, flip_in_pickle, zero_a_block, swap_blocks,
    overwrite, empty, grow,
)  # fmt: skip


def _flip(data: bytes, rng: random.Random, start: int, stop: int, bits: int) -> bytes:
    changed = bytearray(data)
    for _ in range(bits):
        changed[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _damage_and_check(folder: Path, rng: random.Random) -> tuple[str, str]:
    """Damages checkpoints in `folder`. Returns the kind of damage, and the problem with the answer or ""."""
    checkpoints = CheckpointFolder(folder, keep=3)
    newest_first = [checkpoints.last, *checkpoints.numbered()]
    original = {path: path.read_bytes() for path in (*newest_first, checkpoints.best)}
    # Mostly the newest alone, sometimes several, rarely all.
    number = rng.choices((1, 2, 3, 5), (10, 4, 2, 1))[0]
    victims = [checkpoints.last, *rng.sample([*newest_first[1:], checkpoints.best], number - 1)]
    missing = rng.random() < 0.1
    damage = rng.choice(DAMAGES)
    for victim in victims:
        if missing:
            victim.unlink()
        else:
            victim.write_bytes(damage(original[victim], rng))
    intact = [path for path, data in original.items() if path.exists() and path.read_bytes() == data]
    kind = f"{'missing' if missing else damage.__name__.replace('_', ' ')}, {'all' if not intact else len(victims)}"
    return kind, _find_problem(checkpoints, intact, original)


def _find_problem(checkpoints: CheckpointFolder, intact: list[Path], original: dict[Path, bytes]) -> str:
    output: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: output.append(record.getMessage())
    logger = logging.getLogger("utils.checkpoint.io")
    logger.addHandler(listener)
    propagated, logger.propagate = logger.propagate, False
    try:
        newest_checkpoint = checkpoints.newest()
    except UserError as error:
        return "" if not intact and str(checkpoints.folder) in str(error) else f"refused: {error}"
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagated
    if newest_checkpoint is None:
        gone = not any(path.exists() for path in original)
        return "" if gone else "no checkpoint was found"
    path, contents = newest_checkpoint
    if not same(contents, _read(original[path])):
        return f"{path.name} was loaded, but differs from what was saved"
    newest = max((_read(original[each])["state"]["images_seen"] for each in intact), default=0)
    if contents["state"]["images_seen"] < newest:
        return f"{path.name} was chosen, but others are newer"
    silent = path != checkpoints.last and not any(str(checkpoints.last) in line for line in output)
    return "no warning about last.pth" if silent else ""


def _read(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


def _resume(folder: Path, args: list, final: dict) -> str:
    """Starts the run in `folder` again, and returns the problem or ""."""
    nothing_left = not any(_is_readable(path) for path in (folder / "checkpoints").glob("*.pth"))
    some_left = any((folder / "checkpoints").glob("*.pth"))
    outcome = forked(lambda: run_main(args), TIMEOUT_SECONDS)
    if nothing_left and some_left:
        return (
            "" if outcome.code == 2 and "Traceback" not in outcome.output else f"code {outcome.code}: {outcome.output}"
        )
    if outcome.code != 0:
        return f"code {outcome.code}: {outcome.output}"
    newest_checkpoint = CheckpointFolder(folder / "checkpoints", keep=3).newest()
    if newest_checkpoint is None:
        return "it wrote no checkpoint"
    return (
        "" if same({**newest_checkpoint[1], "config": ""}, {**final, "config": ""}) else "it ended with other weights"
    )


def _is_readable(path: Path) -> bool:
    try:
        return bool(read_checkpoint(str(path)))
    except UserError:
        return False


def same(one: object, other: object) -> bool:
    """Returns whether two nested structures are bitwise equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
