"""One rank of several is killed, stopped or hangs, or one of its loader workers is killed.

The others must end with code 4, within 30 s of a kill and within TIMEOUT + 10 s of a stop or hang, and name the rank
and its process. The same command must then finish with the same bits as an undisturbed run.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

from engine import evaluation, train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Start, Workspace, adopt_orphans, difference_of_runs

TIMEOUT, KILLED_WITHIN, HUNG_WITHIN = 10, 30.0, 10.0  # seconds; the last beyond TIMEOUT
KINDS = ("killed", "killed, rank 0 hosts the store", "stopped", "hung", "worker killed")


def run(count: int, seed: int) -> Report:
    """Tests `count` runs of two or four processes, with each kind of fault in turn."""
    report, slowest = Report("lost processes", seed), dict.fromkeys(KINDS, 0.0)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        for processes in (2, 4):
            start = _start(workspace, f"through{processes}", processes, 0)
            if any(start.wait()):
                raise RuntimeError(start.output)
        for trial in range(count):
            rng, kind = random.Random(f"{seed}/{trial}"), KINDS[trial % len(KINDS)]
            problem, took = _run_trial(workspace, f"trial{trial}", kind, rng.choice((2, 2, 4)), rng)
            slowest[kind] = max(slowest[kind], took)
            report.add(kind, not problem, f"trial {trial}: {problem}")
    for kind, seconds in slowest.items():
        report.note(f"{kind}: the others ended within {seconds:.1f} s (TIMEOUT {TIMEOUT})")
    return report


def _run_trial(workspace: Workspace, tag: str, kind: str, processes: int, rng: random.Random) -> tuple[str, float]:
    """Returns the problem or "", and the seconds from the fault to the end of the last other rank."""
    victim, workers = rng.randrange(processes), 1 if kind == "worker killed" else rng.choice((0, 1))
    if kind == "killed, rank 0 hosts the store":
        victim = 0
    marker = workspace.root / f"{tag}.fault"
    inject = _inject_fault(kind, rng.choice(("step", "evaluation")), rng.randint(1, 7), victim, marker)
    agent = kind != "killed, rank 0 hosts the store"
    start = _start(workspace, tag, processes, workers, inject, agent)
    others = [pid for rank, pid in enumerate(start.pids) if rank != victim]
    allowed = KILLED_WITHIN if "killed" in kind else TIMEOUT + HUNG_WITHIN
    while not start.poll() and not all(pid in start.ended for pid in others):
        seconds_since_fault = marker.exists() and time.time() - marker.stat().st_mtime
        if seconds_since_fault and seconds_since_fault > allowed + 60:
            break
        time.sleep(0.01)
    if not marker.exists():
        start.kill()
        return f"no fault was injected: codes {start.codes}:\n{start.output[-3000:]}", 0.0
    fault_at = float(marker.read_text()) - start.began
    still_running = [pid for pid in others if pid not in start.ended]
    took = max(start.ended.get(pid, 1e9) for pid in others) - fault_at
    codes = [start.codes.get(pid) for pid in others]
    start.kill()
    if still_running or took > allowed:
        return f"others ended after {took:.1f} s, codes {codes}:\n{start.output[-3000:]}", took
    if problem := _find_problem(start, kind, victim, codes):
        return f"{problem}; codes {codes}:\n{start.output[-3000:]}", took
    again = _start(workspace, tag, processes, workers)
    if any(code != 0 for code in again.wait()):
        return f"started again:\n{again.output[-3000:]}", took
    return difference_of_runs(workspace, tag, f"through{processes}"), took


def _find_problem(start: Start, kind: str, victim: int, codes: list) -> str:
    if any(code != 4 for code in codes):
        return "not all other ranks ended with code 4"
    named = f"rank {victim} (process {start.pids[victim]} on "
    expected = {
        "killed": [named, "was killed or stopped"],
        "stopped": [named, "was killed or stopped"],
        "hung": [named, "hangs at tests/faults/hang.py"],
        "worker killed": [named, "DataLoader worker (pid"],
        "killed, rank 0 hosts the store": ["rank 0) is gone"],
    }[kind]
    missing = [args for args in expected if args not in start.output]
    return f"the output lacks {missing}" if missing else ""


def _start(
    workspace: Workspace, tag: str, processes: int, workers: int, inject: Inject | None = None, agent=False
) -> Start:
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "SAVE_STEPS", 2, "TIMEOUT", TIMEOUT]
    return workspace.start(tag, *opts, processes=processes, batch=BATCH // processes, inject=inject, agent=agent)


def _inject_fault(kind: str, moment: str, at: int, victim: int, marker: Path) -> Inject:
    """Injects a fault into the rank `victim` at its step or evaluation number `at`."""

    def inject(rank: int) -> None:
        if rank != victim:
            return
        step, evaluate = train_step.train_step, evaluation.evaluate
        seen = {"step": 0, "evaluation": 0}

        def count(name: str) -> None:
            seen[name] += 1
            if name != moment or seen[name] != (at if name == "step" else 1 + at // 3):
                return
            marker.write_text(str(time.monotonic()))
            if kind == "hung":
                time.sleep(1000)
            elif kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "worker killed":
                with open(f"/proc/self/task/{os.getpid()}/children") as children:
                    os.kill(int(children.read().split()[0]), signal.SIGKILL)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

        def faulty_step(*args):
            count("step")
            return step(*args)

        def faulty_evaluate(*args):
            count("evaluation")
            return evaluate(*args)

        train_step.train_step, evaluation.evaluate = faulty_step, faulty_evaluate

    return inject
