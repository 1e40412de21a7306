"""The one set-up of logging: rank 0 speaks on the terminal and into the run's log file, the others only of errors."""

import logging
import sys
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


def set_up(rank: int) -> None:
    """Called once, by `main`, before anything is logged."""
    terminal = _Terminal(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal], force=True)
    logging.captureWarnings(True)


def add_file(path: Path) -> None:
    """Adds to the run's log file, so that a resumed run goes on in the same text."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
