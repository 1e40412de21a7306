"""engine/clock.py: which epochs have ended, are evaluated, and still have to be."""

import pytest

from engine.clock import Clock
from engine.train_step import TrainState


def clock(images_seen: int, steps: int = 1, **values: int) -> Clock:
    """A run over epochs of 32 images; `steps` since the last epoch that was evaluated and recorded."""
    state = TrainState(images_seen=images_seen, epoch_sums={"steps": steps} if steps else {})
    numbers = {"num_images": 32, "global_batch_size": 4, "last_step_images": 4, "total_steps": 40, "epochs": 5}
    return Clock(state=state, **({"val_freq": 1} | numbers | values))


def test_eval_due_every_val_freq_epochs_and_at_the_last_one():
    for val_freq, expected in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])):
        assert [n for n in range(1, 6) if clock(32 * n, val_freq=val_freq).eval_due] == expected


@pytest.mark.parametrize(
    ("images_seen", "steps", "pending"), [(0, 0, False), (28, 7, False), (32, 8, True), (32, 0, False), (36, 1, False)]
)
def test_eval_pending_from_the_end_of_an_epoch_to_its_record(images_seen, steps, pending):
    assert clock(images_seen, steps).eval_pending == pending


def test_eval_pending_asks_for_the_step_that_was_made_not_for_the_next_one():
    """After 36 images the epoch that ended at 32 has its record, also if the next steps take 12 images."""
    assert not clock(36, global_batch_size=12, last_step_images=4).eval_pending
    assert clock(36, global_batch_size=4, last_step_images=12).eval_pending


def test_complete_after_the_evaluation_of_the_last_epoch():
    assert clock(160, steps=0).complete and not clock(160).complete and not clock(156, steps=0).complete
