"""Runs of main.py for a table: evaluations and trainings, each a process of its own with a configuration of its own."""

import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from config import dump
from utils.errors import UserError
from utils.paths import REPO_ROOT

log = logging.getLogger(__name__)

RESULT = re.compile(r"\d+ images: top-1 ([\d.]+) %  top-5 ([\d.]+) %")


def accuracy(config: CfgNode, weights: str, data_path: str, opts: Sequence[str]) -> float:
    """Top-1 (%) of `weights` on the validation images in `data_path`, by `main.py --eval`.

    Raises:
        UserError: main.py could not do it; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "config.yaml")
        recipe.write_text(dump(config), encoding="utf-8")
        flags = ["--cfg", str(recipe), "--data-path", data_path, "--eval", "--pretrained", weights]
        said = run_main([*flags, *(["--opts", *opts] if opts else [])])
    found = RESULT.search(said)
    if found is None:
        raise UserError(f"main.py --eval --pretrained {weights} gave no accuracy:\n{said[-1000:]}")
    return float(found[1])


def run_main(arguments: Sequence[str], processes: int = 1) -> str:
    """Runs main.py to its end, shows what it says, and returns that.

    Raises:
        UserError: it failed.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    said: list[str] = []
    command = [*launcher, str(REPO_ROOT / "main.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        for line in running.stdout or ():
            said.append(line)
            log.info("    %s", line.rstrip())
    if running.returncode:
        raise UserError(f"main.py {' '.join(arguments)} failed:\n{''.join(said[-15:])}")
    return "".join(said)


def last_epoch(folder: Path) -> dict | None:
    """The figures of the last epoch that the run in `folder` has finished, or None."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    epochs = [record for record in map(json.loads, lines) if record["kind"] == "epoch"]
    return epochs[-1] if epochs else None
