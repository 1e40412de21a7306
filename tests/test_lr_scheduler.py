"""The schedules against the classes that the original Swin code uses, at every update."""

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.step_lr import StepLRScheduler
from yacs.config import CfgNode

from lr_scheduler import Schedule, build_schedule, steps_in

TOTAL, WARMUP, BASE, START, MIN = 300, 20, 1e-3, 1e-6, 1e-5


def values_of(scheduler_class, **kwargs) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = scheduler_class(optimizer, t_in_epochs=False, warmup_lr_init=START, **kwargs)
    values = []
    for update in range(TOTAL + 10):
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def schedule(name: str, warmup: int = WARMUP, **kwargs) -> list[float]:
    built = Schedule(name, BASE, START, MIN, TOTAL, warmup, **kwargs)
    return [built.at(update) for update in range(TOTAL + 10)]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("prefix", [True, False])
def test_cosine_is_timms(prefix: bool, warmup: int):
    reference = values_of(
        CosineLRScheduler,
        t_initial=TOTAL - warmup if prefix else TOTAL,
        lr_min=MIN,
        warmup_t=warmup,
        cycle_limit=1,
        warmup_prefix=prefix,
    )
    assert schedule("cosine", warmup, warmup_prefix=prefix) == pytest.approx(reference, rel=1e-12)


def test_step_is_timms():
    # In the timm of the original code the warm-up runs underneath the steps, which is today's warmup_prefix=False.
    reference = values_of(StepLRScheduler, decay_t=30, decay_rate=0.1, warmup_t=WARMUP, warmup_prefix=False)
    assert schedule("step", decay_steps=30, decay_rate=0.1) == pytest.approx(reference, rel=1e-12)


def test_multistep_is_timms():
    # The original's class lowers the rate at update m, timm's one update before it: the milestones are given later.
    milestones = {"decay_t": [91, 201], "decay_rate": 0.3}
    reference = values_of(MultiStepLRScheduler, **milestones, warmup_t=WARMUP, warmup_prefix=False)
    ours = schedule("multistep", milestones=(90, 200), gamma=0.3)
    assert ours == pytest.approx(reference, rel=1e-12)
    assert ours[89] == BASE and ours[90] == pytest.approx(BASE * 0.3)


def test_linear_falls_to_a_hundredth():
    values = schedule("linear")
    assert values[0] == START and values[WARMUP] == pytest.approx(BASE)
    assert values[TOTAL] == pytest.approx(BASE / 100)
    falls = [a - b for a, b in zip(values[WARMUP:TOTAL], values[WARMUP + 1 : TOTAL + 1], strict=True)]
    assert max(falls) == pytest.approx(min(falls), rel=1e-9)


def test_unknown_name():
    with pytest.raises(ValueError, match="cosine, linear, step or multistep"):
        Schedule("polynomial", BASE, START, MIN, TOTAL, 0).at(1)


def test_updates_round_up_so_that_no_image_is_left_out():
    assert steps_in(1, 1000, 100) == 10
    assert steps_in(1, 1001, 100) == 11
    assert steps_in(300, 1_281_167, 1024) == 375_342
    assert steps_in(1, 50, 1024) == 1


def test_rates_are_scaled_once_with_the_global_batch():
    config = CfgNode(
        {
            "TRAIN": {
                "EPOCHS": 300,
                "WARMUP_EPOCHS": 20,
                "BASE_LR": 5e-4,
                "WARMUP_LR": 5e-7,
                "MIN_LR": 5e-6,
                "LR_SCHEDULER": {
                    "NAME": "cosine",
                    "WARMUP_PREFIX": True,
                    "DECAY_EPOCHS": 30,
                    "DECAY_RATE": 0.1,
                    "MULTISTEPS": [],
                    "GAMMA": 0.1,
                },
            }
        }
    )
    built = build_schedule(config, num_images=1_281_167, global_batch_size=1024)
    assert (built.base_lr, built.warmup_lr, built.min_lr) == (1e-3, 1e-6, 1e-5)
    assert built.total_steps == 375_342
    assert built.warmup_steps == 25_023
    assert config.TRAIN.BASE_LR == 5e-4
