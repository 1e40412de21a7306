"""Changes of the world size between two starts and in the middle of an epoch, with the same global batch size.

A trial is a run of 17 steps that is stopped or killed a few times, and continues with 1, 2 or 4 processes each time by
the same command; the gradient accumulation steps adapt. Every augmented and mixed image that enters the network is
hashed with its position in the stream. All runs must have exactly one hash at every position, the same in all runs.
Weights, their average and the optimizer's moments must agree with those of one process within the tolerance below,
since sums are computed in another order.
"""

import hashlib
import os
import random
import signal
import tempfile
from pathlib import Path

import torch

from engine import train_step
from tests._report import Report
from tests.faults.runs import Inject, Workspace, adopt_orphans, last

MICRO, GLOBAL = 2, 8  # images per micro-batch and per step
STEPS = 17
TOLERANCE = 1e-5  # absolute, for every number


def run(count: int, seed: int) -> Report:
    """Tests runs with 1, 2 and 4 processes, with 2 → 1 → 2, and `count` runs with random changes."""
    report, largest = Report("elastic", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace, steps = Workspace(Path(scratch)), STEPS // 3
        plans = {"1": [(1, 0)], "2": [(2, 0)], "4": [(4, 0)], "2 → 1 → 2": [(2, steps), (1, steps), (2, 0)]}
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            parts = [(rng.choice((1, 2, 4)), rng.randint(1, 5)) for _ in range(rng.choice((2, 3)))]
            plans[f"random {trial}: {' → '.join(str(processes) for processes, _ in parts)} → …"] = [*parts, (2, 0)]
        reference: dict[int, set[str]] = {}
        for number, (name, plan) in enumerate(plans.items()):
            rng = random.Random(f"{seed}/{name}")
            try:
                stream = _run(workspace, f"run{number}", plan, rng)
            except RuntimeError as error:
                report.add("runs", False, f"{name}: {error}")
                continue
            reference = reference or stream
            problem, deviation = _compare(workspace, f"run{number}", stream, reference)
            largest = max(largest, deviation)
            report.add("whole runs" if len(plan) == 1 else "runs with changes", not problem, f"{name}: {problem}")
    report.note(f"largest deviation of a number from one process: {largest:.1e} (tolerance {TOLERANCE})")
    return report


def _run(workspace: Workspace, tag: str, plan: list[tuple[int, int]], rng: random.Random) -> dict[int, set[str]]:
    """Runs `plan`: (processes, steps until it is stopped; 0 = to the end) per start. Returns hashes by position."""
    notes = workspace.root / f"{tag}.notes"
    notes.mkdir()
    grad_accum_steps = GLOBAL // MICRO // plan[0][0]
    for number, (processes, steps) in enumerate(plan):
        inject = _record_images(notes, number, steps, rng.choice((signal.SIGTERM, signal.SIGKILL)))
        opts = ["DATA.NUM_WORKERS", rng.choice((0, 0, 2)), "SAVE_STEPS", 1, "SAVE_KEEP", 0]
        args = ("--accumulation-steps", grad_accum_steps)
        start = workspace.start(tag, *opts, args=args, processes=processes, batch=MICRO, inject=inject)
        codes = start.wait()
        if any(codes) and not (steps and set(codes) == {-signal.SIGKILL}):
            raise RuntimeError(f"start {number} of {plan}: codes {codes}:\n{start.output[-3000:]}")
    stream: dict[int, set[str]] = {}
    for path in notes.iterdir():
        for line in path.read_text().splitlines():
            position, *hashes = line.split()
            for i, digest in enumerate(hashes):
                stream.setdefault(int(position) + i, set()).add(digest)
    return stream


def _compare(workspace: Workspace, tag: str, stream: dict, reference: dict) -> tuple[str, float]:
    if sorted(stream) != list(range(STEPS * GLOBAL)):
        return f"{len(stream)} positions of the stream instead of {STEPS * GLOBAL}", 0.0
    different = [position for position, found in stream.items() if found != reference[position] or len(found) != 1]
    if different:
        return f"other images at {len(different)} positions of the stream, first {min(different)}", 0.0
    one, reference = last(workspace, tag), last(workspace, "run0")
    largest = 0.0
    for name, (a, b) in _pairs(one, reference):
        largest = max(largest, (a - b).abs().max().item())
        if not torch.allclose(a, b, rtol=0, atol=TOLERANCE):
            return f"{name} deviates by {(a - b).abs().max():.2e}", largest
    return "", largest


def _pairs(one: dict, other: dict):
    for part in ("model", "ema"):
        yield from ((f"{part}.{name}", (value, other[part][name])) for name, value in one[part].items())
    for number, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            yield f"optimizer.{number}.{name}", (value, other["optimizer"]["state"][number][name])


def _record_images(notes: Path, number: int, steps: int, ending: int) -> Inject:
    """Records hashes of the inputs of the network; ends the run with a signal after `steps` steps."""

    def inject(rank: int) -> None:
        step, path, seen = train_step.train_step, notes / f"{number}.{rank}", []

        def recorded(batches, file):
            for batch in batches:
                hashes = [hashlib.sha256(x.numpy().tobytes()) for x in batch["image"]]
                for digest, target in zip(hashes, batch["target"], strict=True):
                    digest.update(target.numpy().tobytes())
                print(batch["position"], *(digest.hexdigest() for digest in hashes), file=file, flush=True)
                yield batch

        def recording_step(components, first, batches):
            with open(path, "a") as file:
                both = recorded((batch for each in ([first], batches) for batch in each), file)
                result = step(components, next(both), both)
            seen.append(None)
            if len(seen) == steps and rank == 0:
                os.kill(os.getpid(), ending) if ending == signal.SIGTERM else os.killpg(0, ending)
            return result

        train_step.train_step = recording_step

    return inject
