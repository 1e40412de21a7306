"""Saving beside training: a consistent copy at once, the writing in the background.

Copying a tensor costs what moving its bytes costs; to serialise, checksum, write and flush them takes ten times that.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from utils.checkpoint.io import CheckpointFolder
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class _Job:
    contents: dict
    epoch: int | None
    best: bool
    copied: torch.cuda.Event | None  # when the copy is complete, where a GPU makes it


class AsyncCheckpointer:
    """Writes the checkpoints of a run in a thread, one at a time.

    A write that fails is said at once and training goes on: the earlier checkpoints are unharmed and the next save
    tries again. The last one of a run must succeed: see `finish`.
    """

    def __init__(self, checkpoints: CheckpointFolder):
        self._checkpoints = checkpoints
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._pending_best: _Job | None = None  # the best so far, where it could not be written
        self._error: UserError | None = None

    def save(self, contents: dict, epoch: int | None = None, best: bool = False) -> None:
        """Copies `contents` as they are now, and begins to write them as `CheckpointFolder.save` does.

        Waits for the write before this one, if that is still under way. On a GPU nothing else is waited for: the copy
        is queued before whatever changes the tensors next.
        """
        self.wait()
        copy = self._copied(contents, ())
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()
        if best:
            self._pending_best = None  # what was to be `best.pth` is no longer the best
        self._writing = self._writer.submit(self._write, _Job(copy, epoch, best, copied))

    def wait(self) -> None:
        """Returns when nothing is being written. Afterwards is the time to start processes: no lock is held."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        """Waits for the last write.

        Raises:
            UserError: it failed, so that the run's last state is not on the disk.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Lets a write that is under way come to its end."""
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
                self._pending_best, self._buffers = job, {}  # its tensors are its own from now on
            log.warning("%s. Training goes on, and the next save tries again", error)

    def _copied(self, value: object, place: tuple) -> object:
        """`value` with every tensor in it copied to the CPU, into memory that is used again and again."""
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._buffers[place] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copied(each, (*place, key)) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(each, (*place, i)) for i, each in enumerate(value))
        return value
