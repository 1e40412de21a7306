"""Checks that hold for main.py with any input: documented exit codes, one message, no traceback, no foreign code."""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tests._forked import Outcome, forked
from tests._tiny import run_main

CODES = (0, 2, 3)  # success; user error; training diverged
TIMEOUT = 60.0  # seconds
MEMORY = 6 << 30  # bytes per case; the kernel refuses more, as on a machine without more memory

_WAY_OUT = re.compile(
    r"\b(add|allow|better|change|check|choose|copy|continue|correct|did you mean|expected|fewer|fix|give|lists all|"
    r"make|must|name|needs|number|pack|remove|save|shorter|set|stand in|start|store|switch|swap|take|takes|"
    r"this recipe is|use|wait|ways out|write)\b",
    re.IGNORECASE,
)


def run_briefly(argv: Sequence[object], folder: Path) -> Outcome:
    """Runs main.py in a child in `folder`. Training ends after 20 steps; throughput is measured with one step."""

    def call() -> int:
        from engine import throughput, train_step

        os.chdir(folder)
        train_step.train_steps = functools.partial(_first_20, train_step.train_steps)
        throughput.images_per_second = functools.partial(throughput.images_per_second, seconds=0.0, runs=1)
        return run_main(argv)

    return forked(call, TIMEOUT, MEMORY)


def _first_20(train_steps: Callable[..., Iterator], *args: object) -> Iterator:
    return itertools.islice(train_steps(*args), 20)


def find_problem(outcome: Outcome, names: Iterable[object], codes: Sequence[int] = CODES) -> str:
    """Returns the problem or "". An error must name one of `names` (files, keys, flags) and a way out."""
    if outcome.code is None:
        return f"hung: {outcome.output[-500:]}"
    if outcome.executed:
        return f"executed {outcome.executed}"
    if "Traceback" in outcome.output or outcome.code not in codes:
        return f"code {outcome.code}: {outcome.output[-1500:]}"
    if outcome.code != 2:
        return ""
    message = outcome.output[outcome.output.find("error: ") :]
    if not message.startswith("error: "):
        return f"no message: {outcome.output[-500:]}"
    if not any(str(name) in message for name in names):
        return f"names neither file nor key: {message[:500]}"
    if not _WAY_OUT.search(message):
        return f"no way out: {message[:500]}"
    return ""
