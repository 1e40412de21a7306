"""Draws the curves of a run from its `metrics.jsonl`:

    python -m tools.plot_run logs/demo/default curve.png

Loss and accuracy over epochs; a dashed line where the run was started again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.cli import run_cli
from utils.errors import UserError
from utils.tracking.metric_writer import read_records

EPOCH = ("epoch", "val_loss", "acc1")  # what a record of an epoch is drawn from


def draw(folder: Path, picture: Path) -> None:
    """Writes the picture of the run in `folder`; the ending of `picture` says the format.

    Raises:
        UserError: `folder` holds no run.
    """
    source = folder / "metrics.jsonl"
    if not source.is_file():
        raise UserError(f"{source}: no such file. Give the folder of a run, such as logs/demo/default")
    records = read_records(folder)
    train = [record for record in records if record["kind"] == "train" and _has_numbers(record, ("loss",))]
    epochs = [r for r in records if r["kind"] == "epoch" and _has_numbers(r, EPOCH) and r["epoch"]]
    if not epochs:
        raise UserError(f"{source}: no epoch is complete yet; try again later")
    per_epoch = epochs[-1]["images_seen"] / epochs[-1]["epoch"]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    done = [r["epoch"] for r in epochs]
    left.plot([r["images_seen"] / per_epoch for r in train], [r["loss"] for r in train], lw=0.8, label="training")
    left.plot(done, [r["val_loss"] for r in epochs], marker=".", label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(done, [r["acc1"] for r in epochs], marker=".", label="top-1")
    if "ema_acc1" in epochs[-1]:
        right.plot(done, [r.get("ema_acc1") for r in epochs], marker=".", label="top-1 of the averaged weights")
    right.set(xlabel="epoch", ylabel="% of validation images")
    for number, samples in enumerate(restarts(folder)):
        for axes in (left, right):
            label = None if number else "started again"
            axes.axvline(samples / per_epoch, color="grey", ls="--", lw=0.8, label=label)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{folder}: top-1 {epochs[-1]['acc1']:.2f} % after {epochs[-1]['epoch']} epochs", fontsize=10)
    try:
        figure.savefig(picture, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{picture}: cannot be written ({error}). Give a path that ends in .png or .svg") from error


def _has_numbers(record: dict, names: Sequence[str]) -> bool:
    return all(isinstance(record.get(name), int | float) for name in names)


def restarts(folder: Path) -> list[int]:
    """The clock at each start that continued the run. A line that was cut short by a kill is left out."""
    starts = []
    for line in (folder / "starts.jsonl").read_text().splitlines() if (folder / "starts.jsonl").exists() else []:
        try:
            starts.append(json.loads(line)["images_seen"])
        except (ValueError, KeyError, TypeError):
            continue
    return [samples for samples in starts if isinstance(samples, int) and samples > 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.plot_run", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a run, such as logs/demo/default")
    parser.add_argument("picture", type=Path, help="the picture to write, .png or .svg")
    args = parser.parse_args(argv)
    return run_cli(lambda: draw(args.folder, args.picture) or 0)


if __name__ == "__main__":
    sys.exit(main())
