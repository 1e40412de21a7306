"""Checkpoints that are truncated, have flipped bits, are overwritten, empty or gone: what a run continues from.

A real run leaves `last.pth`, `best.pth` and three numbered checkpoints. Each case damages some of them in a copy of the
folder and asks for the newest: it must be the newest of the unharmed, equal to the bit to what was saved, and what is
wrong with `last.pth` must be said; and an error that names the folder where none is left. One case in 25 starts main.py
there, and must end with the weights of the run that was never harmed.
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
from utils.checkpoint.io import CheckpointFolder, read_checkpoint
from utils.errors import UserError

EVERY = 25  # cases for one that is continued by main.py
PATIENCE = 300.0  # seconds that a run of a few seconds may take on a machine that has other work


def run(count: int, seed: int) -> Report:
    """`count` damaged folders."""
    tally = Report("damaged checkpoints", seed)
    logging.getLogger().addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        words = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        made = forked(lambda: run_main(words), PATIENCE)
        if made.code != 0:
            raise RuntimeError(made.said)
        run_folder = root / "logs" / "tiny" / "default"
        final = read_checkpoint(str(run_folder / "checkpoints" / "last.pth"))
        for case in range(count):
            draws = random.Random(f"{seed}/{case}")
            shutil.rmtree(root / "copy", ignore_errors=True)
            copy = root / "copy" / "tiny" / "default"
            shutil.copytree(run_folder, copy)
            _as_two_names_of_one_file(copy / "checkpoints")
            what, wrong = _damage_and_look(copy / "checkpoints", draws)
            if not wrong and case % EVERY == 0:
                wrong = _continue(copy, [*words[:-1], root / "copy"], final)
            tally.add(what, not wrong, f"case {case}: {wrong}")
    return tally


def _as_two_names_of_one_file(folder: Path) -> None:
    """The newest numbered checkpoint is another name of `last.pth`, and damaged with it, as a run leaves them."""
    newest = CheckpointFolder(folder, keep=0).numbered()[0]
    newest.unlink()
    os.link(folder / "last.pth", newest)


def truncate(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data))]


def truncate_to_blocks(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data) // 512) * 512]


def flip_one_bit(data: bytes, draws: random.Random) -> bytes:
    return _flip(data, draws, 0, len(data), 1)


def flip_bits(data: bytes, draws: random.Random) -> bytes:
    return _flip(data, draws, 0, len(data), draws.randrange(2, 64))


def flip_in_directory(data: bytes, draws: random.Random) -> bytes:
    """In the zip's directory, which has no checksum of its own, and behind it."""
    return _flip(data, draws, data.index(b"PK\x01\x02"), len(data), draws.randrange(1, 4))


def flip_in_pickle(data: bytes, draws: random.Random) -> bytes:
    return _flip(data, draws, 0, min(len(data), 4000), draws.randrange(1, 4))


def zero_a_block(data: bytes, draws: random.Random) -> bytes:
    start, length = draws.randrange(len(data) // 512) * 512, draws.choice((512, 4096))
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def swap_blocks(data: bytes, draws: random.Random) -> bytes:
    a, b = (512 * place for place in sorted(draws.sample(range(len(data) // 512), 2)))
    return data[:a] + data[b : b + 512] + data[a + 512 : b] + data[a : a + 512] + data[b + 512 :]


def overwrite(data: bytes, draws: random.Random) -> bytes:
    return draws.randbytes(len(data))


def empty(data: bytes, draws: random.Random) -> bytes:
    return b""


def grow(data: bytes, draws: random.Random) -> bytes:
    return data + draws.randbytes(draws.randrange(1, 1000))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate, truncate_to_blocks, flip_one_bit, flip_bits, flip_in_directory, flip_in_pickle, zero_a_block, swap_blocks,
    overwrite, empty, grow,
)  # fmt: skip


def _flip(data: bytes, draws: random.Random, start: int, stop: int, bits: int) -> bytes:
    changed = bytearray(data)
    for _ in range(bits):
        changed[draws.randrange(start, stop)] ^= 1 << draws.randrange(8)
    return bytes(changed)


def _damage_and_look(folder: Path, draws: random.Random) -> tuple[str, str]:
    """What was done to the checkpoints in `folder`, and what was wrong about the answer ("" for nothing)."""
    checkpoints = CheckpointFolder(folder, keep=3)
    in_order = [checkpoints.last, *checkpoints.numbered()]
    unharmed = {path: path.read_bytes() for path in (*in_order, checkpoints.best)}
    # Most often the newest; sometimes several, rarely all.
    number = draws.choices((1, 2, 3, 5), (10, 4, 2, 1))[0]
    victims = [checkpoints.last, *draws.sample([*in_order[1:], checkpoints.best], number - 1)]
    missing = draws.random() < 0.1
    damage = draws.choice(DAMAGES)
    for victim in victims:
        if missing:
            victim.unlink()
        else:
            victim.write_bytes(damage(unharmed[victim], draws))
    good = [path for path, data in unharmed.items() if path.exists() and path.read_bytes() == data]
    what = f"{'missing' if missing else damage.__name__.replace('_', ' ')}, {'all' if not good else len(victims)}"
    return what, _wrong_about(checkpoints, good, unharmed)


def _wrong_about(checkpoints: CheckpointFolder, good: list[Path], unharmed: dict[Path, bytes]) -> str:
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("utils.checkpoint.io")
    logger.addHandler(listener)
    propagated, logger.propagate = logger.propagate, False
    try:
        found = checkpoints.newest()
    except UserError as error:
        return "" if not good and str(checkpoints.folder) in str(error) else f"refused: {error}"
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagated
    if found is None:
        gone = not any(path.exists() for path in unharmed)
        return "" if gone else "nothing was found"
    path, contents = found
    if not same(contents, _read(unharmed[path])):
        return f"{path.name} was loaded, and is not what was saved"
    newest = max((_read(unharmed[each])["state"]["images_seen"] for each in good), default=0)
    if contents["state"]["images_seen"] < newest:
        return f"{path.name} was chosen, though others are newer"
    silent = path != checkpoints.last and not any(str(checkpoints.last) in line for line in said)
    return "nothing was said about last.pth" if silent else ""


def _read(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


def _continue(folder: Path, words: list, final: dict) -> str:
    """Starts the run in `folder` again; what was wrong about it."""
    nothing_left = not any(_is_readable(path) for path in (folder / "checkpoints").glob("*.pth"))
    some_left = any((folder / "checkpoints").glob("*.pth"))
    outcome = forked(lambda: run_main(words), PATIENCE)
    if nothing_left and some_left:
        return "" if outcome.code == 2 and "Traceback" not in outcome.said else f"code {outcome.code}: {outcome.said}"
    if outcome.code != 0:
        return f"code {outcome.code}: {outcome.said}"
    found = CheckpointFolder(folder / "checkpoints", keep=3).newest()
    if found is None:
        return "it left no checkpoint"
    return "" if same({**found[1], "config": ""}, {**final, "config": ""}) else "it ended with other weights"


def _is_readable(path: Path) -> bool:
    try:
        return bool(read_checkpoint(str(path)))
    except UserError:
        return False


def same(one: object, other: object) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
