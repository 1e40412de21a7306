"""A loss or gradient that is not finite, at one step, on one rank of two.

Both ranks must skip that step and no other, and keep all weights. After TRAIN.MAX_BAD_STEPS skipped steps in a row both
must end with code 3. No checkpoint may contain a number that is not finite.
"""

import hashlib
import random
import tempfile
from pathlib import Path

import torch

import tasks.classification
from engine import train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Workspace, adopt_orphans
from utils.checkpoint.io import not_finite, read_checkpoint

STEPS, LIMIT = 17, 3


def run(count: int, seed: int) -> Report:
    """Tests `count` runs of two processes; in every third the fault persists until the run stops."""
    report = Report("not finite", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            kind, grad_accum_steps, persistent = ("loss", "gradient")[trial % 2], rng.choice((1, 2)), trial % 3 == 2
            problem = _run_trial(workspace, f"trial{trial}", kind, grad_accum_steps, persistent, rng)
            report.add(
                f"{kind}, {'until it is stopped' if persistent else 'once'}", not problem, f"trial {trial}: {problem}"
            )
    return report


def _run_trial(
    workspace: Workspace, tag: str, kind: str, grad_accum_steps: int, persistent: bool, rng: random.Random
) -> str:
    first, victim = rng.randrange(1, STEPS - LIMIT), rng.randrange(2)
    value = rng.choice((float("nan"), float("inf"), float("-inf")))
    bad_steps = range(first, STEPS if persistent else first + 1)
    micro_step = rng.randrange(grad_accum_steps)
    notes = workspace.root / f"{tag}.notes"
    notes.mkdir()
    opts = ["SAVE_STEPS", 1, "SAVE_KEEP", 0, "PRINT_FREQ", 1, "TRAIN.MAX_BAD_STEPS", LIMIT]
    args = ("--accumulation-steps", grad_accum_steps)
    inject = _inject_nonfinite(kind, bad_steps, micro_step, grad_accum_steps, victim, value, notes)
    start = workspace.start(tag, *opts, args=args, processes=2, batch=BATCH // 2 // grad_accum_steps, inject=inject)
    codes = start.wait()
    if codes != ([3, 3] if persistent else [0, 0]):
        return f"codes {codes}:\n{start.output[-3000:]}"
    weights = [(notes / f"{rank}").read_text().split() for rank in range(2)]
    if weights[0] != weights[1]:
        return "the ranks have different weights"
    skipped = [u for u, (a, b) in enumerate(zip(weights[0], weights[0][1:], strict=False)) if a == b]
    expected = [u for u in bad_steps if u < len(weights[0]) - 1]
    if skipped != expected or persistent and len(expected) != LIMIT:
        return f"steps {skipped} were skipped, not {expected}"
    for path in workspace.checkpoints(tag).iterdir():
        if broken := not_finite(read_checkpoint(str(path))):
            return f"{path.name}: {broken} is not finite"
    counted = read_checkpoint(str(workspace.checkpoints(tag) / "last.pth"))["state"]["skipped"]
    return "" if persistent or counted == 1 else f"{counted} skipped steps were counted"


def _inject_nonfinite(
    kind: str, bad_steps: range, micro_step: int, grad_accum_steps: int, victim: int, value: float, notes: Path
) -> Inject:
    """Makes micro-batch `micro_step` of `bad_steps` non-finite on the rank `victim`. All ranks record their weights."""

    def inject(rank: int) -> None:
        forward, step = tasks.classification.Classification.forward, train_step.train_step
        passes = {"forward": 0}

        def forward_with_fault(self, batch: dict) -> dict:
            losses = forward(self, batch)
            if not self.training:
                return losses
            number, micro = divmod(passes["forward"], grad_accum_steps)
            passes["forward"] += 1
            if rank == victim and number in bad_steps and micro == micro_step:
                if kind == "loss":
                    return losses | {"loss": losses["loss"] * value}
                parameter = next(self.model.parameters())
                return losses | {"loss": losses["loss"] + _NonfiniteGradient.apply(parameter.sum(), value)}
            return losses

        def recording_step(components, *args):
            if passes["forward"] == 0:
                _record_weights(components)
            result = step(components, *args)
            _record_weights(components)
            return result

        def _record_weights(components) -> None:
            digest = hashlib.sha256()
            for parameter in components.module_without_ddp.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            with open(notes / f"{rank}", "a") as file:
                file.write(digest.hexdigest() + "\n")

        tasks.classification.Classification.forward, train_step.train_step = forward_with_fault, recording_step

    return inject


class _NonfiniteGradient(torch.autograd.Function):
    """Returns 0, with a gradient that is not finite, so that the loss stays finite."""

    @staticmethod
    def forward(context, x: torch.Tensor, value: float) -> torch.Tensor:
        context.value = value
        return torch.zeros_like(x)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * context.value, None
