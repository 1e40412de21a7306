"""A step in a process of its own, which the processes of other steps share nothing with but the machine."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

Step = Callable[[], object]

_step: Step  # of a process that an `Apart` started


class SubprocessStep:
    """Builds a step in a new process, and runs it there when called.

    What building it sets for the whole process, such as what becomes of freed memory, is then not given to others.

    Args:
        begin: called there with `arguments`, which can be pickled; gives the step, and what is to be known of it here.

    Attributes:
        known: that.
    """

    def __init__(self, begin: Callable[..., tuple[Step, object]], *arguments: object):
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self.known = self._process.submit(_begin, begin, arguments).result()
        except BaseException:
            self.close()  # what it holds of the machine is for others now
            raise

    def __call__(self) -> None:
        self._process.submit(_run).result()

    def close(self) -> None:
        self._process.shutdown()


def _begin(begin: Callable[..., tuple[Step, object]], arguments: tuple) -> object:
    global _step
    _step, known = begin(*arguments)
    return known


def _run() -> None:
    _step()
