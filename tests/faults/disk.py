"""Full disks, write errors and folders that cannot be written, during a save: what was saved before stays as it was.

Three ways for each byte budget, which runs from 0 to beyond the size of a checkpoint, and one for every fifth:
- the kernel refuses to make a file longer (RLIMIT_FSIZE);
- a file system of that size fills up (tmpfs; left out, and said, where it cannot be mounted);
- one of the calls that a save consists of fails (open, fsync, rename, link, …) with one of the errors that disks give;
- the limit strikes a whole run of main.py, its records included; then the same command continues without it.

Each time the checkpoints from before must be equal to the bit, or the new one whole; the message must name the file and
a way out, with no traceback; and nothing half-written may be taken for a checkpoint.
"""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from tests._forked import Outcome, forked
from tests._report import Report
from tests._tiny import run_main, write_images, write_recipe
from tests.faults.corrupt import PATIENCE, same
from utils.checkpoint.io import CheckpointFolder, read_checkpoint
from utils.errors import UserError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.ESTALE)
EVERY = 5  # budgets for one that strikes a whole run
CALLS = ("open", "fsync", "replace", "link", "unlink")


def run(count: int, seed: int) -> Report:
    """`count` byte budgets."""
    tally = Report("failing disks", seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        words = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        made = forked(lambda: run_main(words), PATIENCE)
        if made.code != 0:
            raise RuntimeError(made.said)
        folder = root / "logs" / "tiny" / "default" / "checkpoints"
        size = (folder / "last.pth").stat().st_size
        final = read_checkpoint(str(folder / "last.pth"))
        for case in range(count):
            draws = random.Random(f"{seed}/{case}")
            budget = round(1.1 * size * case / max(1, count - 1))
            ways = {
                "no file may grow longer": lambda b=budget: _limited(folder, root / "a", b),
                "the file system is full": lambda b=budget: _full(folder, root / "b", b),
                "a call fails": lambda d=draws: _failing_call(folder, root / "c", d),
            }
            if case % EVERY == 0:
                ways["a run of main.py"] = lambda b=budget: _whole_run(root / "d", words, b, final)
            for what, find in ways.items():
                wrong = find()
                if wrong is None:
                    tally.add(f"{what}: LEFT OUT, no file system could be mounted", True)
                else:
                    tally.add(what, not wrong, f"budget {budget}, case {case}: {wrong}")
    return tally


def _limited(source: Path, scratch: Path, budget: int) -> str:
    folder = _copy(source, scratch)
    return _wrong_after(folder, source, forked(lambda: _limit(budget) or _save(folder)))


def _limit(budget: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (budget, resource.RLIM_INFINITY))


def _full(source: Path, scratch: Path, budget: int) -> str | None:
    """On a tmpfs whose room beside what is there is about `budget` (it counts in pages)."""
    scratch.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch], capture_output=True).returncode:
        return None
    try:
        folder = _copy(source, scratch / "run")
        disk = os.statvfs(scratch)
        taken = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        size = f"remount,size={taken + max(budget, 1)}"
        subprocess.run(["mount", "-o", size, scratch], check=True, capture_output=True)
        return _wrong_after(folder, source, forked(lambda: _save(folder)))
    finally:
        subprocess.run(["umount", scratch], check=True, capture_output=True)


def _failing_call(source: Path, scratch: Path, draws: random.Random) -> str:
    folder = _copy(source, scratch)
    call, number, code = draws.choice(CALLS), draws.randrange(4), draws.choice(ERRORS)
    with _fails(call, number, code):
        outcome = forked(lambda: _save(folder))
    return _wrong_after(folder, source, outcome)


@contextmanager
def _fails(call: str, number: int, code: int):
    """From the `number`-th on, `os.<call>` raises the error `code`."""
    real: Callable = getattr(os, call)
    calls = iter(range(10**9))

    def failing(*args, **kwargs):
        if next(calls) >= number and str(args[0]).find("checkpoints") >= 0 or call == "fsync" and next(calls) >= number:
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **kwargs)

    setattr(os, call, failing)
    try:
        yield
    finally:
        setattr(os, call, real)


def _copy(source: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(source, scratch / "checkpoints"))


def _save(folder: Path) -> int:
    """Saves a fourth epoch in `folder`, as a run does; returns the exit code that its answer means."""
    checkpoints = CheckpointFolder(folder, keep=3)
    contents = _fourth(read_checkpoint(str(checkpoints.last)))
    try:
        checkpoints.save(contents, epoch=4, best=True)
    except UserError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def _fourth(contents: dict) -> dict:
    """Another checkpoint, later on the clock."""
    later = dict(contents)
    later["state"] = {**contents["state"], "images_seen": contents["state"]["images_seen"] + 8}
    later["model"] = {name: value + 1 for name, value in contents["model"].items()}
    return later


def _wrong_after(folder: Path, source: Path, outcome: Outcome) -> str:
    """What is wrong with the checkpoints in `folder`, a copy of `source`, or with the answer, after a save there."""
    if "Traceback" in outcome.said or outcome.code not in (0, 2):
        return f"code {outcome.code}: {outcome.said}"
    if outcome.code == 2 and not (str(folder) in outcome.said and ".pth" in outcome.said and "room" in outcome.said):
        return f"the message does not help: {outcome.said}"
    checkpoints = CheckpointFolder(folder, keep=3)
    checkpoints.prepare()
    if leftovers := [path.name for path in folder.iterdir() if path.suffix != ".pth"]:
        return f"left over: {leftovers}"
    for path in folder.iterdir():
        read_checkpoint(str(path))  # whole, every one
    before = read_checkpoint(str(source / "last.pth"))
    found = checkpoints.newest()
    is_new = found is not None and same(found[1], _fourth(before))
    if found is None or not is_new and not same(found[1], before):
        return "the newest checkpoint is neither the old nor the new one"
    return "it said nothing, and saved nothing" if outcome.code == 0 and not is_new else ""


def _whole_run(scratch: Path, words: list, budget: int, final: dict) -> str:
    """main.py under the limit, then without: it must end as a run that had room all the time."""
    shutil.rmtree(scratch, ignore_errors=True)
    words = [*words[:-1], scratch]
    limited = forked(lambda: _limit(budget) or run_main(words), PATIENCE)
    if limited.code not in (0, 2) or "Traceback" in limited.said:
        return f"code {limited.code}: {limited.said}"
    if limited.code == 2 and str(scratch) not in limited.said:
        return f"the message names no file: {limited.said}"
    again = forked(lambda: run_main(words), PATIENCE)
    if again.code != 0:
        return f"again, code {again.code}: {again.said}"
    ended = torch.load(scratch / "tiny" / "default" / "checkpoints" / "last.pth", weights_only=True)
    return "" if same({**ended, "config": ""}, {**final, "config": ""}) else "it ended with other weights"
