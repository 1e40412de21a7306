"""Table 4: shifting and position terms of Swin-T switched off in turn, counted, and trained where there are data."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runs
from benchmarks.paper import TABLE4, Ablation
from benchmarks.peers import count
from config import get_config
from utils.table import Column, Table

log = logging.getLogger(__name__)

COLUMNS = [
    Column("ablation"), Column("keys"), Column("parameters, M", ".3f"), Column("multiply-adds, G", ".3f"),
    Column("top-1, % (paper)", ".1f"), Column("top-1, % here", ".2f"),
    Column("top-5, % (paper)", ".1f"), Column("top-5, % here", ".2f"), Column("epochs here"),
]  # fmt: skip


def make(only: Sequence[str], data_path: str, opts: Sequence[str], cfg: str, processes: int, runs_folder: str) -> Table:
    """The rows named in `only`, all where that is empty. Without `data_path` nothing is trained, but the results of
    runs that are there are shown. A run that was interrupted continues, as every run of main.py does.

    Args:
        cfg: the recipe in which the rows change what they are about.
        opts: further keys for every run, KEY VALUE ….
        runs_folder: OUTPUT of the runs; their tags are `table4_…`.
    """
    table = Table("table4", "Table 4: ablations of Swin-T on ImageNet-1K", COLUMNS)
    for row in TABLE4:
        if only and row.name not in only:
            continue
        changes = [*row.opts, *opts]
        config = get_config(cfg, [*changes, "OUTPUT", runs_folder, "TAG", tag(row)])
        folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        command = ["--cfg", cfg, "--data-path", data_path or "DIR", "--output", runs_folder, "--tag", tag(row)]
        command += ["--opts", *changes] if changes else []
        if data_path:
            log.info("training %s in %s", row.name, folder)
            runs.run_main(command, processes)
        parameters, macs = count(config)
        done = runs.last_epoch(folder) or {}
        table.rows.append([
            row.name, " ".join(row.opts), parameters / 1e6, macs / 1e9,
            row.top1, done.get("acc1"), row.top5, done.get("acc5"), done.get("epoch"),
        ])  # fmt: skip
        table.notes.append(f"{row.name}: `python main.py {shlex.join(command)}`")
    return table


def tag(row: Ablation) -> str:
    """The TAG of the row's run. Two rows are the default model, and share its run."""
    values = [value.lower().replace("+", "_") for value in row.opts[1::2] if value != "rel"]
    return "_".join(["table4", *("no_shift" if value == "false" else value for value in values)])
