"""Lists the released weights.

python -m tools.models                         all, with parameters, accuracy, SHA-256 and URL
python -m tools.models v2 tiny                 those with all of these words in their name
python -m tools.models --write FILE.md         writes the list as Markdown too

A name works wherever a weight file does, such as --pretrained NAME.
"""

import argparse
import sys
from collections.abc import Sequence

from models.pretrained import registry
from models.pretrained.registry import COUNTED, Release
from utils.cli import CliParser, run_cli, user_path
from utils.errors import UserError
from utils.files import write_text
from utils.table import Column, Table

COLUMNS = [
    Column("name"), Column("origin"), Column("classes"), Column("parameters, M", ".1f"),
    Column("multiply-adds, G", ".1f"), Column("size, MiB", ".0f"), Column("top-1, %", ".1f"), Column("top-5, %", ".1f"),
    Column("SHA-256"), Column("URL"),
]  # fmt: skip


def release_table(words: Sequence[str] = ()) -> Table:
    """The releases whose names contain all of `words`.

    Raises:
        UserError: there is none.
    """
    releases = [release for release in registry.RELEASES if all(word in release.name for word in words)]
    if not releases:
        raise UserError(f"no release has a name with {' and '.join(words)}; python -m tools.models lists them all")
    table = Table("models", "Released weights", COLUMNS, [_row(release) for release in releases])
    table.notes = [
        "Multiply-adds: of matrix products and convolutions for one image. Size: of the parameters in float32.",
        "Top-1, top-5: published on ImageNet-1K by the authors, for torchvision's files by torchvision; – for models "
        "of ImageNet-22K, and if it is uncertain which of the authors' files was converted.",
        "SHA-256: known only for torchvision's files, whose names contain its first 8 digits.",
    ]
    return table


def _row(release: Release) -> list[object]:
    parameters, macs = COUNTED[release.recipe, release.classes]
    return [
        release.name, release.origin, release.classes, parameters / 1e6, macs / 1e9, parameters * 4 / 2**20,
        release.top1, release.top5, f"{release.sha256}…" if release.sha256 else "unknown", release.url,
    ]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m tools.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="parts of the names to list")
    parser.add_argument("--write", type=user_path, metavar="FILE", help="write the list to FILE as Markdown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code."""

    def program() -> int:
        args = build_parser().parse_args(argv)
        table = release_table(args.words)
        print(table.terminal())
        if args.write:
            args.write.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.write, table.markdown())
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
