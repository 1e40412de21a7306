"""What a run leaves for people and programs to look at: `metrics.jsonl`, `summary.csv`, TensorBoard.

All of it can be taken back to an earlier moment of the clock, so that a resumed run leaves no doubled points. What
cannot be written, on a full disk for instance, is said once and is lacking; training goes on.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary

from utils.files import append, write_text
from utils.tracking.tensorboard import TensorBoardFile

log = logging.getLogger(__name__)

_HEAD = ("kind", "update", "samples")  # of every record; the rest are figures


class MetricWriter:
    """The records of one run, written by rank 0.

    Every record has `kind` (`train` or `epoch`), `update` and `samples`; the rest are figures. TensorBoard shows each
    figure under `kind/name` over the update number.
    """

    def __init__(self, folder: Path, tensorboard: Path, update: int, samples: int, eval_pending: bool = False):
        """Opens the records of the run in `folder` and forgets all after `samples` images, `update` updates.

        `eval_pending`: and what is known of the epoch that is complete there, which is to be evaluated yet.
        """
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "summary.csv"
        self._lacking: set[str] = set()
        kept = [
            record
            for record in read_records(folder)
            if record["samples"] < samples
            or record["samples"] == samples
            and not (eval_pending and record["kind"] == "epoch")
        ]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        self._try("metrics.jsonl", lambda: write_text(self._jsonl, lines))
        self.epochs = [record for record in kept if record["kind"] == "epoch"]
        self._write_summary()
        # Points from `purge_step` on, written by the run that was interrupted, are hidden by TensorBoard.
        self._events: TensorBoardFile | None = None
        self._open_events = lambda: TensorBoardFile(
            tensorboard, purge_step=update + (not eval_pending) if update else None
        )
        for record in kept:
            if eval_pending and record["update"] == update:  # hidden along with the epoch's
                figures = {name: value for name, value in record.items() if name not in _HEAD and value is not None}
                self._add_event(_scalars("train", figures), update)

    def add(self, kind: str, update: int, samples: int, figures: dict[str, float]) -> None:
        """Appends a record; JSON has no NaN or infinity, so a figure that is not finite is written as null."""
        record = {"kind": kind, "update": update, "samples": samples, **figures}
        finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        line = json.dumps(record | finite) + "\n"
        self._try("metrics.jsonl", lambda: append(self._jsonl, line.encode()))
        self._add_event(_scalars(kind, figures), update)
        if kind == "epoch":
            self.epochs.append(record)
            self._write_summary()

    def add_text(self, tag: str, text: str) -> None:
        self._add_event(summary.text(tag, f"```\n{text}\n```"), 0)

    def add_picture(self, tag: str, picture: torch.Tensor) -> None:
        """`picture` is (3, height, width), uint8."""
        self._add_event(summary.image(tag, picture, dataformats="CHW"), 0)

    def _add_event(self, what: Summary, step: int) -> None:
        def write() -> None:
            if self._events is None:
                self._events = self._open_events()
            self._events.add(what, step)

        self._try("TensorBoard", write)

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Calls `write`; what it cannot write is said when that begins, and when it is over."""
        try:
            write()
        except OSError as error:
            if name not in self._lacking:
                log.warning("%s: not written (%s); training goes on without these records. Make room", name, error)
            self._lacking.add(name)
        else:
            if name in self._lacking:
                log.warning("%s: written again; what was to be written in between is lacking", name)
            self._lacking.discard(name)

    def _write_summary(self) -> None:
        columns = ["epoch", *dict.fromkeys(key for row in self.epochs for key in row if key not in ("kind", "epoch"))]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        self._try("summary.csv", lambda: write_text(self._csv, text.getvalue()))


def _scalars(kind: str, figures: dict[str, float]) -> Summary:
    each = [summary.scalar(f"{kind}/{name}", value) for name, value in figures.items()]
    return Summary(value=[value for one in each for value in one.value])


def read_records(folder: Path) -> list[dict]:
    """The records of the run in `folder`. What is no record, such as a line cut short by a kill, is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and {"kind", "update"} <= record.keys() and isinstance(record.get("samples"), int):
            records.append(record)
    return records
