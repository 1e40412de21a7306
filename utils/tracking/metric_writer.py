"""Writes the metrics of a run to `metrics.jsonl`, `summary.csv` and TensorBoard.

A resumed run removes the records after its checkpoint, so that no point appears twice. A failed write (of a full disk,
for instance) is logged once; training goes on without these records.
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

_HEAD = ("kind", "step", "images_seen")  # of every record; the rest are metrics


class MetricWriter:
    """The records of one run, written by rank 0.

    Every record has `kind` (`train` or `epoch`), `step` and `images_seen`; the rest are metrics. TensorBoard shows each
    metric as `kind/name` over the images seen: steps count anew when a run is resumed with another global batch size.
    """

    def __init__(self, folder: Path, tensorboard: Path, images_seen: int, eval_pending: bool = False):
        """Opens the records of the run in `folder` and removes those after `images_seen`, where the run continues.

        Args:
            tensorboard: the folder of TensorBoard's files.
            eval_pending: an epoch ends there but is not evaluated yet: its record is removed too.
        """
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "summary.csv"
        self._failing: set[str] = set()
        kept = [
            record
            for record in read_records(folder)
            if record["images_seen"] < images_seen
            or record["images_seen"] == images_seen
            and not (eval_pending and record["kind"] == "epoch")
        ]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        self._try("metrics.jsonl", lambda: write_text(self._jsonl, lines))
        self.epochs = [record for record in kept if record["kind"] == "epoch"]
        self._write_summary()
        # TensorBoard hides the points that the interrupted run wrote from `purge_from` on.
        self._events: TensorBoardFile | None = None
        purge_from = images_seen + (not eval_pending)
        self._open_events = lambda: TensorBoardFile(tensorboard, purge_from)
        for record in kept:
            if record["images_seen"] >= purge_from:  # hidden together with the epoch's: written again
                metrics = {name: value for name, value in record.items() if name not in _HEAD and value is not None}
                self._add_event(_scalars("train", metrics), images_seen)

    def add(self, kind: str, step: int, images_seen: int, metrics: dict[str, float]) -> None:
        """Appends a record. A metric that is not finite is written as null, because JSON has no NaN or infinity."""
        record = {"kind": kind, "step": step, "images_seen": images_seen, **metrics}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps(record | finite) + "\n"
        self._try("metrics.jsonl", lambda: append(self._jsonl, line.encode()))
        self._add_event(_scalars(kind, metrics), images_seen)
        if kind == "epoch":
            self.epochs.append(record)
            self._write_summary()

    def add_text(self, tag: str, text: str) -> None:
        """Shows `text` in TensorBoard."""
        self._add_event(summary.text(tag, f"```\n{text}\n```"), 0)

    def add_image(self, tag: str, image: torch.Tensor) -> None:
        """Shows `image`, (3, height, width) in uint8, in TensorBoard."""
        self._add_event(summary.image(tag, image, dataformats="CHW"), 0)

    def _add_event(self, event: Summary, images_seen: int) -> None:
        def write() -> None:
            if self._events is None:
                self._events = self._open_events()
            self._events.add(event, images_seen)

        self._try("TensorBoard", write)

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Calls `write`, and logs when it begins to fail and when it works again."""
        try:
            write()
        except OSError as error:
            if name not in self._failing:
                log.warning("%s: not written (%s); training goes on without these records. Free space", name, error)
            self._failing.add(name)
        else:
            if name in self._failing:
                log.warning("%s: written again; the records in between are missing", name)
            self._failing.discard(name)

    def _write_summary(self) -> None:
        columns = ["epoch", *dict.fromkeys(key for row in self.epochs for key in row if key not in ("kind", "epoch"))]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        self._try("summary.csv", lambda: write_text(self._csv, text.getvalue()))


def _scalars(kind: str, metrics: dict[str, float]) -> Summary:
    summaries = [summary.scalar(f"{kind}/{name}", value) for name, value in metrics.items()]
    return Summary(value=[value for each in summaries for value in each.value])


def read_records(folder: Path) -> list[dict]:
    """Returns the records of the run in `folder`, without lines that are no records, such as one cut by a kill."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and set(_HEAD) <= record.keys() and isinstance(record["images_seen"], int):
            records.append(record)
    return records
