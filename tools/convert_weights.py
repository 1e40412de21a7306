"""Converts Swin weights from any format to any other, losslessly.

    python -m tools.convert_weights swin_tiny_patch4_window7_224.pth swin_t.safetensors --to torchvision
    python -m tools.convert_weights model.safetensors swin_tiny.pth --to original

IN is a path, a name listed by `python -m tools.models`, or a URL. Its format (of the original code, timm, torchvision,
Hugging Face transformers or OpenMMLab's mmpretrain), its file type, and a prefix of its names are detected. OUT is a
safetensors file if it ends so, else a PyTorch file (for `original` with the weights under the key "model", as that code
expects).

Converting back gives the same tensors, bit for bit: conversion only renames, joins, splits and reorders them. Buffers
that a library computes itself (indices, masks, tables of offsets) are written if its current files contain them: never
for timm and hf; always for torchvision; for mmpretrain always with V1, and with V2 if IN has them; for `original` if IN
has them. Older files of timm and transformers contain some too: --keep-buffers keeps them. `hf` has the names of
transformers' files, which every release reads with from_pretrained(); `hf5` has the names that release 5 has in memory
for Swin V1, for load_state_dict().

Of a file that also holds averaged weights (EMA), such as best.pth of a run, those are converted that the file says are
better, else the weights as trained; --ema takes the averaged ones, --no-ema those as trained. The output says what lies
in the file.

Evaluation and fine-tuning with main.py need no conversion: --pretrained accepts all formats.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models.pretrained.convert import (
    MIN_MATCHED_FRACTION,
    TOP_LEVEL_KEYS,
    detect_format,
    from_original,
    matched_fraction,
    swin_version,
    to_original,
)
from models.pretrained.download import resolve_weights
from models.pretrained.key_maps import DERIVED, FORMATS
from utils.checkpoint.io import SAFETENSORS, read_checkpoint, write_weights
from utils.checkpoint.weights import WEIGHT_ENTRIES, extract_weights
from utils.cli import CliParser, number, run_cli, user_path
from utils.errors import UserError

SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin")


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m tools.convert_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="weights in any format: file, name or URL")
    parser.add_argument(
        "target", metavar="OUT", type=user_path, help=f"the file to write, ending in {', '.join(SUFFIXES)}"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--window-size", metavar="N", type=number(int, 1, 2**16),
        help="side of the windows in tokens: for torchvision's Swin V2, if IN lacks the buffers that depend on it",
    )  # fmt: skip
    parser.add_argument(
        "--keep-buffers", action="store_true", help="also write buffers of IN that current files of this format lack"
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="convert the averaged weights of a file that holds both"
    )
    return parser


def convert(
    source: str, target: Path, to: str, window: int | None = None, keep_buffers: bool = False, ema: bool | None = None
) -> list[str]:
    """Converts `source` to the file `target`. Returns lines of text: what was detected, and what was left out.

    Args:
        ema: convert the averaged weights, or those as trained; if None, those that the file says are better.

    Raises:
        UserError: files that cannot be read or written, weights of an unknown format, or a model that the format `to`
            does not have.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target}: its suffix selects the file type; use one of {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder. Create it first, or give another path")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise UserError(f"{target}: IN and OUT are the same file. Give OUT another name")

    contents = read_checkpoint(resolve_weights(source, progress=sys.stderr.isatty()))
    chosen = extract_weights(contents, source, {None: "auto", True: "ema", False: "model"}[ema])
    try:
        converted, messages = convert_state_dict(chosen.state_dict, to, window, keep_buffers)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    write_weights(target, converted, key="model" if to == "original" and target.suffix != SAFETENSORS else "")

    values = sum(value.numel() for value in converted.values())
    summary = f"{target}: format {to}, {len(converted)} tensors, {values:,} values"
    notes = [f"{source} {chosen.note}"] if chosen.note else []
    lines = [*notes, f"{source}: {messages[0]}", summary, *messages[1:]]
    other = [str(k) for k, value in contents.items() if not isinstance(value, Tensor) and k not in WEIGHT_ENTRIES]
    if other:
        lines.append(f"left out, not weights: {', '.join(other)}")
    return lines


def convert_state_dict(
    weights: dict[str, Tensor], to: str, window: int | None = None, keep_buffers: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Converts `weights` to the format `to`.

    Returns:
        The converted state dict, and lines of text: first what was detected, then what was left out.

    Raises:
        UserError: weights of an unknown format, or a model that the format `to` does not have.
    """
    detected = detect_format(weights)
    if detected.format is None:
        names = ", ".join(list(weights)[:6])
        raise UserError(f"these are not the weights of a Swin in a known format; the first names are {names}")
    original = to_original(detected)
    outside = sorted(n for n in detected.outside if n in original and n.split(".")[0] not in TOP_LEVEL_KEYS)
    if matched_fraction(original, original.keys() - outside) < MIN_MATCHED_FRACTION:
        raise UserError(
            f"more than a twentieth of the parameters are not of a Swin: {', '.join(outside[:6])}, … "
            "Save the Swin alone, with the program that wrote these weights"
        )
    inside = {name: value for name, value in original.items() if name not in outside}
    converted = from_original(inside, FORMATS[to], window, keep_buffers)
    prefix = f", prefix {detected.prefix!r}" if detected.prefix else ""
    messages = [f"Swin V{swin_version(weights)}, format {detected.format.name}{prefix}, {len(weights)} tensors"]
    if outside:
        messages.append(f"left out, outside the model: {', '.join(outside)}")
    omitted = sum(name.endswith(DERIVED) for name in original) - sum(name.endswith(DERIVED) for name in converted)
    if omitted > 0:
        messages.append(f"left out, derived buffers that the format {to} does not store: {omitted}")
    return converted, messages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code."""

    def program() -> int:
        args = build_parser().parse_args(argv)
        for line in convert(args.source, args.target, args.to, args.window_size, args.keep_buffers, args.ema):
            print(line)
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
