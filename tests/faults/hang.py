"""One process of several is killed, stopped or hangs, or one of its loading processes is killed.

The others must end with code 4, within 30 s of a kill and within TIMEOUT + 10 s of a stop or hang, and say which rank
it was, as which process; and the same command must then come to the end of a run that was never harmed, bit by bit.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

from engine import train_step
from tests._report import Report
from tests.faults.runs import BATCH, Inject, Place, Start, adopt_orphans, difference_of_runs

TIMEOUT, KILLED_WITHIN, HUNG_WITHIN = 10, 30.0, 10.0  # seconds; the last beyond TIMEOUT
KINDS = ("killed", "killed, rank 0 keeps the list", "stopped", "hung", "worker killed")


def run(count: int, seed: int) -> Report:
    """`count` runs of two or four processes, of each kind in turn."""
    tally, slowest = Report("lost processes", seed), dict.fromkeys(KINDS, 0.0)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for processes in (2, 4):
            start = _start(place, f"through{processes}", processes, 0)
            if any(start.wait()):
                raise RuntimeError(start.said)
        for trial in range(count):
            draws, kind = random.Random(f"{seed}/{trial}"), KINDS[trial % len(KINDS)]
            wrong, took = _trial(place, f"trial{trial}", kind, draws.choice((2, 2, 4)), draws)
            slowest[kind] = max(slowest[kind], took)
            tally.add(kind, not wrong, f"trial {trial}: {wrong}")
    for kind, seconds in slowest.items():
        tally.note(f"{kind}: the others had ended after {seconds:.1f} s at most (TIMEOUT {TIMEOUT})")
    return tally


def _trial(place: Place, tag: str, kind: str, processes: int, draws: random.Random) -> tuple[str, float]:
    """What was wrong ("" for nothing), and the seconds from the fault to the end of the last of the others."""
    victim, workers = draws.randrange(processes), 1 if kind == "worker killed" else draws.choice((0, 1))
    if kind == "killed, rank 0 keeps the list":
        victim = 0
    marker = place.root / f"{tag}.harmed"
    inject = _harm(kind, draws.choice(("update", "evaluation")), draws.randint(1, 7), victim, marker)
    agent = kind != "killed, rank 0 keeps the list"
    start = _start(place, tag, processes, workers, inject, agent)
    others = [pid for rank, pid in enumerate(start.pids) if rank != victim]
    allowed = KILLED_WITHIN if "killed" in kind else TIMEOUT + HUNG_WITHIN
    while not start.poll() and not all(pid in start.ended for pid in others):
        harmed = marker.exists() and time.time() - marker.stat().st_mtime
        if harmed and harmed > allowed + 60:
            break
        time.sleep(0.01)
    if not marker.exists():
        start.kill()
        return f"not harmed: codes {start.codes}:\n{start.said[-3000:]}", 0.0
    harmed_at = float(marker.read_text()) - start.began
    late = [pid for pid in others if pid not in start.ended]
    took = max(start.ended.get(pid, 1e9) for pid in others) - harmed_at
    codes = [start.codes.get(pid) for pid in others]
    start.kill()
    if late or took > allowed:
        return f"others ended after {took:.1f} s, codes {codes}:\n{start.said[-3000:]}", took
    if wrong := _wrong_about(start, kind, victim, codes):
        return f"{wrong}; codes {codes}:\n{start.said[-3000:]}", took
    again = _start(place, tag, processes, workers)
    if any(code != 0 for code in again.wait()):
        return f"started again:\n{again.said[-3000:]}", took
    return difference_of_runs(place, tag, f"through{processes}"), took


def _wrong_about(start: Start, kind: str, victim: int, codes: list) -> str:
    if any(code != 4 for code in codes):
        return "not all of the others ended with code 4"
    named = f"rank {victim} (process {start.pids[victim]} on "
    expected = {
        "killed": [named, "was killed or stopped"],
        "stopped": [named, "was killed or stopped"],
        "hung": [named, "hangs at tests/faults/hang.py"],
        "worker killed": [named, "DataLoader worker (pid"],
        "killed, rank 0 keeps the list": ["rank 0) is gone"],
    }[kind]
    missing = [words for words in expected if words not in start.said]
    return f"it does not say {missing}" if missing else ""


def _start(place: Place, tag: str, processes: int, workers: int, inject: Inject | None = None, agent=False) -> Start:
    opts = ["DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "SAVE_STEPS", 2, "TIMEOUT", TIMEOUT]
    return place.start(tag, *opts, processes=processes, batch=BATCH // processes, inject=inject, agent=agent)


def _harm(kind: str, moment: str, at: int, victim: int, marker: Path) -> Inject:
    """Harms the rank `victim` at its update or evaluation number `at`."""

    def inject(rank: int) -> None:
        if rank != victim:
            return
        update, evaluate = train_step._update, train_step.evaluate
        seen = {"update": 0, "evaluation": 0}

        def here(name: str) -> None:
            seen[name] += 1
            if name != moment or seen[name] != (at if name == "update" else 1 + at // 3):
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

        def harmed_update(*args):
            here("update")
            return update(*args)

        def harmed_evaluate(*args):
            here("evaluation")
            return evaluate(*args)

        train_step._update, train_step.evaluate = harmed_update, harmed_evaluate

    return inject
