"""The progress of a run in steps and epochs, derived from the number of images seen."""

from dataclasses import dataclass

from engine.train_step import TrainState


@dataclass(frozen=True)
class Clock:
    """Converts the number of images seen into steps and epochs."""

    state: TrainState
    num_images: int  # in an epoch
    global_batch_size: int
    last_step_images: int  # global batch size stored in the checkpoint; may differ from this start's
    total_steps: int
    epochs: int
    val_freq: int  # epochs between two evaluations

    @property
    def step(self) -> int:
        """The number of steps made so far."""
        return self.state.images_seen // self.global_batch_size

    @property
    def total_images(self) -> int:
        return self.total_steps * self.global_batch_size

    @property
    def epoch(self) -> int:
        """The number of epochs completed so far. The last step may reach over the end of the last one."""
        return min(self.state.images_seen // self.num_images, self.epochs)

    @property
    def epoch_ended(self) -> bool:
        """Whether the step that was just made completed an epoch."""
        return self.epoch > (self.state.images_seen - self.global_batch_size) // self.num_images

    @property
    def eval_due(self) -> bool:
        """Whether the epoch that has ended is to be evaluated. The last one always is."""
        return self.epoch % self.val_freq == 0 or self.epoch == self.epochs

    @property
    def eval_pending(self) -> bool:
        """Whether this start begins with an epoch that is complete except for its evaluation and its record."""
        ended = self.epoch > (self.state.images_seen - self.last_step_images) // self.num_images
        return ended and self.state.epoch_sums.get("steps", 0) > 0

    @property
    def complete(self) -> bool:
        return self.state.images_seen >= self.total_images and not self.eval_pending
