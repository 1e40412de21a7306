"""Memory that is not there: the run must end with code 2 and say which flags need less, having changed nothing.

Places: a real limit of the process (RLIMIT_AS) that a large batch runs into; an allocation that no machine can serve,
in an update, in an evaluation, and in a loading process; and a GPU's error, raised by hand. The other process, where
there are two, must end with code 4 and name this one; and the same command without the fault must come to its end.
"""

import random
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch

import data.loader.loader
from engine import train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Place, adopt_orphans, last

PLACES = ("limit", "update", "evaluation", "loading process", "GPU")
WAYS_OUT = ("out of memory", "--accumulation-steps", "--batch-size", "--use-checkpoint")


def run(count: int, seed: int) -> Report:
    """`count` runs, at each place in turn."""
    tally = Report("out of memory", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for trial in range(count):
            draws, where = random.Random(f"{seed}/{trial}"), PLACES[trial % len(PLACES)]
            wrong = _trial(place, f"trial{trial}", where, draws.choice((1, 2)), draws)
            tally.add(where, not wrong, f"trial {trial}, {where}: {wrong}")
    return tally


def _trial(place: Place, tag: str, where: str, processes: int, draws: random.Random) -> str:
    victim, workers = draws.randrange(processes), int(where == "loading process")
    batch = 512 if where == "limit" else BATCH // processes
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_STEPS", 1, "TIMEOUT", 60]
    start = place.start(
        tag, *opts, processes=processes, batch=batch, inject=_starving(where, draws.randint(1, 6), victim), agent=True
    )
    codes = start.wait()
    expected = [2 if rank == victim else 4 for rank in range(processes)]
    if codes != expected:
        return f"codes {codes}, not {expected}:\n{start.said[-3000:]}"
    missing = [words for words in WAYS_OUT if words not in start.said]
    if processes > 1 and f"rank {victim} (process {start.pids[victim]}" not in start.said:
        missing.append("the rank")
    if missing or "Traceback" in start.said:
        return f"says nothing of {missing}, or has a traceback:\n{start.said[-3000:]}"
    if where == "limit":
        return ""  # nothing to continue: no update was made
    again = place.start(tag, *opts, processes=processes, batch=batch)
    if any(again.wait()) or last(place, tag)["stream"]["global_batch"] != BATCH:
        return f"started again:\n{again.said[-3000:]}"
    return ""


def _starving(where: str, at: int, victim: int) -> Inject:
    """Lets the rank `victim` run out of memory at its update number `at`, or in its second evaluation."""

    def inject(rank: int) -> None:
        if rank != victim:
            return
        update, evaluate, make = train_step._update, train_step.evaluate, data.loader.loader.TrainSamples.make
        seen = {"update": 0, "evaluation": 0, "loading process": 0}

        def too_much(place: str, number: int) -> None:
            seen[place] += 1
            if where == "limit" and place == "update":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + (8 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            if seen[place] != number:
                return
            if where == "GPU" and place == "update":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about the device.")
            if where == place:
                np.empty(1 << 50) if place == "loading process" else torch.empty(1 << 50)

        def starved_update(*args):
            too_much("update", at)
            return update(*args)

        def starved_evaluate(*args):
            too_much("evaluation", 2)
            return evaluate(*args)

        def starved_make(*args):
            too_much("loading process", 3 * at)
            return make(*args)

        train_step._update, train_step.evaluate, data.loader.loader.TrainSamples.make = (
            starved_update,
            starved_evaluate,
            starved_make,
        )

    return inject
