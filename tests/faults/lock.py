"""Two runs in one folder, and which checkpoint a run continues from when clocks and time stamps lie.

A second start in the folder of a live run must be refused within 5 s, naming host and process, and change nothing;
when the first is killed with `kill -9` (the process alone, its loading processes live on for a while), the folder must
be free at once. Then all time stamps are shuffled, the clock goes back by years, and sometimes `last.pth` is gone: the
run must continue from the checkpoint with the most images on its own counter, and end as one that was never harmed.
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
from tests.faults.runs import Inject, Place, Start, adopt_orphans, difference_of_runs
from utils.checkpoint.io import read_checkpoint

REFUSED_WITHIN = 5.0  # seconds
YEARS = 10 * 365 * 86400.0


def run(count: int, seed: int) -> Report:
    """`count` folders."""
    tally, slowest = Report("one folder", seed), 0.0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        if any((start := _start(place, "through", 0)).wait()):
            raise RuntimeError(start.said)
        for trial in range(count):
            draws = random.Random(f"{seed}/{trial}")
            tag, gone = f"trial{trial}", draws.random() < 0.3
            wrong, took = _two_at_once(place, tag, draws)
            slowest = max(slowest, took)
            tally.add("second start refused, folder free after kill -9", not wrong, f"trial {trial}: {wrong}")
            wrong = _continue_at_odd_times(place, tag, gone, draws)
            what = "right checkpoint" + (", last.pth gone" if gone else "")
            tally.add(what, not wrong, f"trial {trial}: {wrong}")
    tally.note(f"longest until refused: {slowest:.1f} s (beside the import of PyTorch)")
    return tally


def _start(place: Place, tag: str, workers: int, inject: Inject | None = None) -> Start:
    return place.start(tag, "DATA.NUM_WORKERS", workers, "SAVE_KEEP", 0, "SAVE_STEPS", 1, inject=inject)


def _two_at_once(place: Place, tag: str, draws: random.Random) -> tuple[str, float]:
    """Leaves a folder with a killed run. What was wrong ("" for nothing), and the seconds until the refusal."""
    marker, workers = place.root / f"{tag}.waits", draws.choice((0, 2))
    first = _start(place, tag, workers, _waiting(draws.randint(7, 16), marker))
    while not marker.exists():
        time.sleep(0.002)
        if first.poll():
            return f"the first ended: {first.said}", 0.0
    before = _when_it_stays(place.folder(tag))
    second = _start(place, tag, workers)
    codes = second.wait(60)
    took = max(second.ended.values())
    holder = f"process {first.pids[0]} on {socket.gethostname()}"
    changed = _listing(place.folder(tag)) != before
    os.kill(first.pids[0], signal.SIGKILL)
    while not first.poll():
        time.sleep(0.001)
    third = _start(place, tag, workers, _waiting(1, place.root / f"{tag}.in"))
    while not third.poll() and not (place.root / f"{tag}.in").exists():
        time.sleep(0.002)
    free = not third.codes
    first.kill()
    third.kill()
    if codes != [2] or holder not in second.said:
        return f"codes {codes}, not refused for {holder}:\n{second.said[-2000:]}", took
    if took > REFUSED_WITHIN or changed or not free:
        return f"refused after {took:.1f} s; folder changed: {changed}; free after kill -9: {free}", took
    return "", took


def _when_it_stays(folder: Path) -> list:
    """The listing of `folder` once the first run has written what it saved last."""
    before = _listing(folder)
    while True:
        time.sleep(0.2)
        now = _listing(folder)
        if now == before:
            return now
        before = now


def _listing(folder: Path) -> list:
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


def _waiting(at: int, marker: Path) -> Inject:
    """Stands still before update number `at`."""

    def inject(rank: int) -> None:
        update, seen = train_step._update, []

        def waiting(*args):
            seen.append(None)
            if len(seen) == at:
                marker.touch()
                time.sleep(1000)
            return update(*args)

        train_step._update = waiting

    return inject


def _continue_at_odd_times(place: Place, tag: str, gone: bool, draws: random.Random) -> str:
    folder = place.checkpoints(tag)
    if gone:
        (folder / "last.pth").unlink()
    paths = sorted(folder.glob("*.pth"))
    clocks = {path: read_checkpoint(str(path))["state"]["images_seen"] for path in paths}
    for path in paths:
        stamp = time.time() + draws.uniform(-YEARS, YEARS)
        os.utime(path, (stamp, stamp))
    again = _start(place, tag, 0, _clock_back if draws.random() < 0.5 else None)
    if any(again.wait()):
        return again.said[-3000:]
    most = max(clocks.values(), default=0)
    expected = f"after {most:,} images" if most else "epoch 0."
    if expected not in again.said:
        return f"not continued {expected}, of {clocks}:\n{again.said[-3000:]}"
    return difference_of_runs(place, tag, "through")


def _clock_back(rank: int) -> None:
    now = time.time
    time.time = lambda: now() - YEARS
