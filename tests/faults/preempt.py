"""Preemption: SIGTERM or SIGUSR1 to any one rank, at any moment from the start to the last save.

All ranks must end with code 0 at most two steps after the signal, with the images seen that the checkpoint says. The
same command must then finish with the same bits as an undisturbed run.
"""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import utils.checkpoint.async_saver
from engine import evaluation, train_step, trainer
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Workspace, adopt_orphans, difference_of_runs, last

MOMENTS = ("clock", "clock", "step", "step", "evaluation", "save", "start")


def run(count: int, seed: int) -> Report:
    """Tests `count` runs, each asked to stop once."""
    report, slowest = Report("preemption", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace, seconds = Workspace(Path(scratch)), {}
        for processes in (1, 2):
            start = _start(workspace, f"through{processes}", processes, 0)
            if any(start.wait()):
                raise RuntimeError(start.output)
            seconds[processes] = time.monotonic() - start.began
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            processes, workers, moment = rng.choice((1, 2, 2)), rng.choice((0, 2)), rng.choice(MOMENTS)
            problem, took = _run_trial(workspace, f"trial{trial}", processes, workers, moment, rng, seconds[processes])
            slowest = max(slowest, took)
            report.add(f"{moment}, {processes} process(es)", not problem, f"trial {trial}, {moment}: {problem}")
    report.note(f"longest from signal to exit: {slowest:.1f} s")
    return report


def _run_trial(
    workspace: Workspace, tag: str, processes: int, workers: int, moment: str, rng: random.Random, seconds: float
) -> tuple[str, float]:
    """Returns the problem or "", and the seconds from the signal to the end of the last process."""
    number, victim = rng.choice((signal.SIGTERM, signal.SIGUSR1)), rng.randrange(processes)
    notes = workspace.root / f"{tag}.notes"
    notes.mkdir()
    signal_sent = notes / "asked"
    inject = _send_signal(moment, rng.randint(1, 12), number, victim, notes)
    start = _start(workspace, tag, processes, workers, inject)
    if moment == "clock":
        while not start.poll() and len(list(notes.glob("ready*"))) < processes:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, seconds))
        if not start.poll():
            signal_sent.write_text(str(time.monotonic()))
            os.kill(start.pids[victim], number)
    codes = start.wait()
    if any(code != 0 for code in codes):
        return f"codes {codes}:\n{start.output[-3000:]}", 0.0
    took = max(start.ended.values()) + start.began - float(signal_sent.read_text()) if signal_sent.exists() else 0.0
    stopped = [json.loads(path.read_text()) for path in notes.glob("left*")]
    if stopped:  # otherwise it finished first
        images_seen = {each["images_seen"] for each in stopped}
        saved = (
            last(workspace, tag)["state"]["images_seen"]
            if workspace.checkpoints(tag).joinpath("last.pth").exists()
            else 0
        )
        if len(stopped) != processes or images_seen != {saved}:
            return f"stopped at {stopped}, saved at {saved}", took
        after = [each["steps after"] for each in stopped if each["steps after"] is not None]
        if any(number > 2 for number in after):
            return f"{after} steps after the signal", took
    again = _start(workspace, tag, processes, workers)
    if any(code != 0 for code in again.wait()):
        return f"started again:\n{again.output[-3000:]}", took
    return difference_of_runs(workspace, tag, f"through{processes}"), took


def _start(workspace: Workspace, tag: str, processes: int, workers: int, inject: Inject | None = None):
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "PRINT_FREQ", 1]
    return workspace.start(tag, *opts, processes=processes, batch=BATCH // processes, inject=inject)


def _send_signal(moment: str, at: int, number: int, victim: int, notes: Path) -> Inject:
    """Raises the signal `number` in the rank `victim` when `moment` is reached for the `at`-th time. Every rank records
    its images seen when it stops.
    """

    def inject(rank: int) -> None:
        loop, finish = train_step.train_steps, trainer.Trainer.fit
        initialise, copied = (
            trainer.PreemptionHandler.__init__,
            utils.checkpoint.async_saver.AsyncCheckpointer._copy,
        )
        evaluate = evaluation.evaluate
        seen = {"step": 0, "evaluation": 0, "save": 0, "asked": None}

        def count(name: str, wanted: int) -> None:
            seen[name] = seen.get(name, 0) + 1
            if rank == victim and name == moment and seen[name] == wanted:
                seen["asked"] = seen["step"]
                (notes / "asked").write_text(str(time.monotonic()))
                os.kill(os.getpid(), number)

        def recording_loop(*args):
            for metrics in loop(*args):
                count("step", at)
                yield metrics

        def recording_init(self, *args) -> None:
            initialise(self, *args)
            (notes / f"ready{rank}").touch()
            count("start", 1)

        def signalling_batches(batches):
            for batch in batches:
                count("evaluation", 1 + at // 2)
                yield batch

        def recording_fit(self, *args) -> bool:
            done = finish(self, *args)
            if not done:
                after = None if seen["asked"] is None else seen["step"] - seen["asked"]
                note = {"images_seen": self.state.images_seen, "steps after": after}
                (notes / f"left{rank}").write_text(json.dumps(note))
            return done

        def signalling_copy(self, value, where):
            if where == ("model",):
                count("save", 1 + at // 4)
            return copied(self, value, where)

        train_step.train_steps, evaluation.evaluate = (
            recording_loop,
            lambda a, b, batches: evaluate(a, b, signalling_batches(batches)),
        )
        trainer.Trainer.fit, trainer.PreemptionHandler.__init__ = recording_fit, recording_init
        utils.checkpoint.async_saver.AsyncCheckpointer._copy = signalling_copy

    return inject
