"""Shows the progress of a run and its estimated end: a bar on a terminal, plain lines elsewhere."""

import logging
import resource
import sys
import time

import torch
from tqdm import tqdm

from utils.tracking.logger import FILE_ONLY

log = logging.getLogger(__name__)


class Progress:
    """The progress of a run, counted in images."""

    def __init__(self, total_images: int, images_seen: int, epochs: int, images_per_epoch: int):
        """`images_seen` is the number of images at which this start continues the run."""
        self.total_images = total_images
        self.epochs = epochs
        self.images_per_epoch = images_per_epoch
        self._start_time = time.time()
        self._start_images = images_seen
        self._bar = None
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=total_images,
                initial=images_seen,
                file=sys.stdout,
                dynamic_ncols=True,
                leave=False,
                bar_format="|{bar:20}| {desc}",
            )

    def show(self, images_seen: int, metrics: dict[str, float]) -> None:
        """Shows `metrics` of the last steps, the epoch, and the time at which the whole run will end."""
        epoch = f"epoch {min(images_seen / self.images_per_epoch, self.epochs):.2f}/{self.epochs}"
        end = self.estimated_end(images_seen)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.2f}  "
            f"{metrics['images_per_second']:,.0f} img/s  data wait {metrics['data_wait']:.1%}  "
            f"{metrics['memory_gib']:.1f} GiB"
        )
        if self._bar is None:
            log.info("%s  %s  done %s", epoch, text, end)
        else:
            log.info("%s  %s  done %s", epoch, text, end, extra=FILE_ONLY)
            self._bar.set_description_str(f"{epoch}  done {end}  {text}", refresh=False)
            self._bar.update(images_seen - self._bar.n)

    def estimated_end(self, images_seen: int) -> str:
        """Returns the time at which the run will end at its average speed since this start, evaluation included."""
        seconds_per_image = (time.time() - self._start_time) / max(1, images_seen - self._start_images)
        end = time.time() + seconds_per_image * max(0, self.total_images - images_seen)
        return time.strftime("%a %d %b %H:%M", time.localtime(end))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process in GiB: of the GPU if it uses one, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
