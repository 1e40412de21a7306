"""Detects lost ranks: each rank reports to a shared store every second, and the others read who stopped reporting."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from utils.paths import REPO_ROOT

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 6 * BEAT_SECONDS  # a rank without a beat for so long, while others wait for it, is gone or stopped
_PROJECT = str(REPO_ROOT)


class Heartbeat:
    """A thread that writes the state of this process into the store of the process group.

    It beats as long as the interpreter runs. A process that hangs therefore keeps beating and reports the line where it
    hangs; a process that was killed or stopped, or whose machine is gone, stops beating.

    A beat is a dict: `process` (pid and host), `beats` (their number so far), `location` (line of the main thread),
    `exit_reason` (None while the process runs; "" if it leaves because another one is lost).
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        """Writes the first beat before it returns."""
        self._store = dist.PrefixStore("heartbeat", store.clone())
        self._rank = rank
        self._world_size = world_size
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._beats = 0
        self._exit_reason: str | None = None
        self._main_thread = threading.main_thread().ident or 0
        self._stopping = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Reports that this process leaves the run, and why ("" because another one is lost), and ends the thread."""
        self._exit_reason = reason
        self._stopping.set()
        self._thread.join()
        try:
            self._write()
        except RuntimeError:
            return  # the store is gone: no rank is left to read it

    def describe_lost_ranks(self) -> str:
        """Describes the missing ranks; to be called after waiting for them has failed.

        Returns when all ranks have reported why they leave, or after `SILENCE_SECONDS`.
        """
        self._exit_reason = ""
        try:
            self._write()
            first, deadline = self._read(), time.monotonic() + SILENCE_SECONDS
            while time.monotonic() < deadline:
                latest = self._read()
                if all(beat["exit_reason"] is not None for beat in latest):
                    break
                time.sleep(BEAT_SECONDS / 4)
        except RuntimeError:
            return "the process that hosts the store (torchrun, or rank 0) is gone"
        return _describe(first, latest)

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self._write()
            except RuntimeError:
                return  # the process that hosts the store is gone: the next collective call fails

    def _write(self) -> None:
        self._beats += 1
        beat = {
            "process": self._process,
            "beats": self._beats,
            "location": self._location(),
            "exit_reason": self._exit_reason,
        }
        self._store.set(str(self._rank), json.dumps(beat))

    def _read(self) -> list[dict]:
        """The latest beat of every rank."""
        ranks = [str(rank) for rank in range(self._world_size)]
        return [json.loads(value) for value in self._store.multi_get(ranks)]

    def _location(self) -> str:
        """The innermost line of this project that the main thread executes."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).relative_to(_PROJECT)}:{frame.f_lineno}" if frame else "elsewhere"


def _is_ours(file: str) -> bool:
    return file.startswith(_PROJECT) and file != __file__ and "site-packages" not in file


def _describe(first: list[dict], latest: list[dict]) -> str:
    """Describes lost ranks from their beats at two times, `SILENCE_SECONDS` apart."""
    ended = [
        f"rank {rank} ({beat['process']}) ended: {beat['exit_reason']}"
        for rank, beat in enumerate(latest)
        if beat["exit_reason"]
    ]
    running = [(rank, beat) for rank, beat in enumerate(latest) if beat["exit_reason"] is None]
    silent = [
        f"rank {rank} ({beat['process']}) was killed or stopped, or its machine cannot be reached"
        for rank, beat in running
        if beat["beats"] == first[rank]["beats"]
    ]
    hung = [f"rank {rank} ({beat['process']}) hangs at {beat['location']}" for rank, beat in running]
    return "; ".join(ended or silent or hung) or "the connection between the processes broke"
