"""Stops a run at the same step on all ranks after a signal to any one of them.

The signals are a scheduler's SIGTERM or SIGUSR1, SIGHUP of a lost connection, and the first SIGINT (Ctrl-C).
"""

import os
import signal
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from utils import interrupt

Item = TypeVar("Item")

_STOP, _INTERRUPT = 1, 2  # what a signal asks for; the larger wins


class PreemptionHandler:
    """Tells all ranks at the same step whether any of them was asked to stop.

    The all-reduce of the flag overlaps the next step, so asking does not wait, and a signal takes effect one step
    later. It uses gloo, which does not touch a GPU's queue. Once the ranks agreed to stop, the answer stays True.
    """

    def __init__(self, timeout: int):
        """A collective call.

        Args:
            timeout: seconds that a rank waits for the flags of the others.
        """
        limit = timedelta(seconds=timeout)
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=limit)
            self._group = cast(dist.ProcessGroup, group)  # not the constant for non-members: every rank is one
        self._signalled = 0  # what signals to this process asked for
        self._agreed = 0  # what all ranks know that some process was asked for
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._reduction: dist.Work | None = None
        signals = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signals.append(signal.SIGHUP)
        self._terminals = [file for file in (1, 2) if os.isatty(file)]
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in signals}

    def defer_interrupts(self) -> None:
        """From now on the first SIGINT asks to stop, too. Until then it ends the process: there is nothing to save."""
        interrupt.defer(lambda: self._ask(_INTERRUPT))

    @property
    def interrupted(self) -> bool:
        """Whether SIGINT asked to stop."""
        return max(self._signalled, self._agreed) == _INTERRUPT

    def should_stop(self, wait: bool = False) -> bool:
        """Whether any rank received a signal before the previous call. A collective call.

        Args:
            wait: include signals up to this call, which waits for the other ranks.
        """
        if wait:
            return self.should_stop() or self.should_stop()
        if self._group is None:
            return self._signalled > 0
        if self._reduction is not None:
            self._reduction.wait()
            self._agreed = int(self._flag.item())
            self._reduction = None
        if not self._agreed:
            self._flag = torch.tensor([self._signalled], dtype=torch.int32)
            self._reduction = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return self._agreed > 0

    def iterate_until_stop(self, items: Iterable[Item], max_items: int) -> Iterator[Item]:
        """Yields `items` until the ranks agree to stop. A collective call.

        Args:
            max_items: the largest number of items on any rank, so that all ranks ask equally often.
        """
        remaining = iter(items)
        for _ in range(max_items):
            if self.should_stop():
                return
            for item in remaining:
                yield item
                break

    def close(self) -> None:
        """Restores the previous signal handlers."""
        interrupt.defer(None)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask(_STOP)
        if number == signal.SIGHUP:
            for terminal in [file for file in self._terminals if not os.isatty(file)]:  # gone: writing would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def _ask(self, what: int) -> None:
        self._signalled = max(self._signalled, what)
