"""The data path beside others, in one run: milliseconds of each stage, images a second of whole pipelines, and more.

    python -m benchmarks.loader                                        # made-up JPEGs
    python -m benchmarks.loader --images imagenet_sample.zip           # real ones: a zip of JPEGs
    python -m benchmarks.loader --only pipelines --rounds 9 --output ''

The recipe is the original's: random resized crop to 224 (bicubic), flip, RandAugment rand-m9-mstd0.5-inc1, normalise,
random erasing 0.25. Pipelines go from files to batches in host memory by one worker process. They are measured in
images per second of processor time, that of the worker and of the process that asks together, which is images/s of one
core and does not depend on what else the machine does. They take turns; figures are medians over rounds.
"""

import argparse
import csv
import io
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import pictures
from benchmarks.loader_pipelines import (
    Opening,
    compare,
    original_eval,
    original_train,
    own_eval,
    own_train,
    same_evaluation,
    timm_train,
    torchvision_train,
)
from benchmarks.loader_stages import stages
from benchmarks.loader_system import memory, scaling, start, train_throughput, waiting
from benchmarks.throughput import ratio
from data.native.library import library
from utils.compile_native import CannotBuild
from utils.errors import UserError
from utils.files import write_text
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

RESULTS = Path(__file__).resolve().parent / "results"
CORES = len(os.sched_getaffinity(0))
PARTS = ("stages", "pipelines", "scaling", "memory", "start", "waiting", "device")
PACKED = (500, 400)  # longer sides, pixels
ORIGINAL = "the original's: Pillow, timm, torchvision"


def pipelines(images: list[bytes], root: Path, batch_size: int, batches: int, rounds: int, native: bool) -> list[Table]:
    """Training, then evaluation."""
    training: dict[str, Opening] = {
        ORIGINAL: partial(original_train, root),
        "timm's loader with its prefetcher": partial(timm_train, root),
        "torchvision v2 on tensors (other RandAugment)": partial(torchvision_train, root),
        "this project, reference": own_train(root, "reference"),
    }
    evaluation: dict[str, Opening] = {
        ORIGINAL: partial(original_eval, root),
        "this project, reference": own_eval(root, "reference"),
    }
    packed = ("DATA.DATASET", "packed")
    if native:
        training["this project, native"] = own_train(root, "native")
        training["this project, gpu (the CPU's part)"] = own_train(root, "gpu")
        evaluation["this project, native"] = own_eval(root, "native")
    for size in PACKED:
        folder = pictures.pack(root, root.parent / f"packed{size}", size)
        gigabytes = sum(path.stat().st_size for path in (folder / "train").iterdir()) / len(images) * 1.281167e6 / 1e9
        name = f"this project, packed at {size} pixels ({gigabytes:.0f} GB for ImageNet)"
        training[f"{name}, {'native' if native else 'reference'}"] = own_train(folder, "auto", *packed)
        if native:
            training[f"{name}, gpu (the CPU's part)"] = own_train(folder, "gpu", *packed)
    tables = [
        _ratios("training", "Training: the full recipe", compare(training, batch_size, batches, rounds)),
        _ratios("evaluation", "Evaluation: resize 256, crop 224", compare(evaluation, batch_size, batches, rounds)),
    ]
    if native:
        same, of = same_evaluation(root)
        tables[1].notes.append(f"{same} of {of} images are equal to the original's in every bit.")
    return tables


def _ratios(stem: str, title: str, rates: dict[str, list[float]]) -> Table:
    columns = [Column("pipeline"), Column("images/s of one core", ",.0f"), Column("to the original's", ".2f"),
               Column("least and most, by round")]  # fmt: skip
    table = Table(stem, title, columns)
    for name, values in rates.items():
        each = [a / b for a, b in zip(values, rates[ORIGINAL], strict=True)]
        row = [name, statistics.median(values), ratio(rates, name, ORIGINAL), f"{min(each):.2f} to {max(each):.2f}"]
        table.rows.append(row)
    return table


def measure(args: argparse.Namespace) -> list[Table]:
    """The tables that `args.only` names, shown as they come. Raises UserError for images that cannot be used."""
    images, origin = pictures.load(args.images, args.limit)
    native = True
    try:
        library()
    except CannotBuild as error:
        native, origin = False, f"{origin} No native library here: {error}."
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as folder:
        root = pictures.write_folder(Path(folder, "images"), images)
        best, backends = own_train(root, "auto"), ["reference", *(["native", "gpu"] if native else [])]
        parts: dict[str, Callable[[], list[Table]]] = {
            "stages": lambda: [stages(images, args.rounds, native)],
            "pipelines": lambda: pipelines(images, root, args.batch_size, args.batches, args.rounds, native),
            "scaling": lambda: [scaling(best, args.batch_size, args.batches, args.rounds, args.workers)],
            "memory": lambda: [memory(root, args.batch_size, args.workers)],
            "start": lambda: [start(images[0], args.batch_size, args.workers, min(args.rounds, 3))],
            "waiting": lambda: [waiting(images[:64], args.workers)],
            "device": lambda: [train_throughput(root, backends, args.workers)] if torch.cuda.is_available() else [],
        }
        for part in args.only:
            log.info("measuring %s", part)
            for table in parts[part]():
                print(table.terminal(), end="\n\n", flush=True)
                tables.append(table)
    notes = [origin, f"Batches of {args.batch_size}; medians of {args.rounds} rounds of {args.batches} batches each.",
             *circumstances()]  # fmt: skip
    if not torch.cuda.is_available() and "device" in args.only:
        notes.append("No GPU here: images/s fed and the time of the device's part were not measured.")
    print("\n".join(notes))
    if tables:
        tables[-1].notes += notes
    return tables


def save(tables: list[Table], folder: Path, stem: str) -> list[Path]:
    """All tables in one Markdown file, and in one CSV: table, row, column, value."""
    text = "\n".join(["# The data path", "", *(table.markdown().replace("# ", "## ", 1) for table in tables)])
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value"])
    for table in tables:
        for i, row in enumerate(table.rows):
            cells = zip(table.columns, row, strict=True)
            writer.writerows([table.stem, i, column.name, "" if value is None else value] for column, value in cells)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.md", folder / f"{stem}.csv"]
    for path, content in zip(paths, (text, rows.getvalue()), strict=True):
        write_text(path, content)
    return paths


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}. `python -m benchmarks.loader --help` lists all flags, with examples.")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", metavar="ZIP", type=Path, help="zip of JPEGs; made-up ones if not given")
    parser.add_argument("--limit", metavar="N", type=int, default=500, help="images to use (500)")
    parser.add_argument("--only", metavar="PART", nargs="+", choices=PARTS, default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images of a batch (32)")
    parser.add_argument("--batches", metavar="N", type=int, default=8, help="of each pipeline in each round (8)")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="medians are taken over these (5)")
    parser.add_argument("--workers", metavar="N", type=int, default=CORES, help="at most (cores)")
    parser.add_argument("--output", metavar="DIR", default=str(RESULTS), help="where to write; '' for nowhere")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args = build_parser().parse_args(argv)
        for flag in ("limit", "batch_size", "batches", "rounds", "workers"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: it must be at least 1.")
        tables = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.output:
        device = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
        for path in save(tables, Path(args.output), f"loader-{device}"):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
