"""Ends this process at SIGINT (Ctrl-C): at once while there is nothing to save, else at the second one.

Python runs signal handlers in the main thread, and only between two instructions: not while it waits for another rank,
for a worker, or for a library to load. So here a thread answers, which reads the numbers of the signals from a pipe
into which Python's handler in C writes them. Imports nothing slow: `main.py` installs this before its other imports.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_EXIT_CODE = 130  # utils.errors.ExitCode.INTERRUPTED
_LOG_SECONDS = 1.0  # a log file on a dead file system must not keep the process


class _Interrupts:
    """The state of this process: how many signals came, and what the first one does."""

    def __init__(self) -> None:
        self.received = 0
        self.on_first: Callable[[], None] | None = None  # None: the first signal ends the process too
        self.log: Callable[[str], object] | None = None
        self._report = threading.Lock()
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, _do_nothing)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()

    def claim_report(self) -> bool:
        return self._report.acquire(blocking=False)

    def _watch(self) -> None:
        while True:
            for number in os.read(self._reading, 64):
                # torchrun passes a second Ctrl-C on as SIGTERM.
                if number == signal.SIGINT or (number == signal.SIGTERM and self.received):
                    self._answer()

    def _answer(self) -> None:
        self.received += 1
        on_first = self.on_first
        if on_first is None:
            self._end("interrupted")
        elif self.received > 1:
            self._end("interrupted again: ended without waiting for a save")
        else:
            on_first()

    def _end(self, text: str) -> None:
        """Ends the process. Workers end with it, see utils/orphans.py."""
        try:
            report = self.claim_report()
            if report and os.environ.get("RANK", "0") == "0":
                os.write(2, f"{text}\n".encode())
            if report and self.log is not None:
                logging = threading.Thread(target=self.log, args=(text,), daemon=True)
                logging.start()
                logging.join(_LOG_SECONDS)
        finally:
            os._exit(_EXIT_CODE)


_interrupts: _Interrupts | None = None


def install() -> None:
    """From now on SIGINT ends this process, with one line and code 130. To be called once, by the main thread.

    A shell that starts a process in the background of a script has it ignore SIGINT: that stays so.
    """
    global _interrupts
    if _interrupts is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _interrupts = _Interrupts()
        os.register_at_fork(after_in_child=_forget)


def defer(on_first: Callable[[], None] | None) -> None:
    """From now on the first SIGINT calls `on_first` in another thread, and a further one ends this process.

    With None the first one ends it again. Without `install` SIGINT raises KeyboardInterrupt as usual.
    """
    if _interrupts is not None:
        _interrupts.on_first = on_first


def log_with(log: Callable[[str], object]) -> None:
    """Has `log` called with the reason before the process ends."""
    if _interrupts is not None:
        _interrupts.log = log


def received() -> bool:
    """Returns whether SIGINT reached this process."""
    return _interrupts is not None and _interrupts.received > 0


def claim_report() -> bool:
    """Returns whether the caller is the first that is going to say that this process was interrupted."""
    return _interrupts is None or _interrupts.claim_report()


def _forget() -> None:
    """Keeps the signals of a forked process from this one's pipe."""
    global _interrupts
    signal.set_wakeup_fd(-1)
    _interrupts = None


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
