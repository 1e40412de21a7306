"""Runs a step in a process of its own, so that it shares no process-wide settings with other steps."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.timing import Step

_step: Step  # set in the process that a SubprocessStep started


class SubprocessStep:
    """Builds a step in a new process, and runs it there when called.

    Process-wide settings that building makes, such as malloc's, do not affect other candidates.

    Args:
        start: called in the new process with `arguments`, which must be picklable; returns the step and `info`.

    Attributes:
        info: the second value that `start` returned.
    """

    def __init__(self, start: Callable[..., tuple[Step, object]], *arguments: object):
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self.info = self._process.submit(_start, start, arguments).result()
        except BaseException:
            self.close()  # frees its memory for the other candidates
            raise

    def __call__(self) -> None:
        self._process.submit(_run).result()

    def close(self) -> None:
        self._process.shutdown()


def _start(start: Callable[..., tuple[Step, object]], arguments: tuple) -> object:
    global _step
    _step, info = start(*arguments)
    return info


def _run() -> None:
    _step()
