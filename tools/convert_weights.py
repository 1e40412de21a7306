"""Swin weights from any layout into any other, without loss.

    python -m tools.convert_weights swin_tiny_patch4_window7_224.pth swin_t.safetensors --to torchvision
    python -m tools.convert_weights model.safetensors swin_tiny.pth --to original

IN is a path, a name of `python -m tools.models` or a URL. Its layout (the original's, timm's, torchvision's or that of
Hugging Face transformers), its format and a prefix before its names are recognised by its contents. OUT is written in
the format of safetensors where it ends so, else in that of PyTorch (for `original` under the key "model", where that
code looks for it).

There and back gives the same tensors, bit for bit: what is renamed, joined or split on the way is all that changes.
Buffers that a library computes itself (indices, masks, tables of offsets) are written where its files hold them today:
never for timm and hf; always for torchvision; for `original` if IN has them. Older files of timm and transformers hold
some too: --keep-buffers keeps them. `hf` has the names of the files of transformers, which every release reads by
from_pretrained(); `hf5` those that release 5 has in memory for Swin V1, for load_state_dict().

Evaluation and fine-tuning by main.py need no conversion: --pretrained takes all of these.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models.pretrained.convert import (
    DERIVED,
    LAYOUTS,
    MIN_MATCHED_FRACTION,
    TOP_LEVEL_KEYS,
    from_original,
    matched_fraction,
    strip_prefix,
    to_original,
    version_of,
)
from models.pretrained.download import resolve_weights
from utils.checkpoint.io import SAFETENSORS, extract_state_dict, read_checkpoint, write_weights
from utils.cli import run_cli
from utils.errors import UserError

KEYS = ("model", "state_dict")  # of the weights, in files that hold more
ENDINGS = (SAFETENSORS, ".pth", ".pt", ".bin")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}. `python -m tools.convert_weights --help` lists all flags, with examples.")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.convert_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="weights in any layout: file, name or URL")
    parser.add_argument("target", metavar="OUT", type=Path, help=f"the file to write, ending in {', '.join(ENDINGS)}")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--window-size", metavar="N", type=int,
        help="side of the windows, tokens: for torchvision's Swin V2, where IN does not hold what depends on it",
    )  # fmt: skip
    parser.add_argument(
        "--keep-buffers", action="store_true", help="also those of IN that current files of this layout lack"
    )
    return parser


def convert(source: str, target: Path, to: str, window: int | None = None, keep_buffers: bool = False) -> list[str]:
    """Reads `source`, writes `target`, and says in lines of text what was recognised and what was left out.

    Raises:
        UserError: files that cannot be read or written, weights of no known layout, or a model that the layout `to`
            does not have.
    """
    if target.suffix not in ENDINGS:
        raise UserError(f"{target}: its ending says in which format to write; give it one of {', '.join(ENDINGS)}")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder. Make it first, or give another place")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise UserError(f"{target}: IN and OUT are the same file. Give OUT another name")
    if window is not None and window < 1:
        raise UserError(f"--window-size {window}: a window has at least 1 token along a side")

    contents = read_checkpoint(resolve_weights(source, progress=sys.stderr.isatty()))
    weights = extract_state_dict(contents, source)
    try:
        out, said = translate(weights, to, window, keep_buffers)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    write_weights(target, out, key="model" if to == "original" and target.suffix != SAFETENSORS else "")

    values = sum(value.numel() for value in out.values())
    lines = [f"{source}: {said[0]}", f"{target}: layout {to}, {len(out)} tensors, {values:,} values", *said[1:]]
    rest = [str(key) for key, value in contents.items() if not isinstance(value, Tensor) and key not in KEYS]
    if rest:
        lines.append(f"left out, as it is not weights: {', '.join(rest)}")
    return lines


def translate(
    weights: dict[str, Tensor], to: str, window: int | None = None, keep_buffers: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in the layout `to`, and lines of text: the first says what was recognised, others what was left out.

    Raises:
        UserError: weights of no known layout, or a model that the layout `to` does not have.
    """
    found = strip_prefix(weights)
    if found.layout is None:
        names = ", ".join(list(weights)[:6])
        raise UserError(f"these are not the weights of a Swin in a layout known here; the first names are {names}")
    original = to_original(found)
    beside = sorted(name for name in found.outside if name in original and name.split(".")[0] not in TOP_LEVEL_KEYS)
    if matched_fraction(original, original.keys() - beside) < MIN_MATCHED_FRACTION:
        raise UserError(
            f"more than a twentieth of the parameters are not of a Swin: {', '.join(beside[:6])}, … "
            "Save the Swin alone, with the program that these weights belong to"
        )
    out = from_original({k: v for k, v in original.items() if k not in beside}, LAYOUTS[to], window, keep_buffers)
    prefix = f", behind the prefix {found.prefix!r}" if found.prefix else ""
    said = [f"Swin V{version_of(weights)}, layout {found.layout.name}{prefix}, {len(weights)} tensors"]
    if beside:
        said.append(f"left out, as it stands beside the model: {', '.join(beside)}")
    derived = [sum(name.endswith(DERIVED) for name in names) for names in (original, out)]
    if derived[0] > derived[1]:
        said.append(f"left out, as the layout {to} has no place for what is derived: {derived[0] - derived[1]} buffers")
    return out, said


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code, one of those in utils/errors.py."""

    def program() -> int:
        args = build_parser().parse_args(argv)
        for line in convert(args.source, args.target, args.to, args.window_size, args.keep_buffers):
            print(line)
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
