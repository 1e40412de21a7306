"""Comparing speeds on a machine whose speed drifts: the candidates take turns, and ratios are taken turn by turn."""

import statistics
import time
from collections.abc import Callable

import torch


def take_turns(
    steps: dict[str, Callable[[], object]], images: int, device: torch.device, seconds: float, turns: int
) -> dict[str, list[float]]:
    """Images per second of each of `steps`, which all handle `images` of them, in each of `turns` turns.

    In a turn every candidate runs for about `seconds`; the order is turned round from turn to turn.
    """

    def timed(step: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times = {}
    for name, step in steps.items():
        timed(step, 2)  # warm-up
        times[name] = max(1, round(seconds / timed(step, 1)))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            rates[name].append(times[name] * images / timed(steps[name], times[name]))
    return rates


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast `name` is as `other`: the median over the turns."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))
