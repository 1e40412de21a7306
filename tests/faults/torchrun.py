"""Faults under the real torchrun, from the shell to the end of the interpreter: slower, so there are few trials.

- `restart`: `kill -9` to one of two ranks in the middle of an epoch: torchrun --max-restarts starts both again;
- `stop`: SIGTERM to torchrun, as schedulers send it, then the same command again;
- `kill`: `kill -9` to torchrun and all its processes, then the same command again.

The finished run must be bitwise equal to an undisturbed one.
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
from tests.faults.runs import BATCH, TIMEOUT_SECONDS, Workspace, adopt_orphans, difference_of_runs, records
from utils.paths import REPO_ROOT

KINDS = ("restart", "stop", "kill")


def run(count: int, seed: int) -> Report:
    """Tests `count` runs of two processes, with each kind of fault in turn."""
    report = Report("torchrun", seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        through = _torchrun(workspace, "through", 0)
        if through.wait(TIMEOUT_SECONDS):
            raise RuntimeError((workspace.root / "through.log").read_text())
        for trial in range(count):
            rng, kind = random.Random(f"{seed}/{trial}"), KINDS[trial % len(KINDS)]
            problem = _run_trial(workspace, f"trial{trial}", kind, rng)
            report.add(kind, not problem, f"trial {trial}: {problem}")
    return report


def _torchrun(workspace: Workspace, tag: str, workers: int) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    opts = ["SAVE_STEPS", 1, "SAVE_KEEP", 0, "PRINT_FREQ", 1, "DATA.NUM_WORKERS", workers]
    words = [str(word) for word in workspace.argv(tag, *opts, batch=BATCH // 2)]
    with open(workspace.root / f"{tag}.log", "a") as log:
        return subprocess.Popen(
            [*torchrun, str(REPO_ROOT / "main.py"), *words],
            cwd=REPO_ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _run_trial(workspace: Workspace, tag: str, kind: str, rng: random.Random) -> str:
    workers, steps = rng.choice((0, 2)), rng.randint(2, 14)
    started = _torchrun(workspace, tag, workers)
    until = time.monotonic() + TIMEOUT_SECONDS
    while not _has_reached(workspace, tag, steps):
        if started.poll() is not None or time.monotonic() > until:
            return f"ended before the fault:\n{(workspace.root / f'{tag}.log').read_text()[-3000:]}"
        time.sleep(0.005)
    ranks = sorted(_children(started.pid))[:2]
    if kind == "restart":
        os.kill(rng.choice(ranks), signal.SIGKILL)
    elif kind == "stop":
        started.send_signal(signal.SIGTERM)
    else:
        for pid in (started.pid, *_descendants(started.pid)):
            os.kill(pid, signal.SIGKILL)
    code = started.wait(TIMEOUT_SECONDS)
    output = (workspace.root / f"{tag}.log").read_text()
    if kind == "stop" and "asked to stop: saved after" not in output and not _has_reached(workspace, tag, 17):
        return f"not saved when asked to stop, code {code}:\n{output[-3000:]}"
    if kind == "restart" and code:
        return f"not restarted, code {code}:\n{output[-3000:]}"
    if kind != "restart" and _torchrun(workspace, tag, workers).wait(TIMEOUT_SECONDS):
        return f"started again:\n{(workspace.root / f'{tag}.log').read_text()[-3000:]}"
    return difference_of_runs(workspace, tag, "through")


def _has_reached(workspace: Workspace, tag: str, steps: int) -> bool:
    try:
        return records(workspace.folder(tag), "train")[-1]["step"] >= steps
    except (OSError, ValueError, IndexError):  # no record yet, or one that is being written
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> list[int]:
    return [each for child in _children(pid) for each in (child, *_descendants(child))]
