"""A loss or a gradient that is not finite, at one update, on one process of two.

Every process must skip that update and no other, with all weights as they were; after as many in a row as
TRAIN.MAX_BAD_STEPS says every one must end with code 3; and no checkpoint may hold a number that is not finite.
"""

import hashlib
import random
import tempfile
from pathlib import Path

import torch

import tasks.classification
from engine import train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Place, adopt_orphans
from utils.checkpoint.io import not_finite, read_checkpoint

UPDATES, LIMIT = 17, 3


def run(count: int, seed: int) -> Report:
    """`count` runs of two processes; in every third the fault stays until the run is stopped."""
    tally = Report("not finite", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for trial in range(count):
            draws = random.Random(f"{seed}/{trial}")
            what, grad_accum_steps, lasts = ("loss", "gradient")[trial % 2], draws.choice((1, 2)), trial % 3 == 2
            wrong = _trial(place, f"trial{trial}", what, grad_accum_steps, lasts, draws)
            tally.add(f"{what}, {'until it is stopped' if lasts else 'once'}", not wrong, f"trial {trial}: {wrong}")
    return tally


def _trial(place: Place, tag: str, what: str, grad_accum_steps: int, lasts: bool, draws: random.Random) -> str:
    first, victim = draws.randrange(1, UPDATES - LIMIT), draws.randrange(2)
    value = draws.choice((float("nan"), float("inf"), float("-inf")))
    bad = range(first, UPDATES if lasts else first + 1)
    micro = draws.randrange(grad_accum_steps)
    notes = place.root / f"{tag}.notes"
    notes.mkdir()
    opts = ["SAVE_STEPS", 1, "SAVE_KEEP", 0, "PRINT_FREQ", 1, "TRAIN.MAX_BAD_STEPS", LIMIT]
    words = ("--accumulation-steps", grad_accum_steps)
    inject = _spoiling(what, bad, micro, grad_accum_steps, victim, value, notes)
    start = place.start(tag, *opts, words=words, processes=2, batch=BATCH // 2 // grad_accum_steps, inject=inject)
    codes = start.wait()
    if codes != ([3, 3] if lasts else [0, 0]):
        return f"codes {codes}:\n{start.said[-3000:]}"
    weights = [(notes / f"{rank}").read_text().split() for rank in range(2)]
    if weights[0] != weights[1]:
        return "the processes have other weights"
    skipped = [u for u, (a, b) in enumerate(zip(weights[0], weights[0][1:], strict=False)) if a == b]
    expected = [u for u in bad if u < len(weights[0]) - 1]
    if skipped != expected or lasts and len(expected) != LIMIT:
        return f"updates {skipped} were skipped, not {expected}"
    for path in place.checkpoints(tag).iterdir():
        if broken := not_finite(read_checkpoint(str(path))):
            return f"{path.name}: {broken} is not finite"
    counted = read_checkpoint(str(place.checkpoints(tag) / "last.pth"))["state"]["skipped"]
    return "" if lasts or counted == 1 else f"{counted} skipped updates were counted"


def _spoiling(
    what: str, bad: range, micro: int, grad_accum_steps: int, victim: int, value: float, notes: Path
) -> Inject:
    """Spoils micro-batch `micro` of the updates `bad` on the rank `victim`; each notes its weights after each one."""

    def inject(rank: int) -> None:
        forward, update = tasks.classification.Classification.forward, train_step._update
        passes = {"forward": 0}

        def spoiled(self, batch: dict) -> dict:
            found = forward(self, batch)
            if not self.training:
                return found
            number, place = divmod(passes["forward"], grad_accum_steps)
            passes["forward"] += 1
            if rank == victim and number in bad and place == micro:
                if what == "loss":
                    return found | {"loss": found["loss"] * value}
                parameter = next(self.model.parameters())
                return found | {"loss": found["loss"] + _SpoiledGradient.apply(parameter.sum(), value)}
            return found

        def noting(components, *args):
            if passes["forward"] == 0:
                _note(components)
            found = update(components, *args)
            _note(components)
            return found

        def _note(components) -> None:
            digest = hashlib.sha256()
            for parameter in components.module_without_ddp.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            with open(notes / f"{rank}", "a") as file:
                file.write(digest.hexdigest() + "\n")

        tasks.classification.Classification.forward, train_step._update = spoiled, noting

    return inject


class _SpoiledGradient(torch.autograd.Function):
    """0, whose gradient is not finite: the loss shows nothing."""

    @staticmethod
    def forward(context, x: torch.Tensor, value: float) -> torch.Tensor:
        context.value = value
        return torch.zeros_like(x)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * context.value, None
