"""Trains a small run whole and the same run killed and resumed, and compares the two checkpoints bit by bit:

    python -m benchmarks.gpu.resume --output DIR --opts AMP_DTYPE bfloat16 TRAIN.EPOCHS 6 SAVE_STEPS 20

The recipe is the demo's, on the GPU where there is one. The exit code is 1 if any tensor differs.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from utils.cli import CliParser, number, run_cli
from utils.errors import UserError
from utils.paths import REPO_ROOT

COMPARED = ("model", "optimizer", "ema", "state")
POLL_SECONDS = 0.02


def main_command(folder: Path, tag: str, opts: Sequence[str]) -> list[str]:
    """The command line of main.py for the run `tag` in `folder`."""
    paths = ["--data-path", str(folder / "digits"), "--output", str(folder), "--tag", tag]
    return [sys.executable, "main.py", "--cfg", "configs/demo.yaml", *paths, *(["--opts", *opts] if opts else [])]


def last_checkpoint(folder: Path, tag: str) -> Path:
    return folder / "demo" / tag / "checkpoints" / "last.pth"


def train_to_completion(folder: Path, tag: str, opts: Sequence[str]) -> None:
    """Runs main.py, its output in `folder`. Raises UserError if it fails."""
    with open(folder / f"{tag}.txt", "a") as output:
        done = subprocess.run(main_command(folder, tag, opts), cwd=REPO_ROOT, stdout=output, stderr=output)
    if done.returncode != 0:
        raise UserError(f"main.py ended with {done.returncode}; see {folder / f'{tag}.txt'}")


def train_until_killed(folder: Path, tag: str, opts: Sequence[str]) -> None:
    """Starts main.py and kills it with SIGKILL right after its next save."""
    path = last_checkpoint(folder, tag)
    before = _version(path)
    with open(folder / f"{tag}.txt", "a") as output:
        run = subprocess.Popen(main_command(folder, tag, opts), cwd=REPO_ROOT, stdout=output, stderr=output)
    try:
        while _version(path) == before:
            if run.poll() is not None:
                raise UserError(f"main.py ended with {run.returncode} before it saved; see {folder / f'{tag}.txt'}")
            time.sleep(POLL_SECONDS)
    finally:
        run.kill()
        run.wait()


def _version(path: Path) -> tuple[int, int] | None:
    """What changes when the file is replaced."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def differences(a: object, b: object, name: str = "") -> Iterator[str]:
    """Names of the entries of two checkpoints that are not the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        as_bytes = [value.detach().cpu().contiguous().flatten().view(torch.uint8) for value in (a, b)]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(*as_bytes):
            yield name
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{name}.{key}".lstrip("."))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{name}.{i}".lstrip("."))
    elif a != b and not (a != a and b != b):  # NaN
        yield name


def run(argv: Sequence[str] | None) -> int:
    parser = CliParser(
        prog="python -m benchmarks.gpu.resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for both runs")
    parser.add_argument("--kills", type=number(int, 1, 100), default=2, metavar="N", help="how often it is killed (2)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="as main.py's")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"--output {args.output}: exists already; name a folder that does not")
    args.output.mkdir(parents=True)
    train_to_completion(args.output, "whole", args.opts)
    for _ in range(args.kills):
        train_until_killed(args.output, "killed", args.opts)
    train_to_completion(args.output, "killed", args.opts)
    whole, killed = (torch.load(last_checkpoint(args.output, tag), weights_only=True) for tag in ("whole", "killed"))
    found = [name for key in COMPARED for name in differences(whole[key], killed[key], key)]
    images = whole["state"]["images_seen"]
    print(f"killed {args.kills} times, {images:,} images: ", end="")
    print(f"{len(found)} entries differ: {', '.join(found[:5])}" if found else "the same bits", flush=True)
    return int(bool(found))


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
