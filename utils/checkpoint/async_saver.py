"""Saves checkpoints in the background: the tensors are copied at once, and a thread writes the copy.

The copy takes as long as moving the bytes; serializing, hashing, writing and flushing take ten times that.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from utils.checkpoint.folder import CheckpointFolder
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class _Job:
    contents: dict
    epoch: int | None
    best: bool
    copied: torch.cuda.Event | None  # on a GPU: recorded after the copies were queued


class AsyncCheckpointer:
    """Writes the checkpoints of a run in a thread, one at a time.

    A failed write is logged and training goes on: earlier checkpoints are unharmed and the next save tries again. Only
    the last save of a run must succeed: see `finish`.
    """

    def __init__(self, checkpoints: CheckpointFolder):
        self._checkpoints = checkpoints
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._pending_best: _Job | None = None  # the best checkpoint so far, if its write failed
        self._error: UserError | None = None

    def save(self, contents: dict, epoch: int | None = None, best: bool = False) -> None:
        """Copies `contents` and starts to write them; the arguments are those of `CheckpointFolder.save`.

        Waits for the previous write if it is still under way. On a GPU it waits for nothing else: the copy is queued
        before any later change of the tensors.
        """
        self.wait()
        copy = self._copy(contents, ())
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()
        if best:
            self._pending_best = None  # superseded
        self._writing = self._writer.submit(self._write, _Job(copy, epoch, best, copied))

    def wait(self) -> None:
        """Waits until nothing is being written. Processes may be forked afterwards: the thread holds no lock then."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        """Waits for the last write.

        Raises:
            UserError: it failed, so the run's last state is not on the disk.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits for a write that is under way, and ends the thread."""
        self._writer.shutdown()

    def _write(self, job: _Job) -> None:
        if job.copied is not None:
            job.copied.synchronize()
        try:
            if self._pending_best is not None:
                self._checkpoints.save(self._pending_best.contents, best=True)
                self._pending_best = None
            self._checkpoints.save(job.contents, job.epoch, job.best)
            self._error = None
        except UserError as error:
            self._error = error
            if job.best:
                self._pending_best, self._buffers = job, {}  # the next save must not overwrite its tensors
            log.warning("%s. Training goes on, and the next save tries again", error)

    def _copy(self, value: Any, key_path: tuple) -> Any:
        """Copies `value` with every tensor moved to the CPU, into buffers that all saves share."""
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(key_path)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._buffers[key_path] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(each, (*key_path, key)) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(each, (*key_path, i)) for i, each in enumerate(value))
        return value
