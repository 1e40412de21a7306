"""Makes tables of the paper again, its figures beside those counted or measured on this machine:

    python -m benchmarks.tables 1                     parameters, multiply-adds and images/s of Swin and its peers
    python -m benchmarks.tables 4                     the ablations of shifting and position, counted
    python -m benchmarks.tables 5                     the speed of sliding, shifted and other windows
    python -m benchmarks.tables 7                     the architecture, read off the built models

Tiny, on any CPU, without writing anything: python -m benchmarks.tables 5 --models T --batch-size 1 --seconds 0.1
--rounds 1 --output ''. Accuracies need data and hours:

    python -m benchmarks.tables 1 --data-path DIR [--weights DIR]
    python -m benchmarks.tables 4 --data-path DIR --processes 8 [--only 'no pos.'] [--opts KEY VALUE …]

The table is shown and written to benchmarks/results/ as Markdown and CSV, with the hardware, versions and command; what
is measured, to a file that names the device.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ablations, architecture, peers, speed
from utils.cli import number, run_cli
from utils.errors import UserError
from utils.table import circumstances

RESULTS = Path(__file__).resolve().parent / "results"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = parser.add_subparsers(dest="table", metavar="1|4|5|7", required=True)
    for name, module in (("1", peers), ("4", ablations), ("5", speed), ("7", architecture)):
        table = tables.add_parser(name, help=(module.__doc__ or "").partition("\n")[0])
        table.set_defaults(make=module.make)
        table.add_argument("--output", metavar="DIR", default=str(RESULTS), help="where to write; '' for nowhere")
        if module is not architecture:
            table.add_argument("--only", metavar="ROW", nargs="+", default=[], help="these rows of the table alone")
        if module in (peers, speed):
            table.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
            table.add_argument(
                "--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help="images at a time (64)"
            )
            table.add_argument(
                "--seconds", type=number(float, 0, 1e5), default=2.0, metavar="S", help="for each thing and round (2)"
            )
            table.add_argument(
                "--rounds", type=number(int, 1, 1e4), default=5, metavar="N", help="medians are taken over these (5)"
            )
            table.add_argument("--amp-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
        if module is speed:
            table.add_argument("--models", nargs="+", choices=["T", "S", "B"], default=["T", "S", "B"])
        if module is peers:
            table.add_argument("--count-only", action="store_true", help="measure nothing")
            table.add_argument("--weights", metavar="DIR", default="", help="holds <name>.pth or <name>.safetensors")
        if module in (peers, ablations):
            table.add_argument("--data-path", metavar="DIR", default="", help="ImageNet: evaluate or train on it")
            table.add_argument("--opts", metavar="KEY VALUE", nargs="+", default=[], help="keys for main.py")
        if module is ablations:
            table.add_argument("--cfg", metavar="FILE", default="configs/swin_tiny.yaml", help="the recipe to vary")
            table.add_argument(
                "--processes", type=number(int, 1, 1024), default=1, metavar="N", help="GPUs to train on (1)"
            )
            table.add_argument("--runs", dest="runs_folder", metavar="DIR", default="logs", help="of the runs (logs)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    _, make, output = (options.pop(name) for name in ("table", "make", "output"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def program() -> int:
        table = make(**options)
        if not table.rows:
            raise UserError(f"--only {' '.join(options['only'])}: the table has no such row. Take its rows' own names")
        table.notes += circumstances()
        print(table.terminal())
        for path in table.save(Path(output)) if output else ():
            print(f"written: {path}")
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
