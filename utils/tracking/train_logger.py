"""Turns what the loop counted into figures for the terminal, the log, `metrics.jsonl` and TensorBoard."""

import logging
import time
from dataclasses import dataclass, field

import torch

from utils.tracking.metric_writer import MetricWriter
from utils.tracking.progress import Progress, memory_gib

log = logging.getLogger(__name__)


@dataclass
class TrainLogger:
    """Says on rank 0 how training goes. The other ranks have none.

    Figures of updates are means since the last report; images/s leave out evaluation and saving, the time at which the
    run will end does not.
    """

    records: MetricWriter
    progress: Progress
    device: torch.device
    samples: int  # the clock at the last report
    waited: float = 0.0  # seconds spent waiting for data up to then
    since: float = field(default_factory=time.perf_counter)

    def updates(
        self, update: int, samples: int, waited: float, sums: dict[str, float], settings: dict[str, float]
    ) -> None:
        """`sums` of the updates since the last report; `settings` are the learning rate, weight decay and the like."""
        seconds = time.perf_counter() - self.since
        finite = sums["finite"]
        figures = {
            "loss": sums["loss"] / finite if finite else float("nan"),
            "grad_norm": sums["grad_norm"] / finite if finite else float("nan"),
            **settings,
            "images_per_second": (samples - self.samples) / seconds,
            "data_wait": (waited - self.waited) / seconds,
            "memory_gib": memory_gib(self.device),
        }
        self.records.add("train", update, samples, figures)
        self.progress.say(samples, figures)
        if finite < sums["updates"]:
            log.warning("%d update(s) before update %d were skipped: not finite", sums["updates"] - finite, update)
        self.resume_clock(samples, waited)

    def epoch(self, epoch: int, update: int, samples: int, figures: dict[str, float]) -> None:
        self.records.add("epoch", update, samples, {"epoch": epoch, **figures})
        shown = (
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in figures.items()
        )
        log.info("epoch %d: %s", epoch, "  ".join(shown))

    def resume_clock(self, samples: int, waited: float) -> None:
        """Begins a new interval of training, after a report or after something that was not training."""
        self.samples, self.waited, self.since = samples, waited, time.perf_counter()

    def close(self) -> None:
        self.progress.close()
