"""The learning rate as a pure function of the number of steps made, so there is nothing to save or restore.

The four schedules and their warm-up give the values of the original Swin code (timm's schedulers counted in steps),
which `tests/test_lr_scheduler.py` checks at every step.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from yacs.config import CfgNode

# The base rate of every recipe is meant for this many images per step (linear scaling rule, Goyal et al. 2017).
REFERENCE_BATCH = 512
# The linear schedule ends at this share of its base rate, as in the original code.
LINEAR_FINAL_SHARE = 0.01


@dataclass(frozen=True)
class Schedule:
    """Learning rates at this run's global batch size, and points in time counted in steps."""

    name: str  # cosine | linear | step | multistep
    base_lr: float
    warmup_lr: float
    min_lr: float  # the end of the cosine
    total_steps: int
    warmup_steps: int
    warmup_prefix: bool = True  # the cosine begins after the warm-up, instead of underneath it
    decay_steps: int = 0  # step: steps between two decays
    decay_rate: float = 0.1  # step
    milestones: tuple[int, ...] = ()  # multistep: steps at which the rate falls
    gamma: float = 0.1  # multistep

    def at(self, step: int) -> float:
        """Returns the learning rate of step number `step`, counted from 0.

        Raises:
            ValueError: unknown schedule name.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + step * (self.base_lr - self.warmup_lr) / self.warmup_steps
        if self.name == "cosine":
            return self._cosine(step)
        if self.name == "linear":
            share = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.base_lr - self.base_lr * (1 - LINEAR_FINAL_SHARE) * share
        if self.name == "step":
            return self.base_lr * self.decay_rate ** (step // self.decay_steps)
        if self.name == "multistep":
            return self.base_lr * self.gamma ** bisect_right(self.milestones, step)
        raise ValueError(f"unknown schedule {self.name!r}: cosine, linear, step or multistep")

    def _cosine(self, step: int) -> float:
        skipped = self.warmup_steps if self.warmup_prefix else 0
        period = max(1, self.total_steps - skipped)
        elapsed = step - skipped
        if elapsed >= period:
            return self.min_lr
        return self.min_lr + 0.5 * (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * elapsed / period))


def steps_in(epochs: float, num_images: int, global_batch_size: int) -> int:
    """Returns the steps after which `epochs` passes over `num_images` images are complete.

    The count is rounded up: the last batch of an epoch reaches over into the next one, so that no image is left out.
    """
    return math.ceil(round(epochs * num_images, 6) / global_batch_size)


def build_schedule(config: CfgNode, num_images: int, global_batch_size: int) -> Schedule:
    """Builds the schedule of a run over `num_images` training images.

    The rates of the config hold for 512 images a step; here they are scaled in proportion to `global_batch_size`.
    """
    train, scheduler = config.TRAIN, config.TRAIN.LR_SCHEDULER
    scale = global_batch_size / REFERENCE_BATCH

    def steps(epochs: float) -> int:
        return steps_in(epochs, num_images, global_batch_size)

    return Schedule(
        name=scheduler.NAME,
        base_lr=train.BASE_LR * scale,
        warmup_lr=train.WARMUP_LR * scale,
        min_lr=train.MIN_LR * scale,
        total_steps=steps(train.EPOCHS),
        warmup_steps=steps(train.WARMUP_EPOCHS),
        warmup_prefix=scheduler.WARMUP_PREFIX,
        decay_steps=max(1, steps(scheduler.DECAY_EPOCHS)),
        decay_rate=scheduler.DECAY_RATE,
        milestones=tuple(steps(epoch) for epoch in scheduler.MULTISTEPS),
        gamma=scheduler.GAMMA,
    )
