"""Measuring images per second."""

import torch

from engine.throughput import images_per_second


def test_the_rate_is_positive_and_the_step_is_warmed_up():
    calls = []
    device = torch.device("cpu")
    rate = images_per_second(lambda: calls.append(sum(range(1000))), images=10, device=device, seconds=0.01, runs=3)
    assert rate > 0 and len(calls) >= 6
