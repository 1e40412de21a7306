"""`kill -9` at any moment, repeatedly: the finished run must be bitwise equal to an undisturbed one.

A trial kills all processes of a run at once and starts it again with the same command, one to four times. Then it lets
the run finish and compares the model, optimizer, average and counters in every checkpoint, the names of the
checkpoints, and the epochs and steps in `metrics.jsonl`. The moments are

- `save`: while a checkpoint is saved: at a random byte of the file, before flushing, before and after renaming, before
  each hard link. The process kills its own group there, including the thread that writes;
- `epoch`: at the end of an epoch: before, in and after the evaluation, before and after its record is written;
- `moment`: any moment, by the clock of the harness. Moments that fell into a save are counted separately.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import utils.tracking.metric_writer
from engine import evaluation
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Workspace, adopt_orphans, difference_of_runs
from utils.checkpoint import digest
from utils.files import TEMPORARY

STAGES = ("byte", "byte", "byte", "flush", "name", "named", "further name", "done")
EPOCH_MOMENTS = ("before evaluation", "in evaluation", "after evaluation", "before record", "after record")


def run(count: int, seed: int) -> Report:
    """Tests `count` runs, each killed at least once if it reaches the chosen moment."""
    report, kills = Report("kill -9", seed), Counter()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace, seconds = Workspace(Path(scratch)), {}
        for processes in (1, 2):
            began = time.monotonic()
            finish(workspace, f"through{processes}", processes, random.Random(0), workers=0)
            seconds[processes] = time.monotonic() - began
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            processes, workers = rng.choice((1, 2)), rng.choice((0, 2))
            label = f"{processes} process(es), {workers} workers"
            try:
                problem = _run_trial(workspace, f"trial{trial}", processes, workers, rng, seconds[processes], kills)
            except RuntimeError as error:
                problem = str(error)
            report.add(label, not problem, f"trial {trial}: {problem}")
    report.note("kills by moment: " + ", ".join(f"{label} {number}" for label, number in sorted(kills.items())))
    inside = sum(number for label, number in kills.items() if label.startswith("save"))
    report.note(f"kills inside a save: {inside} of {kills.total()}")
    return report


def _run_trial(
    workspace: Workspace, tag: str, processes: int, workers: int, rng: random.Random, seconds: float, kills: Counter
) -> str:
    """Returns the problem with the finished run, or ""."""
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        marker = workspace.root / f"{tag}.killed"
        kind = rng.choice(("save", "save", "epoch", "moment", "moment"))
        size = (workspace.checkpoints(f"through{processes}") / "last.pth").stat().st_size
        inject = None
        if kind == "save":
            inject = kill_in_save(rng.choice(STAGES), rng.randint(1, 5), rng.randint(1, size), marker)
        elif kind == "epoch":
            inject = kill_at_epoch_end(rng.choice(EPOCH_MOMENTS), rng.choice((1, 1, 2)), marker)
        start = workspace.start(tag, *_opts(workers, rng), processes=processes, batch=BATCH // processes, inject=inject)
        if kind == "moment":
            _wait_until(start, rng.uniform(0.05, 1.0) * seconds)
            ended = start.poll()
            start.kill()
            if not ended:
                inside = any(workspace.checkpoints(tag).glob(f".*{TEMPORARY}"))
                kills["save, by the clock" if inside else "any moment"] += 1
        else:
            codes = start.wait()
            if marker.exists():
                kills[marker.read_text()] += 1
                marker.unlink()
            elif any(codes):
                return f"codes {codes}:\n{start.output}"
    finish(workspace, tag, processes, rng, workers)
    return difference_of_runs(workspace, tag, f"through{processes}")


def finish(workspace: Workspace, tag: str, processes: int, rng: random.Random, workers: int) -> None:
    """Lets the run finish. Raises RuntimeError if it fails."""
    start = workspace.start(tag, *_opts(workers, rng), processes=processes, batch=BATCH // processes)
    if any(codes := start.wait()):
        raise RuntimeError(f"the last start of {tag} ended with {codes}:\n{start.output[-3000:]}")


def _opts(workers: int, rng: random.Random) -> list:
    """Draws how often a run saves and logs, anew at each start: this must not change its result."""
    often = ["SAVE_STEPS", rng.choice((0, 1, 1, 2, 3, 5)), "PRINT_FREQ", rng.choice((1, 2, 5))]
    return [*often, "DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0]


def _wait_until(start, seconds: float) -> None:
    until = start.began + seconds
    while time.monotonic() < until and not start.poll():
        time.sleep(0.002)


class _KillCountdown:
    """Kills this process group when a moment is reached for the `number`-th time, and writes its name to `marker`."""

    def __init__(self, moment: str, number: int, marker: Path):
        self.moment = moment
        self.left = number
        self.marker = marker

    def reached(self, moment: str, label: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                self.kill(label)

    def kill(self, label: str) -> None:
        self.marker.write_text(label)
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)  # until the signal arrives


def kill_in_save(stage: str, number: int, byte: int, marker: Path) -> Inject:
    """Kills in the `number`-th save that reaches `stage`; for the stage "byte", at byte `byte` of the file."""

    def inject(rank: int) -> None:
        if rank != 0:
            return
        countdown = _KillCountdown(stage, number, marker)
        countdown_of_saves = _KillCountdown("byte", number, marker)
        save, fsync, replace, link = digest.save, os.fsync, os.replace, os.link

        class KillingFile:
            """A file that kills the process after `left` bytes have been written."""

            def __init__(self, file, left: int):
                self.file, self.left = file, left

            def write(self, data) -> int:
                view = memoryview(data).cast("B")
                if len(view) >= self.left:
                    self.file.write(view[: self.left])
                    self.file.flush()
                    countdown_of_saves.kill("save, at a byte")
                self.left -= len(view)
                return self.file.write(data)

            def flush(self) -> None:
                self.file.flush()

        def killing_save(contents: dict, file) -> None:
            countdown_of_saves.left -= stage == "byte"
            if stage == "byte" and countdown_of_saves.left == 0:
                file = KillingFile(file, byte)
            save(contents, file)

        def is_checkpoint(path) -> bool:
            return ".pth" in os.fspath(path)

        def killing_fsync(handle: int) -> None:
            if is_checkpoint(os.readlink(f"/proc/self/fd/{handle}")):
                countdown.reached("flush", "save, before flushing")
            fsync(handle)

        def killing_replace(source, target) -> None:
            if is_checkpoint(target):
                countdown.reached("name", "save, before renaming")
            replace(source, target)
            if is_checkpoint(target):
                countdown.reached("named", "save, after renaming")
                if os.fspath(target).endswith("last.pth"):
                    countdown.reached("done", "save, after the last name")

        def killing_link(source, target) -> None:
            countdown.reached("further name", "save, before a further name")
            link(source, target)

        digest.save, os.fsync, os.replace, os.link = killing_save, killing_fsync, killing_replace, killing_link

    return inject


def kill_at_epoch_end(moment: str, number: int, marker: Path) -> Inject:
    """Kills at the `number`-th end of an epoch that reaches `moment`."""

    def inject(rank: int) -> None:
        if rank != 0:
            return
        countdown = _KillCountdown(moment, number, marker)
        evaluate, add = evaluation.evaluate, utils.tracking.metric_writer.MetricWriter.add

        def killing_batches(batches):
            for batch in batches:
                countdown.reached("in evaluation", "epoch, in evaluation")
                yield batch

        def killing_evaluate(components, task, batches):
            countdown.reached("before evaluation", "epoch, before evaluation")
            metrics = evaluate(components, task, killing_batches(batches))
            countdown.reached("after evaluation", "epoch, after evaluation")
            return metrics

        def killing_add(records, kind: str, *rest) -> None:
            if kind == "epoch":
                countdown.reached("before record", "epoch, before its record")
            add(records, kind, *rest)
            if kind == "epoch":
                countdown.reached("after record", "epoch, after its record")

        evaluation.evaluate, utils.tracking.metric_writer.MetricWriter.add = killing_evaluate, killing_add

    return inject
