"""Which released weights there are. Every name stands wherever a weight file can, such as --pretrained NAME:

    python -m tools.models                         all of them, with parameters, accuracy, SHA-256 and address
    python -m tools.models v2 tiny                 those whose names contain all of these words

Whether the models here are the models there, each compared with timm, torchvision and transformers on random weights
and images (needs requirements-dev.txt; --only limits it to some recipes):

    python -m tools.models --compare [--only swin_tiny …] [--write docs/reports/MODELS.md]
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from models.pretrained import registry
from models.pretrained.registry import COUNTED, Release
from utils.cli import run_cli
from utils.errors import UserError
from utils.files import write_text
from utils.table import Column, Table

COLUMNS = [
    Column("name"), Column("origin"), Column("classes"), Column("parameters, M", ".1f"),
    Column("multiply-adds, G", ".1f"), Column("size, MiB", ".0f"), Column("top-1, %", ".1f"), Column("top-5, %", ".1f"),
    Column("SHA-256"), Column("address"),
]  # fmt: skip


def listing(words: Sequence[str] = ()) -> Table:
    """The releases whose names contain all of `words`.

    Raises:
        UserError: there is none.
    """
    chosen = [release for release in registry.RELEASES if all(word in release.name for word in words)]
    if not chosen:
        raise UserError(f"no release has a name with {' and '.join(words)}; python -m tools.models lists them all")
    table = Table("models", "Released weights", COLUMNS, [row(release) for release in chosen])
    table.notes = [
        "Multiply-adds: of matrix products and convolutions for one image. Size: of the parameters in float32.",
        "Top-1, top-5: published on ImageNet-1K by the authors, for torchvision's by torchvision; – where the classes "
        "are those of ImageNet-22K, or where it is not certain which of the authors' files was converted.",
        "SHA-256: as far as it is known for certain: its first 8 digits stand in torchvision's file names.",
    ]
    return table


def row(release: Release) -> list[object]:
    parameters, macs = COUNTED[release.recipe, release.classes]
    return [
        release.name, release.origin, release.classes, parameters / 1e6, macs / 1e9, parameters * 4 / 2**20,
        release.top1, release.top5, f"{release.sha256}…" if release.sha256 else "unknown", release.url,
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="parts of the names to list")
    parser.add_argument("--compare", action="store_true", help="compare the models here with independent ones")
    parser.add_argument("--only", nargs="+", default=[], metavar="RECIPE", help="compare these recipes alone")
    parser.add_argument("--write", metavar="FILE", help="write the comparison to FILE as Markdown")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_cli(lambda: show(args))


def show(args: argparse.Namespace) -> int:
    if args.compare:
        from tools.independent import comparison  # imports three libraries that a list has no need of

        table = comparison(args.only)
    else:
        table = listing(args.words)
    print(table.terminal())
    if args.write:
        Path(args.write).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(args.write), table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
