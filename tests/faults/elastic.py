"""Other numbers of processes, between two starts and in the middle of an epoch, with the same images an update.

A trial is a run of 17 updates that is stopped or killed a few times and goes on with 1, 2 or 4 processes each time, by
the same command: the accumulation steps follow. Every image that enters the network, augmented and mixed, is hashed
with its place in the stream. All runs must have the same hash in every place, none left out and none with two; and
weights, average and moments must agree with those of one process, to the tolerance below: sums are made in another
order.
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
from tests.faults.runs import Inject, Place, adopt_orphans, last

MICRO, GLOBAL = 2, 8  # images of a micro-batch and of an update
UPDATES = 17
TOLERANCE = 1e-5  # of every number, absolute


def run(count: int, seed: int) -> Report:
    """Whole runs of 1, 2 and 4 processes, 2 → 1 → 2, and `count` runs with random numbers of them."""
    tally, largest = Report("elastic", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place, steps = Place(Path(scratch)), UPDATES // 3
        plans = {"1": [(1, 0)], "2": [(2, 0)], "4": [(4, 0)], "2 → 1 → 2": [(2, steps), (1, steps), (2, 0)]}
        for trial in range(count):
            draws = random.Random(f"{seed}/{trial}")
            parts = [(draws.choice((1, 2, 4)), draws.randint(1, 5)) for _ in range(draws.choice((2, 3)))]
            plans[f"random {trial}: {' → '.join(str(processes) for processes, _ in parts)} → …"] = [*parts, (2, 0)]
        through: dict[int, set[str]] = {}
        for number, (name, plan) in enumerate(plans.items()):
            draws = random.Random(f"{seed}/{name}")
            try:
                stream = _run(place, f"run{number}", plan, draws)
            except RuntimeError as error:
                tally.add("runs", False, f"{name}: {error}")
                continue
            through = through or stream
            wrong, deviation = _compare(place, f"run{number}", stream, through)
            largest = max(largest, deviation)
            tally.add("whole runs" if len(plan) == 1 else "runs with changes", not wrong, f"{name}: {wrong}")
    tally.note(f"largest deviation of a number from one process: {largest:.1e} (tolerance {TOLERANCE})")
    return tally


def _run(place: Place, tag: str, plan: list[tuple[int, int]], draws: random.Random) -> dict[int, set[str]]:
    """Runs `plan`, (processes, updates until stopped; 0 = to the end) for each start → hashes by place."""
    notes = place.root / f"{tag}.notes"
    notes.mkdir()
    grad_accum_steps = GLOBAL // MICRO // plan[0][0]
    for number, (processes, updates) in enumerate(plan):
        inject = _noting(notes, number, updates, draws.choice((signal.SIGTERM, signal.SIGKILL)))
        opts = ["DATA.NUM_WORKERS", draws.choice((0, 0, 2)), "SAVE_STEPS", 1, "SAVE_KEEP", 0]
        words = ("--accumulation-steps", grad_accum_steps)
        start = place.start(tag, *opts, words=words, processes=processes, batch=MICRO, inject=inject)
        codes = start.wait()
        if any(codes) and not (updates and set(codes) == {-signal.SIGKILL}):
            raise RuntimeError(f"start {number} of {plan}: codes {codes}:\n{start.said[-3000:]}")
    stream: dict[int, set[str]] = {}
    for path in notes.iterdir():
        for line in path.read_text().splitlines():
            position, *hashes = line.split()
            for i, digest in enumerate(hashes):
                stream.setdefault(int(position) + i, set()).add(digest)
    return stream


def _compare(place: Place, tag: str, stream: dict, through: dict) -> tuple[str, float]:
    if sorted(stream) != list(range(UPDATES * GLOBAL)):
        return f"{len(stream)} places of the stream instead of {UPDATES * GLOBAL}", 0.0
    other = [place for place, digests in stream.items() if digests != through[place] or len(digests) != 1]
    if other:
        return f"other images in {len(other)} places, first {min(other)}", 0.0
    one, reference = last(place, tag), last(place, "run0")
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


def _noting(notes: Path, number: int, updates: int, ending: int) -> Inject:
    """Notes the hashes of what goes into the network; ends the run with a signal after `updates` updates."""

    def inject(rank: int) -> None:
        update, path, seen = train_step._update, notes / f"{number}.{rank}", []

        def noted(batches, file):
            for batch in batches:
                hashes = [hashlib.sha256(x.numpy().tobytes()) for x in batch["image"]]
                for digest, target in zip(hashes, batch["target"], strict=True):
                    digest.update(target.numpy().tobytes())
                print(batch["position"], *(digest.hexdigest() for digest in hashes), file=file, flush=True)
                yield batch

        def noting_update(components, first, batches):
            with open(path, "a") as file:
                both = noted((batch for each in ([first], batches) for batch in each), file)
                found = update(components, next(both), both)
            seen.append(None)
            if len(seen) == updates and rank == 0:
                os.kill(os.getpid(), ending) if ending == signal.SIGTERM else os.killpg(0, ending)
            return found

        train_step._update = noting_update

    return inject
