"""Compares the data path with other libraries' in one run: time of each stage, images/s of whole pipelines, and more.

    python -m benchmarks.loader                                        # synthetic JPEGs
    python -m benchmarks.loader --images imagenet_sample.zip           # real ones: a zip of JPEGs
    python -m benchmarks.loader --only pipelines --rounds 9 --output ''

The recipe is the original's: random resized crop to 224 (bicubic), flip, RandAugment rand-m9-mstd0.5-inc1, normalise,
random erasing 0.25. A pipeline goes from files to batches in host memory, with one worker process. It is measured in
images per second of CPU time of the worker and the main process together: images/s of one core, independent of the
machine's other load. Candidates are interleaved; results are medians over rounds.
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

from benchmarks import jpegs
from benchmarks.loader_pipelines import (
    OpenPipeline,
    compare_pipelines,
    count_equal_eval_images,
    original_eval,
    original_train,
    own_eval,
    own_train,
    timm_train,
    torchvision_train,
)
from benchmarks.loader_stages import stages_table
from benchmarks.loader_system import data_wait_table, memory_table, scaling_table, start_table, train_throughput
from benchmarks.timing import choose_device, device_slug, ratios
from data.native.library import library
from utils.cli import CliParser, number, run_cli, user_path, user_path_or_empty
from utils.compile_native import CannotBuild
from utils.files import write_text
from utils.paths import REPO_ROOT
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

RESULTS = REPO_ROOT / "benchmarks" / "results"
CORES = len(os.sched_getaffinity(0))
PARTS = ("stages", "pipelines", "scaling", "memory", "start", "waiting", "device")
PACKED_SIZES = (500, 400)  # longer sides, pixels
ORIGINAL = "the original code: Pillow, timm, torchvision"


def pipeline_tables(images: list[bytes], root: Path, args: argparse.Namespace, native: bool) -> list[Table]:
    """One table for training and one for evaluation."""
    training: dict[str, OpenPipeline] = {
        ORIGINAL: partial(original_train, root),
        "timm's loader with its prefetcher": partial(timm_train, root),
        "torchvision v2 on tensors (other RandAugment)": partial(torchvision_train, root),
        "this project, reference": own_train(root, "reference"),
    }
    evaluation: dict[str, OpenPipeline] = {
        ORIGINAL: partial(original_eval, root),
        "this project, reference": own_eval(root, "reference"),
    }
    if native:
        training["this project, native"] = own_train(root, "native")
        training["this project, gpu (the CPU's part)"] = own_train(root, "gpu")
        evaluation["this project, native"] = own_eval(root, "native")
    packed = ("DATA.DATASET", "packed")
    for size in PACKED_SIZES:
        folder = jpegs.pack(root, root.parent / f"packed{size}", size)
        gigabytes = sum(path.stat().st_size for path in (folder / "train").iterdir()) / len(images) * 1.281167e6 / 1e9
        name = f"this project, packed at {size} pixels ({gigabytes:.0f} GB for ImageNet)"
        training[f"{name}, {'native' if native else 'reference'}"] = own_train(folder, "auto", *packed)
        if native:
            training[f"{name}, gpu (the CPU's part)"] = own_train(folder, "gpu", *packed)
    compare = partial(compare_pipelines, batch_size=args.batch_size, batches=args.batches, rounds=args.rounds)
    tables = [
        _ratio_table("training", "Training: the full recipe", compare(training)),
        _ratio_table("evaluation", "Evaluation: resize 256, crop 224", compare(evaluation)),
    ]
    if native:
        equal, total = count_equal_eval_images(root)
        tables[1].notes.append(f"{equal} of {total} images are bitwise equal to the original code's.")
    return tables


def _ratio_table(stem: str, title: str, rates: dict[str, list[float]]) -> Table:
    columns = [Column("pipeline"), Column("images/s of one core", ",.0f"), Column("relative to the original", ".2f"),
               Column("lowest and highest round")]  # fmt: skip
    table = Table(stem, title, columns)
    for name, values in rates.items():
        relative = ratios(rates, name, ORIGINAL)
        table.rows.append([
            name, statistics.median(values), statistics.median(relative), f"{min(relative):.2f} to {max(relative):.2f}"
        ])  # fmt: skip
    return table


def measure(args: argparse.Namespace) -> list[Table]:
    """Makes and prints the tables of `args.only`. Raises UserError for images that cannot be used."""
    images, origin = jpegs.load_jpegs(args.images, args.limit)
    native = True
    try:
        library()
    except CannotBuild as error:
        native, origin = False, f"{origin} No native library here: {error}."
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as folder:
        root = jpegs.write_folder(Path(folder, "images"), images)
        best, backends = own_train(root, "auto"), ["reference", *(["native", "gpu"] if native else [])]
        parts: dict[str, Callable[[], list[Table]]] = {
            "stages": lambda: [stages_table(images, args.rounds, native)],
            "pipelines": lambda: pipeline_tables(images, root, args, native),
            "scaling": lambda: [scaling_table(best, args.batch_size, args.batches, args.rounds, args.workers)],
            "memory": lambda: [memory_table(root, args.batch_size, args.workers)],
            "start": lambda: [start_table(images[0], args.batch_size, args.workers, min(args.rounds, 3))],
            "waiting": lambda: [data_wait_table(images[:64], args.workers)],
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
        notes.append("No GPU here: training from files and augmentation on the device were not measured.")
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


def build_parser() -> argparse.ArgumentParser:
    count = number(int, 1, 1e9)
    parser = CliParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", metavar="ZIP", type=user_path, help="zip of JPEGs; synthetic ones if not given")
    parser.add_argument("--limit", metavar="N", type=count, default=500, help="images to use (500)")
    parser.add_argument("--only", metavar="PART", nargs="+", choices=PARTS, default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--batch-size", metavar="N", type=count, default=32, help="images of a batch (32)")
    parser.add_argument("--batches", metavar="N", type=count, default=8, help="of each pipeline in each round (8)")
    parser.add_argument("--rounds", metavar="N", type=count, default=5, help="medians are taken over these (5)")
    parser.add_argument("--workers", metavar="N", type=count, default=CORES, help="at most (cores)")
    parser.add_argument(
        "--output", metavar="DIR", type=user_path_or_empty, default=str(RESULTS), help="where to write; '' for nowhere"
    )
    return parser


def run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tables = measure(args)
    if args.output:
        for path in save(tables, Path(args.output), f"loader-{device_slug(choose_device('auto'))}"):
            print(f"written: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
