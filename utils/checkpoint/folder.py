"""The checkpoints of one run: which files there are, which one a resumed run reads, and how many are kept."""

import logging
import re
from pathlib import Path

from utils.checkpoint import digest
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError
from utils.files import TEMPORARY, link_atomically, write_atomically

log = logging.getLogger(__name__)


class CheckpointFolder:
    """The checkpoints of one run: `last.pth`, `best.pth` and `epoch_NNNN.pth`.

    Only the process that holds the run's lock may write. The names of one save are hard links to one file, so that an
    epoch costs one write.
    """

    def __init__(self, folder: Path, keep: int):
        """`keep` is the number of numbered checkpoints that are kept; 0 keeps all."""
        self.folder = folder
        self.keep = keep
        self.last = folder / "last.pth"
        self.best = folder / "best.pth"

    def prepare(self) -> None:
        """Creates the folder and removes the temporary files of a killed process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".*{TEMPORARY}"):
            leftover.unlink()

    def save(self, contents: dict, epoch: int | None = None, best: bool = False) -> None:
        """Writes `last.pth`, and links `epoch_NNNN.pth` and `best.pth` to it as asked.

        `last.pth` is replaced last: after a kill in between, the run continues from the previous `last.pth`, repeats
        the epoch, and sets all names again.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are unharmed.
        """
        numbered = [] if epoch is None else [self.folder / f"epoch_{epoch:04d}.pth"]
        first, *others = [*numbered, *([self.best] if best else []), self.last]
        try:
            write_atomically(first, lambda file: digest.save(contents, file))
            for other in others:
                link_atomically(first, other)
            if self.keep:
                for old in self.numbered()[self.keep :]:
                    old.unlink()
        except (OSError, RuntimeError) as error:  # torch.save wraps a write error in a RuntimeError
            raise UserError(
                f"{first}: could not be written ({_root_cause(error)}). Earlier checkpoints are unharmed; free some "
                "space or choose another --output, and start again"
            ) from error

    @property
    def has_any(self) -> bool:
        return self.last.exists() or self.best.exists() or bool(self.numbered())

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, latest epoch first."""
        found = self.folder.glob("epoch_*.pth")
        return sorted((p for p in found if re.fullmatch(r"epoch_\d+", p.stem)), key=lambda p: -int(p.stem[6:]))

    def newest(self) -> tuple[Path, dict] | None:
        """Returns the newest readable checkpoint and its contents, or None if the folder has no checkpoints.

        1. `last.pth`, if it can be read.
        2. Otherwise, of the first readable numbered one and `best.pth`, the one with the most images seen.

        Raises:
            UserError: there are checkpoints, but none of them can be read.
        """
        others = [self.numbered(), [self.best] if self.best.exists() else []]
        if not self.last.exists():
            if not any(others):
                return None
            log.warning("%s: missing — trying another", self.last)
        elif found := _first_readable([self.last]):
            return found
        readable = [found for paths in others if (found := _first_readable(paths))]
        if not readable:
            raise UserError(f"{self.folder}: none of its checkpoints can be read. Start a new run with another --tag")
        return max(readable, key=lambda found: _images_seen(found[1]))


def _first_readable(paths: list[Path]) -> tuple[Path, dict] | None:
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s — trying another", error)
    return None


def _images_seen(contents: dict) -> int:
    """The progress of the run that saved `contents`; -1 if it does not say."""
    state = contents.get("state")
    images_seen = state.get("images_seen") if isinstance(state, dict) else None
    return images_seen if isinstance(images_seen, int) else -1


def _root_cause(error: BaseException) -> BaseException:
    """The error of the file system under the one that torch.save raises while handling it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
