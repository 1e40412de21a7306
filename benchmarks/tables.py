"""Reproduces tables of the paper; its numbers are shown next to those counted or measured on this machine:

    python -m benchmarks.tables 1                     parameters, multiply-adds and images/s of Swin and its peers
    python -m benchmarks.tables 4                     the ablations of shifting and position, counted
    python -m benchmarks.tables 5                     the speed of sliding, shifted and other windows
    python -m benchmarks.tables 7                     the architecture, read from the built models

Tiny, on any CPU, without writing anything: python -m benchmarks.tables 5 --models T --batch-size 1 --seconds 0.1
--rounds 1 --output ''. Accuracies need data and hours:

    python -m benchmarks.tables 1 --data-path DIR [--weights DIR]
    python -m benchmarks.tables 4 --data-path DIR --processes 8 [--only 'no pos.'] [--opts KEY VALUE …]

The table is printed and written to benchmarks/results/ as Markdown and CSV, with hardware, versions and command. The
names of files with measurements include the device.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import table1, table4, table5, table7
from benchmarks.timing import InferenceTimer, choose_device
from utils.cli import CliParser, number, run_cli, user_path_or_empty
from utils.errors import UserError
from utils.paths import REPO_ROOT
from utils.table import Table, circumstances

RESULTS = REPO_ROOT / "benchmarks" / "results"


def build_parser() -> argparse.ArgumentParser:
    rows = CliParser(add_help=False)
    rows.add_argument("--only", metavar="ROW", nargs="+", default=[], help="only these rows of the table")
    timing = CliParser(add_help=False)
    timing.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    timing.add_argument(
        "--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help="images at a time (64)"
    )
    timing.add_argument(
        "--seconds", type=number(float, 0, 1e5), default=2.0, metavar="S", help="of each candidate in each round (2)"
    )
    timing.add_argument(
        "--rounds", type=number(int, 1, 1e4), default=5, metavar="N", help="medians are taken over these (5)"
    )
    timing.add_argument("--amp-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    data = CliParser(add_help=False)
    data.add_argument("--data-path", metavar="DIR", default="", help="ImageNet: evaluate or train on it")
    data.add_argument("--opts", metavar="KEY VALUE", nargs="+", default=[], help="keys for main.py")

    parser = CliParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = parser.add_subparsers(dest="table", metavar="1|4|5|7", required=True)
    parents = {"1": [rows, timing, data], "4": [rows, data], "5": [rows, timing], "7": []}
    for name, module in (("1", table1), ("4", table4), ("5", table5), ("7", table7)):
        table = tables.add_parser(name, help=(module.__doc__ or "").partition("\n")[0], parents=parents[name])
        table.add_argument(
            "--output", metavar="DIR", type=user_path_or_empty, default=str(RESULTS),
            help="where to write; '' for nowhere",
        )  # fmt: skip
        if name == "1":
            table.add_argument("--count-only", action="store_true", help="measure nothing")
            table.add_argument(
                "--weights", metavar="DIR", type=user_path_or_empty, default="",
                help="holds <name>.pth or <name>.safetensors",
            )  # fmt: skip
        elif name == "4":
            table.add_argument("--cfg", metavar="FILE", default="configs/swin_tiny.yaml", help="the recipe to vary")
            table.add_argument(
                "--processes", type=number(int, 1, 1024), default=1, metavar="N", help="GPUs to train on (1)"
            )
            table.add_argument(
                "--runs", metavar="DIR", type=user_path_or_empty, default="logs", help="of the runs (logs)"
            )
        elif name == "5":
            table.add_argument("--models", nargs="+", choices=["T", "S", "B"], default=["T", "S", "B"])
    return parser


def build_timer(args: argparse.Namespace) -> InferenceTimer:
    return InferenceTimer(choose_device(args.device), args.batch_size, args.seconds, args.rounds, args.amp_dtype)


def make_table(args: argparse.Namespace) -> Table:
    if args.table == "1":
        timer = None if args.count_only else build_timer(args)
        return table1.make_table(args.only, timer, args.weights, args.data_path, args.opts)
    if args.table == "4":
        return table4.make_table(
            only=args.only, data_path=args.data_path, opts=args.opts, cfg=args.cfg, processes=args.processes,
            runs_folder=args.runs,
        )  # fmt: skip
    return table5.make_table(args.only, args.models, build_timer(args)) if args.table == "5" else table7.make_table()


def run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    table = make_table(args)
    if not table.rows:
        raise UserError(f"--only {' '.join(args.only)}: the table has no such row. Give names of its rows")
    table.notes += circumstances()
    print(table.terminal())
    for path in table.save(Path(args.output)) if args.output else ():
        print(f"written: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
