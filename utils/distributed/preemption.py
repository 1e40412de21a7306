"""Being asked to stop: a scheduler's SIGTERM or SIGUSR1 to any one process, on which all processes agree."""

import signal
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


class PreemptionHandler:
    """Turns SIGTERM and SIGUSR1 into a question that all processes answer alike after each update.

    The answers travel while the next update is computed, so asking costs no waiting; a signal is acted on one update
    later. Between processes they go over gloo, which leaves a GPU's queue alone. Once agreed on, a stop stays so.
    """

    def __init__(self, timeout: int):
        """`timeout`: seconds that a process waits for the answers of the others. A collective call."""
        waiting = timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=waiting) if dist.is_initialized() else None
        self._asked = self._agreed = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._answer = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: object) -> None:
        self._asked = True

    def should_stop(self) -> bool:
        """Whether some process was asked before the last call. A collective call, as often on every process."""
        if self._group is None:
            return self._asked
        self._hear()
        if not self._agreed:
            self._flag = torch.tensor([int(self._asked)], dtype=torch.int32)
            self._answer = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return self._agreed

    def should_stop_now(self) -> bool:
        """Whether some process was asked by now; waits for the others. A collective call."""
        return self.should_stop() or self.should_stop()

    def iterate_until_stop(self, items: Iterable[Item], most: int) -> Iterator[Item]:
        """`items`, cut short by a stop. Collective: `most` is the largest number of them that any process has."""
        rest = iter(items)
        for _ in range(most):
            if self.should_stop():
                return
            for item in rest:
                yield item
                break

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self) -> None:
        if self._answer is not None:
            self._answer.wait()
            self._agreed = bool(self._flag.item())
            self._answer = None
