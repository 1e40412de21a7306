"""Asked to stop: SIGTERM or SIGUSR1 to one process, which may be any, at any moment from the start to the last save.

All processes must leave with code 0, having seen the same number of images, which is that of the checkpoint; at most
two updates after the signal; and the same command must then come to the end of one that was never stopped, bit by bit.
"""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import utils.checkpoint.async_saver
from engine import train_step, trainer
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Place, adopt_orphans, difference_of_runs, last

MOMENTS = ("clock", "clock", "update", "update", "evaluation", "save", "start")


def run(count: int, seed: int) -> Report:
    """`count` runs, each asked once."""
    tally, slowest = Report("preemption", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place, seconds = Place(Path(scratch)), {}
        for processes in (1, 2):
            start = _start(place, f"through{processes}", processes, 0)
            if any(start.wait()):
                raise RuntimeError(start.said)
            seconds[processes] = time.monotonic() - start.began
        for trial in range(count):
            draws = random.Random(f"{seed}/{trial}")
            processes, workers, moment = draws.choice((1, 2, 2)), draws.choice((0, 2)), draws.choice(MOMENTS)
            wrong, took = _trial(place, f"trial{trial}", processes, workers, moment, draws, seconds[processes])
            slowest = max(slowest, took)
            tally.add(f"{moment}, {processes} process(es)", not wrong, f"trial {trial}, {moment}: {wrong}")
    tally.note(f"longest from signal to exit: {slowest:.1f} s")
    return tally


def _trial(
    place: Place, tag: str, processes: int, workers: int, moment: str, draws: random.Random, seconds: float
) -> tuple[str, float]:
    """What was wrong ("" for nothing), and the seconds from the signal to the end of the last process."""
    number, victim = draws.choice((signal.SIGTERM, signal.SIGUSR1)), draws.randrange(processes)
    notes = place.root / f"{tag}.notes"
    notes.mkdir()
    asked = notes / "asked"
    inject = _asking(moment, draws.randint(1, 12), number, victim, notes)
    start = _start(place, tag, processes, workers, inject)
    if moment == "clock":
        while not start.poll() and len(list(notes.glob("ready*"))) < processes:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, seconds))
        if not start.poll():
            asked.write_text(str(time.monotonic()))
            os.kill(start.pids[victim], number)
    codes = start.wait()
    if any(code != 0 for code in codes):
        return f"codes {codes}:\n{start.said[-3000:]}", 0.0
    took = max(start.ended.values()) + start.began - float(asked.read_text()) if asked.exists() else 0.0
    left = [json.loads(path.read_text()) for path in notes.glob("left*")]
    if left:  # it may have come to its end before it was asked, or while it was
        clocks = {each["images_seen"] for each in left}
        saved = last(place, tag)["state"]["images_seen"] if place.checkpoints(tag).joinpath("last.pth").exists() else 0
        if len(left) != processes or clocks != {saved}:
            return f"left at {left}, saved at {saved}", took
        after = [each["updates after"] for each in left if each["updates after"] is not None]
        if any(number > 2 for number in after):
            return f"{after} updates after the signal", took
    again = _start(place, tag, processes, workers)
    if any(code != 0 for code in again.wait()):
        return f"started again:\n{again.said[-3000:]}", took
    return difference_of_runs(place, tag, f"through{processes}"), took


def _start(place: Place, tag: str, processes: int, workers: int, inject: Inject | None = None):
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "PRINT_FREQ", 1]
    return place.start(tag, *opts, processes=processes, batch=BATCH // processes, inject=inject)


def _asking(moment: str, at: int, number: int, victim: int, notes: Path) -> Inject:
    """Raises the signal `number` in the rank `victim`, at `moment` for the `at`-th time; every rank notes where it was
    when it left.
    """

    def inject(rank: int) -> None:
        loop, finish = train_step.train, trainer.Run.fit
        initialise, copied = (
            trainer.PreemptionHandler.__init__,
            utils.checkpoint.async_saver.AsyncCheckpointer._copied,
        )
        evaluate = train_step.evaluate
        seen = {"update": 0, "evaluation": 0, "save": 0, "asked": None}

        def here(name: str, wanted: int) -> None:
            seen[name] = seen.get(name, 0) + 1
            if rank == victim and name == moment and seen[name] == wanted:
                seen["asked"] = seen["update"]
                (notes / "asked").write_text(str(time.monotonic()))
                os.kill(os.getpid(), number)

        def noting_loop(*args):
            for account in loop(*args):
                here("update", at)
                yield account

        def noting_initialise(self, *args) -> None:
            initialise(self, *args)
            (notes / f"ready{rank}").touch()
            here("start", 1)

        def asking_batches(batches):
            for batch in batches:
                here("evaluation", 1 + at // 2)
                yield batch

        def noting_end(self, *args) -> bool:
            done = finish(self, *args)
            if not done:
                after = None if seen["asked"] is None else seen["update"] - seen["asked"]
                note = {"images_seen": self.state.images_seen, "updates after": after}
                (notes / f"left{rank}").write_text(json.dumps(note))
            return done

        def asking_copied(self, value, where):
            if where == ("model",):
                here("save", 1 + at // 4)
            return copied(self, value, where)

        train_step.train, train_step.evaluate = (
            noting_loop,
            lambda a, b, batches: evaluate(a, b, asking_batches(batches)),
        )
        trainer.Run.fit, trainer.PreemptionHandler.__init__ = noting_end, noting_initialise
        utils.checkpoint.async_saver.AsyncCheckpointer._copied = asking_copied

    return inject
