"""Out of memory: the run must end with code 2, name the flags that need less, and leave earlier results unchanged.

Faults: a limit of the process (RLIMIT_AS) that a large batch exceeds; an impossible allocation in a step, in an
evaluation and in a loader worker; and a GPU's error, raised by hand. With two processes, the other one must end with
code 4 and name this one. The same command without the fault must then finish.
"""

import random
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch

import data.loader.loader
from engine import evaluation, train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Workspace, adopt_orphans, last

FAULTS = ("limit", "step", "evaluation", "loading process", "GPU")
EXPECTED_WORDS = ("out of memory", "--accumulation-steps", "--batch-size", "--use-checkpoint")


def run(count: int, seed: int) -> Report:
    """Tests `count` runs, with each fault in turn."""
    report = Report("out of memory", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        for trial in range(count):
            rng, fault = random.Random(f"{seed}/{trial}"), FAULTS[trial % len(FAULTS)]
            problem = _run_trial(workspace, f"trial{trial}", fault, rng.choice((1, 2)), rng)
            report.add(fault, not problem, f"trial {trial}, {fault}: {problem}")
    return report


def _run_trial(workspace: Workspace, tag: str, fault: str, processes: int, rng: random.Random) -> str:
    victim, workers = rng.randrange(processes), int(fault == "loading process")
    batch = 512 if fault == "limit" else BATCH // processes
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_STEPS", 1, "TIMEOUT", 60]
    start = workspace.start(
        tag, *opts, processes=processes, batch=batch, inject=_inject_fault(fault, rng.randint(1, 6), victim), agent=True
    )
    codes = start.wait()
    expected = [2 if rank == victim else 4 for rank in range(processes)]
    if codes != expected:
        return f"codes {codes}, not {expected}:\n{start.output[-3000:]}"
    missing = [words for words in EXPECTED_WORDS if words not in start.output]
    if processes > 1 and f"rank {victim} (process {start.pids[victim]}" not in start.output:
        missing.append("the rank")
    if missing or "Traceback" in start.output:
        return f"does not mention {missing}, or has a traceback:\n{start.output[-3000:]}"
    if fault == "limit":
        return ""  # no step was made, so there is nothing to continue
    again = workspace.start(tag, *opts, processes=processes, batch=batch)
    if any(again.wait()) or last(workspace, tag)["train_data"]["global_batch_size"] != BATCH:
        return f"started again:\n{again.output[-3000:]}"
    return ""


def _inject_fault(fault: str, at: int, victim: int) -> Inject:
    """Lets the rank `victim` run out of memory at its step number `at`, or in its second evaluation."""

    def inject(rank: int) -> None:
        if rank != victim:
            return
        step, evaluate, make = train_step.train_step, evaluation.evaluate, data.loader.loader.TrainSamples.make
        seen = {"step": 0, "evaluation": 0, "loading process": 0}

        def allocate_too_much(moment: str, number: int) -> None:
            seen[moment] += 1
            if fault == "limit" and moment == "step":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + (8 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            if seen[moment] != number:
                return
            if fault == "GPU" and moment == "step":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about the device.")
            if fault == moment:
                np.empty(1 << 50) if moment == "loading process" else torch.empty(1 << 50)

        def starved_step(*args):
            allocate_too_much("step", at)
            return step(*args)

        def starved_evaluate(*args):
            allocate_too_much("evaluation", 2)
            return evaluate(*args)

        def starved_make(*args):
            allocate_too_much("loading process", 3 * at)
            return make(*args)

        train_step.train_step, evaluation.evaluate, data.loader.loader.TrainSamples.make = (
            starved_step,
            starved_evaluate,
            starved_make,
        )

    return inject
