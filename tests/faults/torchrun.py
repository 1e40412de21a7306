"""The same with the real torchrun, from the shell to the end of the interpreter: slower, so a few of each.

- `restart`: `kill -9` to one of two processes, in the middle of an epoch: torchrun --max-restarts starts all again;
- `stop`: SIGTERM to torchrun, as a scheduler sends it, then the same command again;
- `kill`: `kill -9` to torchrun and all its processes, then the same command again.

The finished run must be bit by bit one that was never harmed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests._report import Report
from tests.faults.runs import BATCH, PATIENCE, Place, adopt_orphans, difference_of_runs, records
from utils.paths import REPO_ROOT

KINDS = ("restart", "stop", "kill")


def run(count: int, seed: int) -> Report:
    """`count` runs of two processes, of each kind in turn."""
    tally = Report("torchrun", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        through = _torchrun(place, "through", 0)
        if through.wait(PATIENCE):
            raise RuntimeError((place.root / "through.log").read_text())
        for trial in range(count):
            draws, kind = random.Random(f"{seed}/{trial}"), KINDS[trial % len(KINDS)]
            wrong = _trial(place, f"trial{trial}", kind, draws)
            tally.add(kind, not wrong, f"trial {trial}: {wrong}")
    return tally


def _torchrun(place: Place, tag: str, workers: int) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    opts = ["SAVE_STEPS", 1, "SAVE_KEEP", 0, "PRINT_FREQ", 1, "DATA.NUM_WORKERS", workers]
    words = [str(word) for word in place.argv(tag, *opts, batch=BATCH // 2)]
    with open(place.root / f"{tag}.log", "a") as log:
        return subprocess.Popen(
            [*torchrun, str(REPO_ROOT / "main.py"), *words],
            cwd=REPO_ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _trial(place: Place, tag: str, kind: str, draws: random.Random) -> str:
    workers, updates = draws.choice((0, 2)), draws.randint(2, 14)
    started = _torchrun(place, tag, workers)
    until = time.monotonic() + PATIENCE
    while not _has_made(place, tag, updates):
        if started.poll() is not None or time.monotonic() > until:
            return f"ended before it was harmed:\n{(place.root / f'{tag}.log').read_text()[-3000:]}"
        time.sleep(0.005)
    ranks = sorted(_children(started.pid))[:2]
    if kind == "restart":
        os.kill(draws.choice(ranks), signal.SIGKILL)
    elif kind == "stop":
        started.send_signal(signal.SIGTERM)
    else:
        for pid in (started.pid, *_descendants(started.pid)):
            os.kill(pid, signal.SIGKILL)
    code = started.wait(PATIENCE)
    said = (place.root / f"{tag}.log").read_text()
    if kind == "stop" and "asked to stop: saved after" not in said and not _has_made(place, tag, 17):
        return f"not saved when asked to stop, code {code}:\n{said[-3000:]}"
    if kind == "restart" and code:
        return f"not restarted, code {code}:\n{said[-3000:]}"
    if kind != "restart" and _torchrun(place, tag, workers).wait(PATIENCE):
        return f"started again:\n{(place.root / f'{tag}.log').read_text()[-3000:]}"
    return difference_of_runs(place, tag, "through")


def _has_made(place: Place, tag: str, updates: int) -> bool:
    try:
        return records(place.folder(tag), "train")[-1]["step"] >= updates
    except (OSError, ValueError, IndexError):  # nothing yet, or a line that is being written
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> list[int]:
    return [each for child in _children(pid) for each in (child, *_descendants(child))]
