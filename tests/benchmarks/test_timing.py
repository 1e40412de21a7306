"""benchmarks/timing.py: order of turns, medians, models that do not fit in memory."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks import timing
from benchmarks.timing import InferenceTimer
from engine import throughput
from utils.errors import UserError

CPU = torch.device("cpu")


def test_every_second_round_is_reversed():
    order: list[str] = []
    count = itertools.count()

    def turn(name: str) -> int:
        order.append(name)
        return next(count)

    results = timing.interleave({name: lambda name=name: turn(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert results == {"a": [0, 5, 6], "b": [1, 4, 7], "c": [2, 3, 8]}


def test_compare_steps_calibrates_each_step_once(monkeypatch: pytest.MonkeyPatch):
    """Steps of 0.1 and 0.2 s: 20 and 10 calls per turn of 2 s, after three calls for warm-up."""
    calls: list[int] = []

    def seconds_for(step: timing.Step, times: int, device: torch.device) -> float:
        calls.append(times)
        return times * step()

    monkeypatch.setattr(throughput, "seconds_for", seconds_for)
    rates = timing.compare_steps({"a": lambda: 0.1, "b": lambda: 0.2}, 8, CPU, seconds=2, rounds=2)
    assert rates == {"a": pytest.approx([80, 80]), "b": pytest.approx([40, 40])}
    assert calls == [2, 1, 2, 1, 20, 10, 10, 20]


def test_ratios():
    rates = {"a": [2.0, 6.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert timing.ratios(rates, "a", "b") == [2.0, 3.0, 1.0] and timing.median_ratio(rates, "a", "b") == 2.0


def test_compare_leaves_out_models_that_do_not_fit_in_memory():
    attempts: list[str] = []

    def too_large() -> timing.Step:
        attempts.append("large")
        raise torch.OutOfMemoryError("no room")

    timer = InferenceTimer(CPU, 4, 1e-4, rounds=3, amp_dtype="float32")
    rates = timer.compare({"large": too_large, "small": lambda: lambda: None})
    assert rates["large"] is None and rates["small"] > 0 and attempts == ["large"]


def test_inference_step_uses_the_dtype_and_evaluation_mode():
    timer = InferenceTimer(CPU, 2, 0.1, 1, "bfloat16")
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    assert timer.step(model, 4)().dtype == torch.bfloat16 and not model.training
    assert "bfloat16, 2 images at a time" in timer.note


def test_choose_device():
    assert timing.choose_device("cpu") == CPU and timing.device_slug(CPU) == "cpu"
    if not torch.cuda.is_available():
        assert timing.choose_device("auto") == CPU
        with pytest.raises(UserError, match="--device cuda"):
            timing.choose_device("cuda")
