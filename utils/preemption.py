"""Being asked to stop: a scheduler's SIGTERM or SIGUSR1 to any one process, on which all processes agree."""

import signal

import torch
import torch.distributed as dist


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into a question that all processes answer alike after each update.

    The answers travel while the next update is computed, so asking costs no waiting; a signal is acted on one update
    later. Between processes they go over gloo, which leaves a GPU's queue alone.
    """

    def __init__(self):
        self._asked = False
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._answer = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether some process was asked before the last call. A collective call, once for each update."""
        if self._group is None:
            return self._asked
        if self._answer is not None:
            self._answer.wait()
            if self._flag.item():
                return True
        self._flag = torch.tensor([int(self._asked)], dtype=torch.int32)
        self._answer = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return False

    def close(self) -> None:
        """Gives the signals back and waits for the last answer."""
        if self._answer is not None and not self._flag.item():
            self._answer.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
