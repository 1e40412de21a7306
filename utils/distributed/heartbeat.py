"""Who of a run's processes is still there: each says so every few seconds, and when one is lost the others name it."""

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
# A process whose pulse stands still for so long, while others wait for it, is gone or stopped.
SILENCE_SECONDS = 6 * BEAT_SECONDS
_PROJECT = str(REPO_ROOT)


class Heartbeat:
    """A thread that writes what this process does into the store of the process group.

    It beats as long as the interpreter runs: the pulse of a process that hangs in one place goes on, and says where
    that is; the pulse of one that was killed or stopped, or whose machine is gone, stands still.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        """Has written its first beat when it returns."""
        self._store = dist.PrefixStore("pulse", store.clone())
        self._rank = rank
        self._world_size = world_size
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._beats = 0
        self._left: str | None = None
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self, why: str) -> None:
        """Says that this process leaves the run, and why ("" for: because another is lost); the pulse ends."""
        self._left = why
        self._stop.set()
        self._thread.join()
        try:
            self._write()
        except RuntimeError:
            return  # the store is gone: there is nobody left to read it

    def describe_lost_ranks(self) -> str:
        """A sentence about those who are missing, to be asked when waiting for them has failed.

        Looks on until all others have told why they leave or fell silent, or for `SILENCE_SECONDS`.
        """
        self._left = ""
        try:
            self._write()
            first, until = self._read(), time.monotonic() + SILENCE_SECONDS
            while time.monotonic() < until:
                now = self._read()
                if all(each["left"] is not None for each in now):
                    break
                time.sleep(BEAT_SECONDS / 4)
        except RuntimeError:
            return "the process that kept the list of processes (torchrun, or rank 0) is gone"
        return _describe(first, now)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._write()
            except RuntimeError:
                return  # the store is gone, and with it the process that kept it: the next collective call fails

    def _write(self) -> None:
        self._beats += 1
        beat = {"who": self._who, "beats": self._beats, "at": self._place(), "left": self._left}
        self._store.set(str(self._rank), json.dumps(beat))

    def _read(self) -> list[dict]:
        ranks = [str(rank) for rank in range(self._world_size)]
        return [json.loads(value) for value in self._store.multi_get(ranks)]

    def _place(self) -> str:
        """Where the main thread stands: the innermost line of this project."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).relative_to(_PROJECT)}:{frame.f_lineno}" if frame else "elsewhere"


def _is_ours(file: str) -> bool:
    return file.startswith(_PROJECT) and file != __file__ and "site-packages" not in file


def _describe(first: list[dict], now: list[dict]) -> str:
    """What two looks at all pulses tell, the second `SILENCE_SECONDS` after the first."""
    ended = [f"rank {rank} ({beat['who']}) ended: {beat['left']}" for rank, beat in enumerate(now) if beat["left"]]
    waiting = [(rank, beat) for rank, beat in enumerate(now) if beat["left"] is None]
    silent = [
        f"rank {rank} ({beat['who']}) was killed or stopped, or its machine cannot be reached"
        for rank, beat in waiting
        if beat["beats"] == first[rank]["beats"]
    ]
    hung = [f"rank {rank} ({beat['who']}) hangs at {beat['at']}" for rank, beat in waiting]
    return "; ".join(ended or silent or hung) or "the connection between the processes broke"
