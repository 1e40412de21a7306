"""Plots loss and main validation metric of a run over its epochs.

    python -m tools.plot_run logs/demo/default curve.png

Reads `metrics.jsonl` and `starts.jsonl` in the folder of the run. Dashed lines mark where it was resumed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import CliParser, run_cli, user_path
from utils.errors import UserError
from utils.tracking.metric_writer import read_records

DEFAULT_METRIC = "acc1"  # for runs whose launches do not record "main_metric"


def plot(folder: Path, image: Path) -> None:
    """Writes the plot of the run in `folder` to `image`, in the format of its suffix.

    Raises:
        UserError: `folder` contains no run, or `image` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed: pip install -r requirements-plot.txt") from None
    source = folder / "metrics.jsonl"
    if not source.is_file():
        raise UserError(f"{source}: no such file. Give the folder of a run, such as logs/demo/default")
    records, launches = read_records(folder), read_launches(folder)
    metric = next((m for launch in launches[::-1] if isinstance(m := launch.get("main_metric"), str)), DEFAULT_METRIC)
    train = [record for record in records if record["kind"] == "train" and _has_numbers(record, "loss")]
    epochs = [
        r for r in records if r["kind"] == "epoch" and _has_numbers(r, "epoch", "val_loss", metric) and r["epoch"]
    ]
    if not epochs:
        raise UserError(f"{source}: no epoch is complete yet; try again later")
    epoch_images = epochs[-1]["images_seen"] / epochs[-1]["epoch"]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epoch_numbers = [record["epoch"] for record in epochs]
    left.plot([r["images_seen"] / epoch_images for r in train], [r["loss"] for r in train], lw=0.8, label="training")
    left.plot(epoch_numbers, [record["val_loss"] for record in epochs], marker=".", label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(epoch_numbers, [record[metric] for record in epochs], marker=".", label=metric)
    if (ema_metric := f"ema_{metric}") in epochs[-1]:
        right.plot(epoch_numbers, [record.get(ema_metric) for record in epochs], marker=".", label=ema_metric)
    right.set(xlabel="epoch", ylabel=metric)
    for number, images_seen in enumerate(resume_points(launches)):
        for axes in (left, right):
            label = None if number else "resumed"
            axes.axvline(images_seen / epoch_images, color="grey", ls="--", lw=0.8, label=label)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{folder}: {metric} {epochs[-1][metric]:.2f} after {epochs[-1]['epoch']} epochs", fontsize=10)
    try:
        figure.savefig(image, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{image}: cannot be written ({error}). Give a path that ends in .png or .svg") from error


def _has_numbers(record: dict, *names: str) -> bool:
    return all(isinstance(record.get(name), int | float) for name in names)


def read_launches(folder: Path) -> list[dict]:
    """The launch records of the run in `folder`. A line that was cut short by a kill is skipped."""
    path = folder / "starts.jsonl"
    launches = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            launches.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [launch for launch in launches if isinstance(launch, dict)]


def resume_points(launches: list[dict]) -> list[int]:
    """Images seen at each launch that resumed the run."""
    points = [launch.get("images_seen") for launch in launches]
    return [images_seen for images_seen in points if isinstance(images_seen, int) and images_seen > 0]


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m tools.plot_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="RUN", type=user_path, help="the folder of a run, such as logs/demo/default")
    parser.add_argument("image", metavar="IMAGE", type=user_path, help="the image to write, .png or .svg")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code."""

    def program() -> int:
        args = build_parser().parse_args(argv)
        plot(args.folder, args.image)
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
