"""How far a run is and when it will be done: a bar on a terminal, plain lines elsewhere."""

import logging
import resource
import sys
import time

import torch
from tqdm import tqdm

from utils.tracking.logger import FILE_ONLY

log = logging.getLogger(__name__)


class Progress:
    """Says how a run goes on. `total` and `done` are counted in images."""

    def __init__(self, total: int, done: int, epochs: int, epoch_samples: int):
        self.total = total
        self.epochs = epochs
        self.epoch_samples = epoch_samples
        self._begun = time.time()
        self._begun_at = done
        self._bar = None
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                file=sys.stdout,
                dynamic_ncols=True,
                leave=False,
                bar_format="|{bar:20}| {desc}",
            )

    def say(self, done: int, figures: dict[str, float]) -> None:
        """Shows `figures` of the last few updates, the epoch, and the wall-clock time of the end of the whole run."""
        epoch = f"epoch {min(done / self.epoch_samples, self.epochs):.2f}/{self.epochs}"
        text = (
            f"loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  grad {figures['grad_norm']:.2f}  "
            f"{figures['images_per_second']:,.0f} img/s  data wait {figures['data_wait']:.1%}  "
            f"{figures['memory_gib']:.1f} GiB"
        )
        if self._bar is None:
            log.info("%s  %s  done %s", epoch, text, self.end(done))
        else:
            log.info("%s  %s  done %s", epoch, text, self.end(done), extra=FILE_ONLY)
            self._bar.set_description_str(f"{epoch}  done {self.end(done)}  {text}", refresh=False)
            self._bar.update(done - self._bar.n)

    def end(self, done: int) -> str:
        """The wall-clock time at which the run will be over, going by its pace since it was started."""
        pace = (time.time() - self._begun) / max(1, done - self._begun_at)  # seconds an image, evaluation included
        return time.strftime("%a %d %b %H:%M", time.localtime(time.time() + pace * max(0, self.total - done)))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: the GPU's where there is one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
