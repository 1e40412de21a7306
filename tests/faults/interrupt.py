"""Ctrl-C: SIGINT to all processes of a run, in every phase, once or twice, with 0 and 2 workers, 1 and 2 ranks.

- The first SIGINT must end all ranks with code 130, at once before the first step and after a save later, at most two
  steps after the signal. One line says so, without a traceback, and no process is left.
- A second one, at any distance, must end all within 3 s.
- The same command must then finish with the same bits as an undisturbed run.

`imports` and `torchrun` start the real programs, the other phases fork their ranks.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import utils.checkpoint.async_saver
from engine import evaluation, train_step, trainer
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Start, Workspace, adopt_orphans, difference_of_runs, last
from utils import interrupt
from utils.paths import REPO_ROOT

MOMENTS = ("step", "evaluation", "fork", "save", "clock", "start", "imports", "torchrun")
FIRST_SECONDS = 15.0  # for a step and a save, on a busy machine
SECOND_SECONDS = 3.0
START_SECONDS = 120.0


def run(count: int, seed: int) -> Report:
    """Tests `count` runs, each interrupted once or twice."""
    report, slowest = Report("interrupt", seed), {"first": 0.0, "second": 0.0}
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        cases = list(itertools.product((2, 1), (2, 0), (False, True)))  # processes, workers, twice
        for trial in range(count):
            rng, moment = random.Random(f"{seed}/{trial}"), MOMENTS[trial % len(MOMENTS)]
            processes, workers, twice = cases[trial % len(cases)] if trial < 2 else rng.choice(cases)
            workers = 2 if moment == "fork" else workers
            delay = rng.choice((0.01, 0.03, 0.1, rng.uniform(0, 1))) if twice else None
            trial_tag = f"trial{trial}"
            if moment in ("imports", "torchrun"):
                processes = 1 if moment == "imports" else 2
                problem, took = _interrupt_program(workspace, trial_tag, processes, workers, delay, rng)
            else:
                problem, took = _interrupt_fork(workspace, trial_tag, processes, workers, moment, delay, rng)
            if not problem:
                problem = _continue(workspace, trial_tag, processes, workers)
            which = "second" if twice else "first"
            slowest[which] = max(slowest[which], took)
            case = f"{moment}, {processes} process(es), {workers} workers, {delay=}"
            report.add(f"{moment}, {which} signal", not problem, f"trial {trial}, {case}: {problem}")
    report.note(
        f"longest from the first signal to the end: {slowest['first']:.1f} s; second: {slowest['second']:.1f} s"
    )
    return report


def _opts(workers: int) -> list:
    return ["DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "PRINT_FREQ", 1]


def _start(workspace: Workspace, tag: str, processes: int, workers: int, inject: Inject | None = None) -> Start:
    return workspace.start(tag, *_opts(workers), processes=processes, batch=BATCH // processes, inject=inject)


def _continue(workspace: Workspace, tag: str, processes: int, workers: int) -> str:
    """Finishes the run, and returns how it differs from an undisturbed one, or ""."""
    reference = f"through{processes}"
    for name in (reference, tag):
        if name == tag or not workspace.folder(reference).exists():
            start = _start(workspace, name, processes, workers if name == tag else 0)
            if any(start.wait()):
                return f"started again:\n{start.output[-3000:]}"
    return difference_of_runs(workspace, tag, reference)


def _interrupt_fork(
    workspace: Workspace, tag: str, processes: int, workers: int, moment: str, delay: float | None, rng: random.Random
) -> tuple[str, float]:
    """Returns the problem or "", and the seconds from the last signal to the end of the last process."""
    notes = workspace.root / f"{tag}.notes"
    notes.mkdir()
    start = _start(workspace, tag, processes, workers, _send_signal(moment, rng.randint(1, 8), notes))
    if moment == "clock":
        time.sleep(rng.uniform(0.2, 2.5))
        if not start.poll():
            (notes / "sent").touch()
            os.killpg(start.group, signal.SIGINT)
    while not start.poll() and not (notes / "sent").exists():
        time.sleep(0.002)
    if not (notes / "sent").exists():
        codes = start.wait()
        return ("" if codes == [0] * processes else f"ended before the signal with {codes}:\n{start.output}"), 0.0
    if delay is not None:
        time.sleep(delay)
        if not start.poll():
            os.killpg(start.group, signal.SIGINT)
    sent, limit = time.monotonic(), FIRST_SECONDS if delay is None else SECOND_SECONDS
    while not start.poll() and time.monotonic() < sent + limit:
        time.sleep(0.002)
    took, left = time.monotonic() - sent, _left_over(start.group)
    codes = start.wait(0)
    complete = any("the run is complete" in line for line in start.output.splitlines())
    if codes != [130] * processes and not (codes == [0] * processes and moment == "clock"):
        return f"codes {codes} after {took:.1f} s:\n{start.output[-3000:]}", took
    problem = _problem_of_output(start.output) if 130 in codes else ""
    if left or problem:
        return f"{problem or 'processes are left'}:\n{start.output[-3000:]}", took
    stopped = [json.loads(path.read_text()) for path in notes.glob("left*")]
    if delay is None and stopped and not complete:
        saved = last(workspace, tag)["state"]["images_seen"]
        if {each["images_seen"] for each in stopped} != {saved} or any(each["steps after"] > 2 for each in stopped):
            return f"stopped at {stopped}, saved at {saved}", took
    return "", took


def _problem_of_output(output: str) -> str:
    lines = [line for line in output.splitlines() if "interrupted" in line]
    if "Traceback" in output or "Error" in output or len(lines) != 1:
        return f"a traceback, or not one line but {len(lines)}"
    return ""


def _left_over(group: int, seconds: float = 1.0) -> bool:
    """Returns whether a process of `group` still runs after `seconds`. Its ranks have been waited for."""
    until = time.monotonic() + seconds
    while True:
        try:
            os.waitpid(-group, os.WNOHANG)  # workers become children of this process
            os.killpg(group, 0)
        except (ChildProcessError, ProcessLookupError):
            return False
        if time.monotonic() > until:
            return True
        time.sleep(0.01)


def _send_signal(moment: str, at: int, notes: Path) -> Inject:
    """Sends SIGINT to the process group when rank 0 reaches `moment` for the `at`-th time, or less often if it comes
    less often. Every rank records its images seen when it stops.
    """

    def inject(rank: int) -> None:
        interrupt.install()  # as main.py does before its imports
        loop, fit, start = train_step.train_steps, trainer.Trainer.fit, ForkProcess.start
        initialise, copy = trainer.PreemptionHandler.__init__, utils.checkpoint.async_saver.AsyncCheckpointer._copy
        evaluate = evaluation.evaluate
        wanted = {"step": at, "evaluation": 1 + at // 2, "fork": 1 + at % 4, "save": 1 + at // 4, "start": 1}
        seen = {"step": 0, "asked": None}

        def count(name: str) -> None:
            seen[name] = seen.get(name, 0) + 1
            if rank == 0 and name == moment and seen[name] == wanted[name]:
                seen["asked"] = seen["step"]
                (notes / "sent").touch()
                os.killpg(0, signal.SIGINT)

        def counting_loop(*args):
            for metrics in loop(*args):
                count("step")
                yield metrics

        def counting_init(self, *args) -> None:
            initialise(self, *args)
            count("start")

        def counting_batches(batches):
            for batch in batches:
                count("evaluation")
                yield batch

        def counting_copy(self, value, where):
            if where == ("model",):
                count("save")
            return copy(self, value, where)

        def counting_start(self) -> None:
            start(self)
            count("fork")

        def recording_fit(self, *args) -> bool:
            done = fit(self, *args)
            after = 0 if seen["asked"] is None else seen["step"] - seen["asked"]
            note = {"images_seen": self.state.images_seen, "steps after": 0 if done else after}
            (notes / f"left{rank}").write_text(json.dumps(note))
            return done

        train_step.train_steps = counting_loop
        evaluation.evaluate = lambda a, b, batches: evaluate(a, b, counting_batches(batches))
        trainer.Trainer.fit, trainer.PreemptionHandler.__init__ = recording_fit, counting_init
        utils.checkpoint.async_saver.AsyncCheckpointer._copy = counting_copy
        ForkProcess.start = counting_start

    return inject


def _interrupt_program(
    workspace: Workspace, tag: str, processes: int, workers: int, delay: float | None, rng: random.Random
) -> tuple[str, float]:
    """The same with `python main.py`, or with torchrun: as a terminal does, the signal goes to the program's group."""
    argv = [str(word) for word in workspace.argv(tag, *_opts(workers), batch=BATCH // processes)]
    logs = workspace.root / f"{tag}.logs"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--log-dir={logs}"]
    command = [sys.executable, *([] if processes == 1 else [*torchrun, "--redirects=3"]), str(REPO_ROOT / "main.py")]
    output = workspace.root / f"{tag}.program"
    with open(output, "w") as file:
        program = subprocess.Popen(
            [*command, *argv], cwd=REPO_ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    until = time.monotonic() + START_SECONDS
    while not _ranks_that_handle_signals(program.pid, processes):
        if program.poll() is not None or time.monotonic() > until:
            program.kill()
            return f"did not start:\n{output.read_text()}", 0.0
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 8.0 if processes == 2 else 2.0))
    ranks = _descendants(program.pid) if processes == 2 else [program.pid]
    os.killpg(program.pid, signal.SIGINT)
    if delay is not None:
        time.sleep(delay)
        try:
            os.killpg(program.pid, signal.SIGINT)
        except ProcessLookupError:
            pass  # it has ended
    sent, limit = time.monotonic(), FIRST_SECONDS if delay is None else SECOND_SECONDS
    while any(_runs(pid) for pid in (program.pid, *ranks)) and time.monotonic() < sent + limit:
        program.poll()
        time.sleep(0.005)
    took = time.monotonic() - sent
    left = [pid for pid in (program.pid, *ranks) if _runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    said = output.read_text() if processes == 1 else "".join(path.read_text() for path in sorted(logs.rglob("*.log")))
    if left or (processes == 1 and program.wait() not in (130, 0)):
        return f"code {program.poll()}, left {left} after {took:.1f} s:\n{said}\n{output.read_text()}", took
    # Of two signals at almost the same time torchrun may pass on nothing but a SIGTERM.
    silent = delay is not None and processes == 2 and "interrupted" not in said and "Traceback" not in said
    complete = "this run is complete" in said or "best weights" in said
    problem = "" if silent or complete else _problem_of_output(said)
    return (f"{problem}:\n{said}" if problem else ""), took


def _ranks_that_handle_signals(pid: int, processes: int) -> bool:
    """Returns whether all ranks have begun main.py: then they have the pipe into which signals are written."""
    try:
        ranks = [pid] if processes == 1 else _children(pid)[:2]
        files = [list(Path(f"/proc/{rank}/fd").iterdir()) for rank in ranks]
        begun = [any(os.readlink(file).startswith("pipe:") for file in each) for each in files]
    except OSError:  # something was closed or ended meanwhile
        return False
    return begun == [True] * processes


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> list[int]:
    return [each for child in _children(pid) for each in (child, *_descendants(child))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
