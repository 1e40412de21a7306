"""Two runs in one folder; and the choice of the checkpoint when clocks and time stamps are wrong.

A second start in the folder of a live run must be refused within 5 s, name host and process, and change nothing. When
the first is killed with `kill -9` (the process alone; its loader workers live on for a while), the folder must be free
at once. Then all time stamps are shuffled, the clock may go back by ten years, and `last.pth` may be missing: the run
must continue from the checkpoint with the most images seen, and end like an undisturbed run.
"""

import os
import random
import signal
import socket
import tempfile
import time
from pathlib import Path

from engine import train_step
from tests._report import Report
from tests.faults.runs import Inject, Start, Workspace, adopt_orphans, difference_of_runs
from utils.checkpoint.io import read_checkpoint

REFUSED_WITHIN = 5.0  # seconds
YEARS = 10 * 365 * 86400.0


def run(count: int, seed: int) -> Report:
    """Tests `count` folders."""
    report, slowest = Report("one folder", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch))
        if any((start := _start(workspace, "through", 0)).wait()):
            raise RuntimeError(start.output)
        for trial in range(count):
            rng = random.Random(f"{seed}/{trial}")
            tag, last_missing = f"trial{trial}", rng.random() < 0.3
            problem, took = _start_twice(workspace, tag, rng)
            slowest = max(slowest, took)
            report.add("second start refused, folder free after kill -9", not problem, f"trial {trial}: {problem}")
            problem = _resume_with_shuffled_times(workspace, tag, last_missing, rng)
            what = "right checkpoint" + (", last.pth gone" if last_missing else "")
            report.add(what, not problem, f"trial {trial}: {problem}")
    report.note(f"longest until refused: {slowest:.1f} s (without the import of PyTorch)")
    return report


def _start(workspace: Workspace, tag: str, workers: int, inject: Inject | None = None) -> Start:
    return workspace.start(tag, "DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "SAVE_STEPS", 1, inject=inject)


def _start_twice(workspace: Workspace, tag: str, rng: random.Random) -> tuple[str, float]:
    """Leaves a folder with a killed run. Returns the problem or "", and the seconds until the refusal."""
    marker, workers = workspace.root / f"{tag}.waits", rng.choice((0, 2))
    first = _start(workspace, tag, workers, _pause_at_step(rng.randint(7, 16), marker))
    while not marker.exists():
        time.sleep(0.002)
        if first.poll():
            return f"the first ended: {first.output}", 0.0
    before = _stable_listing(workspace.folder(tag))
    second = _start(workspace, tag, workers)
    codes = second.wait(60)
    took = max(second.ended.values())
    holder = f"process {first.pids[0]} on {socket.gethostname()}"
    changed = _listing(workspace.folder(tag)) != before
    os.kill(first.pids[0], signal.SIGKILL)
    while not first.poll():
        time.sleep(0.001)
    third = _start(workspace, tag, workers, _pause_at_step(1, workspace.root / f"{tag}.in"))
    while not third.poll() and not (workspace.root / f"{tag}.in").exists():
        time.sleep(0.002)
    free = not third.codes
    first.kill()
    third.kill()
    if codes != [2] or holder not in second.output:
        return f"codes {codes}, not refused for {holder}:\n{second.output[-2000:]}", took
    if took > REFUSED_WITHIN or changed or not free:
        return f"refused after {took:.1f} s; folder changed: {changed}; free after kill -9: {free}", took
    return "", took


def _stable_listing(folder: Path) -> list:
    """Returns the listing of `folder` once the first run has finished writing."""
    before = _listing(folder)
    while True:
        time.sleep(0.2)
        now = _listing(folder)
        if now == before:
            return now
        before = now


def _listing(folder: Path) -> list:
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


def _pause_at_step(at: int, marker: Path) -> Inject:
    """Pauses the run before step number `at`."""

    def inject(rank: int) -> None:
        step, seen = train_step.train_step, []

        def paused_step(*args):
            seen.append(None)
            if len(seen) == at:
                marker.touch()
                time.sleep(1000)
            return step(*args)

        train_step.train_step = paused_step

    return inject


def _resume_with_shuffled_times(workspace: Workspace, tag: str, last_missing: bool, rng: random.Random) -> str:
    folder = workspace.checkpoints(tag)
    if last_missing:
        (folder / "last.pth").unlink()
    paths = sorted(folder.glob("*.pth"))
    images_seen = {path: read_checkpoint(str(path))["state"]["images_seen"] for path in paths}
    for path in paths:
        stamp = time.time() + rng.uniform(-YEARS, YEARS)
        os.utime(path, (stamp, stamp))
    again = _start(workspace, tag, 0, _set_clock_back if rng.random() < 0.5 else None)
    if any(again.wait()):
        return again.output[-3000:]
    largest = max(images_seen.values(), default=0)
    expected = f"after {largest:,} images" if largest else "epoch 0."
    if expected not in again.output:
        return f"not continued {expected}, of {images_seen}:\n{again.output[-3000:]}"
    return difference_of_runs(workspace, tag, "through")


def _set_clock_back(rank: int) -> None:
    now = time.time
    time.time = lambda: now() - YEARS
