"""The learning rate as a pure function of the number of updates made: nothing to step, save or restore.

The four schedules and their warm-up give the values of the original Swin code (timm's schedulers counted in updates),
which `tests/test_lr_scheduler.py` checks at every update.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

# The base rate of every recipe is meant for this many images per update (linear scaling rule, Goyal et al. 2017).
REFERENCE_BATCH = 512
# The linear schedule ends at this share of its base rate, as in the original code.
LINEAR_FINAL_SHARE = 0.01


@dataclass(frozen=True)
class Schedule:
    """Learning rates per 512 images, and points in time counted in updates."""

    name: str  # cosine | linear | step | multistep
    base_lr: float
    warmup_lr: float
    min_lr: float  # the end of the cosine
    total_updates: int
    warmup_updates: int
    warmup_prefix: bool = True  # the cosine begins after the warm-up, instead of underneath it
    decay_updates: int = 0  # step: updates between two decays
    decay_rate: float = 0.1  # step
    milestones: tuple[int, ...] = ()  # multistep: updates at which the rate falls
    gamma: float = 0.1  # multistep

    def at(self, update: int) -> float:
        """Learning rate of update number `update`, counted from 0.

        Raises:
            ValueError: unknown schedule name.
        """
        if update < self.warmup_updates:
            return self.warmup_lr + update * (self.base_lr - self.warmup_lr) / self.warmup_updates
        if self.name == "cosine":
            return self._cosine(update)
        if self.name == "linear":
            share = (update - self.warmup_updates) / max(1, self.total_updates - self.warmup_updates)
            return self.base_lr - self.base_lr * (1 - LINEAR_FINAL_SHARE) * share
        if self.name == "step":
            return self.base_lr * self.decay_rate ** (update // self.decay_updates)
        if self.name == "multistep":
            return self.base_lr * self.gamma ** bisect_right(self.milestones, update)
        raise ValueError(f"unknown schedule {self.name!r}: cosine, linear, step or multistep")

    def _cosine(self, update: int) -> float:
        skipped = self.warmup_updates if self.warmup_prefix else 0
        period = max(1, self.total_updates - skipped)
        elapsed = update - skipped
        if elapsed >= period:
            return self.min_lr
        return self.min_lr + 0.5 * (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * elapsed / period))


def updates_in(epochs: float, samples: int, global_batch: int) -> int:
    """Updates after which `epochs` passes over `samples` images are complete, at `global_batch` images an update.

    The batches of an epoch's end reach over into the next epoch, so that no image is left out: the count is rounded up.
    """
    return math.ceil(round(epochs * samples, 6) / global_batch)


def build_schedule(config, samples: int, global_batch: int) -> Schedule:
    """The schedule of a run over `samples` training images at `global_batch` images an update.

    The rates of the config hold for 512 images an update and are scaled here, once, in proportion.
    """
    train, scheduler = config.TRAIN, config.TRAIN.LR_SCHEDULER
    scale = global_batch / REFERENCE_BATCH

    def updates(epochs: float) -> int:
        return updates_in(epochs, samples, global_batch)

    return Schedule(
        name=scheduler.NAME,
        base_lr=train.BASE_LR * scale,
        warmup_lr=train.WARMUP_LR * scale,
        min_lr=train.MIN_LR * scale,
        total_updates=updates(train.EPOCHS),
        warmup_updates=updates(train.WARMUP_EPOCHS),
        warmup_prefix=scheduler.WARMUP_PREFIX,
        decay_updates=max(1, updates(scheduler.DECAY_EPOCHS)),
        decay_rate=scheduler.DECAY_RATE,
        milestones=tuple(updates(epoch) for epoch in scheduler.MULTISTEPS),
        gamma=scheduler.GAMMA,
    )
