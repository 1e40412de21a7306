"""Sets up logging: rank 0 logs to the terminal and to the run's log file, other ranks log errors only."""

import logging
import sys
from collections import deque
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

# For messages that the terminal shows in another way, such as a progress bar: `log.info(text, extra=FILE_ONLY)`.
FILE_ONLY = {"file_only": True}

_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Terminal(logging.Handler):
    """Writes to the terminal, above the progress bar if there is one, in color where supported."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = self.format(record)
            color = _COLORS.get(record.levelno)
            tqdm.write(colored(text, color) if color else text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of the pipe is gone; the run and its log file continue
            logging.getLogger().removeHandler(self)


class _Buffer(logging.Handler):
    """Keeps messages from before the log file exists, such as warnings about the configuration."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _File(logging.FileHandler):
    """The log file. A failed write is reported once on the terminal, which shows all messages anyway."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failing:
            self._failing = True
            error = sys.exc_info()[1]
            print(f"{self.baseFilename}: not written ({error}); training goes on. Free space", file=sys.stderr)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # the buffered text still cannot be written; that was reported
            self.stream = None


def set_up(rank: int) -> None:
    """Sets up the terminal handler. `main` calls it once, before anything is logged."""
    terminal = _Terminal(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, _Buffer()], force=True)
    logging.captureWarnings(True)


def add_file(path: Path) -> None:
    """Starts to append to the run's log file, first the messages so far. A resumed run continues the same file."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for buffer in [each for each in root.handlers if isinstance(each, _Buffer)]:
        for record in buffer.records:
            handler.handle(record)
        root.removeHandler(buffer)
    root.addHandler(handler)
