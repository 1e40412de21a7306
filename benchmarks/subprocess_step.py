"""Runs a step in a process of its own, so that it shares no process-wide settings with other steps."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Generic, TypeVar

from benchmarks.timing import Step

Info = TypeVar("Info")

_step: Step  # set in the process that a SubprocessStep started


class SubprocessStep(Generic[Info]):
    """Builds a step in a new process, and runs it there when called.

    Process-wide settings that building makes, such as malloc's, do not affect other candidates.

    Args:
        start: called in the new process with `arguments`, which must be picklable; returns the step and `info`.

    Attributes:
        info: the second value that `start` returned.
    """

    def __init__(self, start: Callable[..., tuple[Step, Info]], *arguments: object):
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self.info: Info = self._process.submit(_start, start, arguments).result()
        except BaseException:
            self.close()  # frees its memory for the other candidates
            raise

    def __call__(self) -> None:
        self._process.submit(_run).result()

    def close(self) -> None:
        self._process.shutdown()


def _start(start: Callable[..., tuple[Step, Info]], arguments: tuple) -> Info:
    global _step
    _step, info = start(*arguments)
    return info


def _run() -> None:
    _step()
