"""Writes TensorBoard's event files synchronously, so that an error is raised where it happens.

`torch.utils.tensorboard.SummaryWriter` writes from its own thread. A full disk ends that thread with a traceback, and a
half-written record hides all records after it.
"""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from utils.files import append

_PREFIX = "events.out.tfevents."


class TensorBoardFile:
    """A new event file in `folder`."""

    def __init__(self, folder: Path, purge_from: int | None = None):
        """Creates the file.

        Args:
            purge_from: TensorBoard hides the points of earlier files from this one on.

        Raises:
            OSError: the file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: the newest must come last even if the clock went back.
        stamps = [int(path.name[len(_PREFIX) :].split(".")[0]) for path in folder.glob(f"{_PREFIX}[0-9]*.*")]
        stamp = max(int(time.time()), *(each + 1 for each in stamps), 0)
        self._path = folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=purge_from, session_log=start))

    def add(self, summary: Summary, images_seen: int) -> None:
        """Appends `summary`, with `images_seen` as its step. Raises OSError; the file is then unchanged."""
        self._append(Event(wall_time=time.time(), step=images_seen, summary=summary))

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self._path, record.getvalue())
