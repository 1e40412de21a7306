"""Comparing speeds on a machine whose speed drifts: the candidates take turns, and ratios are taken turn by turn."""

import statistics
from collections.abc import Callable

import torch

from engine import seconds_for


def take_turns(
    steps: dict[str, Callable[[], object]], images: int, device: torch.device, seconds: float, turns: int
) -> dict[str, list[float]]:
    """Images per second of each of `steps`, which all handle `images` of them, in each of `turns` turns.

    In a turn every candidate runs for about `seconds`; the order is turned round from turn to turn.
    """
    times = {}
    for name, step in steps.items():
        seconds_for(step, 2, device)  # warm-up
        times[name] = max(1, round(seconds / seconds_for(step, 1, device)))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            rates[name].append(times[name] * images / seconds_for(steps[name], times[name], device))
    return rates


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast `name` is as `other`: the median over the turns."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))
