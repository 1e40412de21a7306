"""Turns the sums of the training loop into metrics for the terminal, the log, `metrics.jsonl` and TensorBoard."""

import logging
import time
from dataclasses import dataclass, field

import torch

from utils.tracking.metric_writer import MetricWriter
from utils.tracking.progress import Progress, memory_gib

log = logging.getLogger(__name__)


@dataclass
class TrainLogger:
    """Logs the progress of training, on rank 0 only.

    Metrics of steps are means since the last report. Images/s exclude evaluation and saving; the estimated end of the
    run includes them.
    """

    writer: MetricWriter
    progress: Progress
    device: torch.device
    images_seen: int  # at the last report
    wait_seconds: float = 0.0  # total time spent waiting for data, at the last report
    since: float = field(default_factory=time.perf_counter)

    def log_steps(
        self, step: int, images_seen: int, wait_seconds: float, sums: dict[str, float], settings: dict[str, float]
    ) -> None:
        """Logs the steps since the last report.

        Args:
            step: the number of steps so far.
            wait_seconds: total time spent waiting for data.
            sums: `steps`, `finite` (how many of them were), and the sums over these of `loss`, `grad_norm` and others.
            settings: current values such as the learning rate.
        """
        seconds = time.perf_counter() - self.since
        finite = sums["finite"]
        totals = {name: total for name, total in sums.items() if name not in ("steps", "finite")}
        metrics = {
            **{name: total / finite if finite else float("nan") for name, total in totals.items()},
            **settings,
            "images_per_second": (images_seen - self.images_seen) / seconds,
            "data_wait": (wait_seconds - self.wait_seconds) / seconds,
            "memory_gib": memory_gib(self.device),
        }
        self.writer.add("train", step, images_seen, metrics)
        self.progress.show(images_seen, metrics)
        if finite < sums["steps"]:
            log.warning("%d step(s) before step %d were skipped: not finite", sums["steps"] - finite, step)
        self.resume_clock(images_seen, wait_seconds)

    def log_epoch(self, epoch: int, step: int, images_seen: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of an epoch."""
        self.writer.add("epoch", step, images_seen, {"epoch": epoch, **metrics})
        shown = (
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in metrics.items()
        )
        log.info("epoch %d: %s", epoch, "  ".join(shown))

    def resume_clock(self, images_seen: int, wait_seconds: float) -> None:
        """Starts a new interval for images/s, after a report or after work other than training."""
        self.images_seen, self.wait_seconds, self.since = images_seen, wait_seconds, time.perf_counter()

    def close(self) -> None:
        self.progress.close()
