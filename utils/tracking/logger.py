"""The one set-up of logging: rank 0 speaks on the terminal and into the run's log file, the others only of errors."""

import logging
import sys
from collections import deque
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

# For what the terminal shows in another way, such as a progress bar: `log.info(text, extra=FILE_ONLY)`.
FILE_ONLY = {"file_only": True}

_COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Terminal(logging.Handler):
    """Writes above a progress bar, if there is one, in colour where the terminal shows it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = self.format(record)
            colour = _COLOURS.get(record.levelno)
            tqdm.write(colored(text, colour) if colour else text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read along has gone; the run and its log file go on
            logging.getLogger().removeHandler(self)


class _Held(logging.Handler):
    """Keeps what is said before there is a log file, such as warnings about the configuration."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _File(logging.FileHandler):
    """A log file that cannot be written is said once on the terminal, where everything else is said too."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._lacking = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._lacking:
            self._lacking = True
            why = sys.exc_info()[1]
            print(f"{self.baseFilename}: not written ({why}); training goes on. Make room", file=sys.stderr)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written before cannot be now; that was said
            self.stream = None


def set_up(rank: int) -> None:
    """Called once, by `main`, before anything is logged."""
    terminal = _Terminal(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, _Held()], force=True)
    logging.captureWarnings(True)


def add_file(path: Path) -> None:
    """Adds to the run's log file, so that a resumed run goes on in the same text; first what was said until now."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for held in [each for each in root.handlers if isinstance(each, _Held)]:
        for record in held.records:
            handler.handle(record)
        root.removeHandler(held)
    root.addHandler(handler)
