"""What a run leaves for people and programs to look at: `metrics.jsonl`, `summary.csv`, TensorBoard.

All of it can be taken back to an earlier moment of the clock, so that a resumed run leaves no doubled points.
"""

import csv
import io
import json
import math
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from utils.files import write_text


class Records:
    """The records of one run, written by rank 0.

    Every record has `kind` (`train` or `epoch`), `update` and `samples`; the rest are figures. TensorBoard shows each
    figure under `kind/name` over the update number.
    """

    def __init__(self, folder: Path, tensorboard: Path, update: int, samples: int):
        """Opens the records of the run in `folder` and forgets all after `samples` images, `update` updates."""
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "summary.csv"
        kept = [record for record in read_records(folder) if record["samples"] <= samples]
        write_text(self._jsonl, "".join(json.dumps(record) + "\n" for record in kept))
        self.epochs = [record for record in kept if record["kind"] == "epoch"]
        self._write_summary()
        # Points from `purge_step` on, written by the run that was interrupted, are hidden by TensorBoard.
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=update + 1 if update else None)

    def add(self, kind: str, update: int, samples: int, figures: dict[str, float]) -> None:
        """Appends a record; JSON has no NaN or infinity, so a figure that is not finite is written as null."""
        record = {"kind": kind, "update": update, "samples": samples, **figures}
        finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        with open(self._jsonl, "a") as file:
            file.write(json.dumps(record | finite) + "\n")
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, update)
        if kind == "epoch":
            self.epochs.append(record)
            self._write_summary()
        self._tensorboard.flush()

    def add_text(self, tag: str, text: str) -> None:
        self._tensorboard.add_text(tag, f"```\n{text}\n```", 0)

    def add_picture(self, tag: str, picture: torch.Tensor) -> None:
        """`picture` is (3, height, width), uint8."""
        self._tensorboard.add_image(tag, picture, 0)
        self._tensorboard.flush()

    def close(self) -> None:
        self._tensorboard.close()

    def _write_summary(self) -> None:
        columns = ["epoch", *dict.fromkeys(key for row in self.epochs for key in row if key not in ("kind", "epoch"))]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        write_text(self._csv, text.getvalue())


def read_records(folder: Path) -> list[dict]:
    """The records of the run in `folder`. What is no record, such as a line cut short by a kill, is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and {"kind", "update", "samples"} <= record.keys():
            records.append(record)
    return records
