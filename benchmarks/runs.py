"""Runs main.py in processes of its own and reads the files that it writes."""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from config import dump
from utils.errors import UserError
from utils.paths import REPO_ROOT
from utils.tracking.metric_writer import read_records

log = logging.getLogger(__name__)


def evaluate(config: CfgNode, weights: str, data_path: str, opts: Sequence[str]) -> dict[str, float]:
    """Metrics of `weights` on the validation images in `data_path`, by `main.py --eval`.

    Raises:
        UserError: main.py failed; includes its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, output = Path(folder, "config.yaml"), Path(folder, "runs")
        recipe.write_text(dump(config), encoding="utf-8")
        flags = ["--cfg", str(recipe), "--data-path", data_path, "--output", str(output)]
        run_main([*flags, "--eval", "--pretrained", weights, *(["--opts", *opts] if opts else [])])
        return read_metrics(output)


def read_metrics(output: Path) -> dict[str, float]:
    """The metrics in the `results.json` of the only run below `output`.

    Raises:
        UserError: there is no such file.
    """
    path = next(output.rglob("results.json"), None)
    if path is None:
        raise UserError(f"main.py --eval wrote no results.json below {output}")
    return json.loads(path.read_text(encoding="utf-8"))["metrics"]


def run_main(arguments: Sequence[str], processes: int = 1) -> None:
    """Runs main.py to its end and logs its output.

    Raises:
        UserError: it failed; includes the end of its output.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    output: list[str] = []
    command = [*launcher, str(REPO_ROOT / "main.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            output.append(line)
            log.info("    %s", line.rstrip())
    if process.returncode:
        raise UserError(f"main.py {' '.join(arguments)} failed:\n{''.join(output[-15:])}")


def last_epoch(run_dir: Path) -> dict | None:
    """The record of the last epoch that the run in `run_dir` has finished, or None."""
    epochs = [record for record in read_records(run_dir) if record["kind"] == "epoch"]
    return epochs[-1] if epochs else None
