"""Table 4: ablations of shifting and position terms of Swin-T, counted, and trained if there is data."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runs
from benchmarks.paper import TABLE4, Ablation
from benchmarks.table1 import count
from config import get_config
from utils.table import Column, Table

log = logging.getLogger(__name__)

COLUMNS = [
    Column("ablation"), Column("keys"), Column("parameters, M", ".3f"), Column("multiply-adds, G", ".3f"),
    Column("top-1, % (paper)", ".1f"), Column("top-1, % here", ".2f"),
    Column("top-5, % (paper)", ".1f"), Column("top-5, % here", ".2f"), Column("epochs here"),
]  # fmt: skip


def make_table(
    only: Sequence[str], data_path: str, opts: Sequence[str], cfg: str, processes: int, runs_folder: str
) -> Table:
    """The rows named in `only`, all if it is empty.

    Without `data_path` nothing is trained, but results of existing runs are shown. An interrupted run is resumed.

    Args:
        opts: further keys for every run, KEY VALUE ….
        cfg: the recipe that the ablations change.
        runs_folder: OUTPUT of the runs; their tags are `table4_…`.
    """
    table = Table("table4", "Table 4: ablations of Swin-T on ImageNet-1K", COLUMNS)
    for row in TABLE4:
        if only and row.name not in only:
            continue
        changes = [*row.opts, *opts]
        config = get_config(cfg, [*changes, "OUTPUT", runs_folder, "TAG", run_tag(row)])
        run_dir = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        command = ["--cfg", cfg, "--data-path", data_path or "DIR", "--output", runs_folder, "--tag", run_tag(row)]
        command += ["--opts", *changes] if changes else []
        if data_path:
            log.info("training %s in %s", row.name, run_dir)
            runs.run_main(command, processes)
        parameters, macs = count(config)
        epoch = runs.last_epoch(run_dir) or {}
        table.rows.append([
            row.name, " ".join(row.opts), parameters / 1e6, macs / 1e9, row.top1, epoch.get("acc1"),
            row.top5, epoch.get("acc5"), epoch.get("epoch"),
        ])  # fmt: skip
        table.notes.append(f"{row.name}: `python main.py {shlex.join(command)}`")
    return table


def run_tag(row: Ablation) -> str:
    """The TAG of the row's run. Two rows are the default model, and share its run."""
    values = [value.lower().replace("+", "_") for value in row.opts[1::2] if value != "rel"]
    return "_".join(["table4", *("no_shift" if value == "false" else value for value in values)])
