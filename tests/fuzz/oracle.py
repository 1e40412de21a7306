"""What must hold of main.py whatever it is fed: the documented exit code, one message, no traceback, nothing run."""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests._forked import Outcome, forked
from tests._tiny import run_main

CODES = (0, 2, 3)  # done; something the user can mend; training diverged
TIMEOUT = 60.0  # seconds
MEMORY = 6 << 30  # bytes that a case may take: more is answered by the kernel, as on a machine that has no more

_WAY_OUT = re.compile(
    r"\b(add|allow|better|change|check|choose|copy|continue|did you mean|expected|fewer|give|lists all|make|mend|must|"
    r"name|needs|number|pack|remove|save|shorter|set|stand in|start|store|switch|swap|take|takes|this recipe is|use|"
    r"wait|ways out|write)\b",
    re.IGNORECASE,
)


def run_briefly(argv: Sequence[object], folder: Path) -> Outcome:
    """main.py in a child, in `folder`, where training ends after 20 updates and speed is measured in an instant."""

    def call() -> int:
        from engine import train_step

        os.chdir(folder)
        train, measure = train_step.train, train_step.measure
        train_step.train = lambda *args: itertools.islice(train(*args), 20)
        train_step.measure = lambda step, images, device: measure(step, images, device, seconds=0.0, runs=1)
        return run_main(argv)

    return forked(call, TIMEOUT, MEMORY)


def find_problem(outcome: Outcome, names: Iterable[object], codes: Sequence[int] = CODES) -> str:
    """What was wrong, "" for nothing. A refusal must name one of `names` (files, keys, flags) and a way out."""
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
