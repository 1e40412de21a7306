"""Compares Swin-T here with timm's Swin-T in one process, and the training loop with a minimal one.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --batch-size 8 --rounds 7 --write benchmarks/results/throughput.md

Tiny, on any CPU: python -m benchmarks.throughput --model demo --batch-size 2 --seconds 0.1 --rounds 1

A training step is forward, backward, gradient clipping at 5.0 and an update by fused AdamW. `loop` is a step of this
project's model by `engine.train_step.train_steps`, with all its metrics and checks; `bare` is the same model in a
minimal loop that makes the same update. `benchmarks.step` compares more models and libraries, and memory.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks.step import MODES, BenchmarkCase, build_bare_step, build_own_step, build_peer_step
from benchmarks.timing import Step, choose_device, compare_steps, median_ratio
from utils.cli import CliParser, number, run_cli, user_path
from utils.files import write_text
from utils.table import Column, Table, circumstances

COLUMNS = [
    Column(""), Column("images/s here (loop)", ".1f"), Column("bare loop", ".1f"), Column("timm", ".1f"),
    Column("here / timm", ".3f"), Column("loop / bare", ".3f"),
]  # fmt: skip


def measure_row(case: BenchmarkCase, device: torch.device, seconds: float, rounds: int) -> list[object]:
    steps: dict[str, Step] = {"here": build_own_step(case, device, "eager", [])}
    if case.mode == "training":
        steps["bare"] = build_bare_step(case, device)
    steps["timm"] = build_peer_step("timm", case, device, "eager")
    rates = compare_steps(steps, case.batch, device, seconds, rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return [
        f"{case.mode}, {case.dtype}", medians["here"], medians.get("bare"), medians["timm"],
        median_ratio(rates, "here", "timm"), median_ratio(rates, "here", "bare") if "bare" in rates else None,
    ]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="swin_tiny", metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=8)
    parser.add_argument("--seconds", type=number(float, 0, 1e5), default=3.0, help="of each candidate in each round")
    parser.add_argument("--rounds", type=number(int, 1, 1e4), default=7, help="medians are taken over these")
    parser.add_argument(
        "--write", type=user_path, help="Markdown file for the table, with hardware, versions and command"
    )
    return parser


def run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    title = f"{args.model}, batch {args.batch_size}, {args.rounds} rounds, medians"
    table = Table("throughput", title, COLUMNS, notes=circumstances())
    for dtype in ("float32", "bfloat16"):
        for mode in MODES:
            case = BenchmarkCase(args.model, mode, dtype, args.batch_size)
            table.rows.append(measure_row(case, choose_device("auto"), args.seconds, args.rounds))
    print(table.terminal())
    if args.write:
        write_text(args.write, table.markdown())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
