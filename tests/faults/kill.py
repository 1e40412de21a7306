"""`kill -9` at any moment, again and again: the finished run must be the one that was never killed, bit by bit.

A trial starts a run, kills all its processes at once, starts it with the same command, kills it again, and so on, one
to four times, then lets it come to its end and compares all that it left: model, optimizer, average and counters in
every checkpoint, the names of the checkpoints, the epochs and the updates in `metrics.jsonl`. The moments are

- `save`: within the saving of a checkpoint: at a random byte of the file, before it is flushed, before and after it
  gets its name, before each further name; the process kills its own group there, the writing thread among it;
- `epoch`: around the end of an epoch: before, in and after its evaluation, before and after its record is written;
- `moment`: any moment, by the clock of whoever watches; where that fell into a save is found out and counted.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import utils.tracking.metric_writer
from engine import train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Place, adopt_orphans, difference_of_runs
from utils.checkpoint import digest
from utils.files import TEMPORARY

STAGES = ("byte", "byte", "byte", "flush", "name", "named", "further name", "done")
EPOCH_MOMENTS = ("before evaluation", "in evaluation", "after evaluation", "before record", "after record")


def run(count: int, seed: int) -> Report:
    """`count` runs, each killed at least once where the moments allow it."""
    tally, moments = Report("kill -9", seed), Counter()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place, seconds = Place(Path(scratch)), {}
        for processes in (1, 2):
            began = time.monotonic()
            finish(place, f"through{processes}", processes, random.Random(0), workers=0)
            seconds[processes] = time.monotonic() - began
        for trial in range(count):
            draws = random.Random(f"{seed}/{trial}")
            processes, workers = draws.choice((1, 2)), draws.choice((0, 2))
            what = f"{processes} process(es), {workers} workers"
            try:
                wrong = _trial(place, f"trial{trial}", processes, workers, draws, seconds[processes], moments)
            except RuntimeError as error:
                wrong = str(error)
            tally.add(what, not wrong, f"trial {trial}: {wrong}")
    tally.note("kills by moment: " + ", ".join(f"{what} {number}" for what, number in sorted(moments.items())))
    inside = sum(number for what, number in moments.items() if what.startswith("save"))
    tally.note(f"kills inside a save: {inside} of {moments.total()}")
    return tally


def _trial(
    place: Place, tag: str, processes: int, workers: int, draws: random.Random, seconds: float, moments: Counter
) -> str:
    """What was wrong about the run in the end; "" for nothing."""
    for _ in range(draws.choice((1, 2, 2, 3, 4))):
        marker = place.root / f"{tag}.killed"
        kind = draws.choice(("save", "save", "epoch", "moment", "moment"))
        size = (place.checkpoints(f"through{processes}") / "last.pth").stat().st_size
        inject = None
        if kind == "save":
            inject = in_a_save(draws.choice(STAGES), draws.randint(1, 5), draws.randint(1, size), marker)
        elif kind == "epoch":
            inject = at_an_epoch(draws.choice(EPOCH_MOMENTS), draws.choice((1, 1, 2)), marker)
        start = place.start(tag, *_opts(workers, draws), processes=processes, batch=BATCH // processes, inject=inject)
        if kind == "moment":
            _wait(start, draws.uniform(0.05, 1.0) * seconds)
            ended = start.poll()
            start.kill()
            if not ended:
                inside = any(place.checkpoints(tag).glob(f".*{TEMPORARY}"))
                moments["save, by the clock" if inside else "any moment"] += 1
        else:
            codes = start.wait()
            if marker.exists():
                moments[marker.read_text()] += 1
                marker.unlink()
            elif any(codes):
                return f"codes {codes}:\n{start.said}"
    finish(place, tag, processes, draws, workers)
    return difference_of_runs(place, tag, f"through{processes}")


def finish(place: Place, tag: str, processes: int, draws: random.Random, workers: int) -> None:
    """Lets the run come to its end. Raises RuntimeError where it does not."""
    start = place.start(tag, *_opts(workers, draws), processes=processes, batch=BATCH // processes)
    if any(codes := start.wait()):
        raise RuntimeError(f"the last start of {tag} ended with {codes}:\n{start.said[-3000:]}")


def _opts(workers: int, draws: random.Random) -> list:
    """How often a run saves and reports changes nothing that it computes: another number at each start."""
    often = ["SAVE_STEPS", draws.choice((0, 1, 1, 2, 3, 5)), "PRINT_FREQ", draws.choice((1, 2, 5))]
    return [*often, "DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0]


def _wait(start, seconds: float) -> None:
    until = start.began + seconds
    while time.monotonic() < until and not start.poll():
        time.sleep(0.002)


class _Countdown:
    """Kills this process group when a moment comes for the `number`-th time, leaving a note about it."""

    def __init__(self, moment: str, number: int, marker: Path):
        self.moment = moment
        self.left = number
        self.marker = marker

    def here(self, moment: str, what: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                self.kill(what)

    def kill(self, what: str) -> None:
        self.marker.write_text(what)
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)  # never over


def in_a_save(stage: str, number: int, byte: int, marker: Path) -> Inject:
    """Kills in the `number`-th save that comes to `stage`; where that is `byte`, at this byte of the file."""

    def inject(rank: int) -> None:
        if rank != 0:
            return
        countdown = _Countdown(stage, number, marker)
        countdown_of_saves = _Countdown("byte", number, marker)
        save, fsync, replace, link = digest.save, os.fsync, os.replace, os.link

        class Dying:
            """A file that is the process's end when a number of bytes has been written."""

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

        def dying_save(contents: dict, file) -> None:
            countdown_of_saves.left -= stage == "byte"
            if stage == "byte" and countdown_of_saves.left == 0:
                file = Dying(file, byte)
            save(contents, file)

        def is_ours(path) -> bool:
            return ".pth" in os.fspath(path)

        def dying_fsync(handle: int) -> None:
            if is_ours(os.readlink(f"/proc/self/fd/{handle}")):
                countdown.here("flush", "save, before flushing")
            fsync(handle)

        def dying_replace(source, target) -> None:
            if is_ours(target):
                countdown.here("name", "save, before renaming")
            replace(source, target)
            if is_ours(target):
                countdown.here("named", "save, after renaming")
                if os.fspath(target).endswith("last.pth"):
                    countdown.here("done", "save, after the last name")

        def dying_link(source, target) -> None:
            countdown.here("further name", "save, before a further name")
            link(source, target)

        digest.save, os.fsync, os.replace, os.link = dying_save, dying_fsync, dying_replace, dying_link

    return inject


def at_an_epoch(moment: str, number: int, marker: Path) -> Inject:
    """Kills at the `number`-th end of an epoch that comes to `moment`."""

    def inject(rank: int) -> None:
        if rank != 0:
            return
        countdown = _Countdown(moment, number, marker)
        evaluate, add = train_step.evaluate, utils.tracking.metric_writer.MetricWriter.add

        def dying_batches(batches):
            for batch in batches:
                countdown.here("in evaluation", "epoch, in evaluation")
                yield batch

        def dying_evaluate(components, task, batches):
            countdown.here("before evaluation", "epoch, before evaluation")
            found = evaluate(components, task, dying_batches(batches))
            countdown.here("after evaluation", "epoch, after evaluation")
            return found

        def dying_add(records, kind: str, *rest) -> None:
            if kind == "epoch":
                countdown.here("before record", "epoch, before its record")
            add(records, kind, *rest)
            if kind == "epoch":
                countdown.here("after record", "epoch, after its record")

        train_step.evaluate, utils.tracking.metric_writer.MetricWriter.add = dying_evaluate, dying_add

    return inject
