"""Full disks, write errors and read-only folders during a save: earlier checkpoints must stay intact.

For each byte budget, from 0 to more than the size of a checkpoint:
- the kernel refuses to extend a file beyond it (RLIMIT_FSIZE);
- a file system of that size fills up (tmpfs; skipped with a note if it cannot be mounted);
- one of the system calls of a save (open, fsync, rename, link, …) fails with an error that disks return;
- for every fifth budget: the limit applies to a whole run of main.py; the same command then continues without it.

Afterwards the earlier checkpoints must be bitwise unchanged or the new one complete. The message must name the file and
a way out, without a traceback, and no partial file may be read as a checkpoint.
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
from tests.faults.corrupt import TIMEOUT_SECONDS, same
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.ESTALE)
FULL_RUN_EVERY = 5  # one budget in 5 limits a whole run
CALLS = ("open", "fsync", "replace", "link", "unlink")


def run(count: int, seed: int) -> Report:
    """Tests `count` byte budgets."""
    report = Report("failing disks", seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        args = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
        outcome = forked(lambda: run_main(args), TIMEOUT_SECONDS)
        if outcome.code != 0:
            raise RuntimeError(outcome.output)
        folder = root / "logs" / "tiny" / "default" / "checkpoints"
        size = (folder / "last.pth").stat().st_size
        expected = read_checkpoint(str(folder / "last.pth"))
        for case in range(count):
            rng = random.Random(f"{seed}/{case}")
            budget = round(1.1 * size * case / max(1, count - 1))
            checks = {
                "no file may grow longer": lambda b=budget: _save_with_file_limit(folder, root / "a", b),
                "the file system is full": lambda b=budget: _save_to_full_disk(folder, root / "b", b),
                "a call fails": lambda d=rng: _save_with_failing_call(folder, root / "c", d),
            }
            if case % FULL_RUN_EVERY == 0:
                checks["a run of main.py"] = lambda b=budget: _run_with_file_limit(root / "d", args, b, expected)
            for kind, check in checks.items():
                problem = check()
                if problem is None:
                    report.add(f"{kind}: SKIPPED, no file system could be mounted", True)
                else:
                    report.add(kind, not problem, f"budget {budget}, case {case}: {problem}")
    return report


def _save_with_file_limit(source: Path, scratch: Path, budget: int) -> str:
    folder = _copy(source, scratch)
    return _find_problem_after_save(folder, source, forked(lambda: _limit_file_size(budget) or _save(folder)))


def _limit_file_size(budget: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (budget, resource.RLIM_INFINITY))


def _save_to_full_disk(source: Path, scratch: Path, budget: int) -> str | None:
    """Saves to a tmpfs with about `budget` free bytes (rounded to pages). Returns None if none can be mounted."""
    scratch.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch], capture_output=True).returncode:
        return None
    try:
        folder = _copy(source, scratch / "run")
        disk = os.statvfs(scratch)
        taken = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        size = f"remount,size={taken + max(budget, 1)}"
        subprocess.run(["mount", "-o", size, scratch], check=True, capture_output=True)
        return _find_problem_after_save(folder, source, forked(lambda: _save(folder)))
    finally:
        subprocess.run(["umount", scratch], check=True, capture_output=True)


def _save_with_failing_call(source: Path, scratch: Path, rng: random.Random) -> str:
    folder = _copy(source, scratch)
    call, number, code = rng.choice(CALLS), rng.randrange(4), rng.choice(ERRORS)
    with _failing(call, number, code):
        outcome = forked(lambda: _save(folder))
    return _find_problem_after_save(folder, source, outcome)


@contextmanager
def _failing(call: str, number: int, code: int):
    """Makes `os.<call>` raise the error `code` from its `number`-th call on."""
    real: Callable = getattr(os, call)
    calls = iter(range(10**9))

    def failing(*args, **kwargs):
        if (
            next(calls) >= number
            and str(args[0]).check("checkpoints") >= 0
            or call == "fsync"
            and next(calls) >= number
        ):
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
    """Saves a fourth epoch in `folder` as a run does, and returns the exit code."""
    checkpoints = CheckpointFolder(folder, keep=3)
    contents = _next_checkpoint(read_checkpoint(str(checkpoints.last)))
    try:
        checkpoints.save(contents, epoch=4, best=True)
    except UserError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def _next_checkpoint(contents: dict) -> dict:
    """Returns a checkpoint with other weights and more images seen."""
    later = dict(contents)
    later["state"] = {**contents["state"], "images_seen": contents["state"]["images_seen"] + 8}
    later["model"] = {name: value + 1 for name, value in contents["model"].items()}
    return later


def _find_problem_after_save(folder: Path, source: Path, outcome: Outcome) -> str:
    """Checks `folder`, a copy of `source`, after a save there. Returns the problem or ""."""
    if "Traceback" in outcome.output or outcome.code not in (0, 2):
        return f"code {outcome.code}: {outcome.output}"
    if outcome.code == 2 and not (
        str(folder) in outcome.output and ".pth" in outcome.output and "room" in outcome.output
    ):
        return f"the message does not help: {outcome.output}"
    checkpoints = CheckpointFolder(folder, keep=3)
    checkpoints.prepare()
    if leftovers := [path.name for path in folder.iterdir() if path.suffix != ".pth"]:
        return f"left over: {leftovers}"
    for path in folder.iterdir():
        read_checkpoint(str(path))  # raises if it is damaged
    before = read_checkpoint(str(source / "last.pth"))
    found = checkpoints.newest()
    is_new = found is not None and same(found[1], _next_checkpoint(before))
    if found is None or not is_new and not same(found[1], before):
        return "the newest checkpoint is neither the old nor the new one"
    return "it reported success, but saved nothing" if outcome.code == 0 and not is_new else ""


def _run_with_file_limit(scratch: Path, args: list, budget: int, expected: dict) -> str:
    """Runs main.py with the limit, then without: it must end like an undisturbed run."""
    shutil.rmtree(scratch, ignore_errors=True)
    args = [*args[:-1], scratch]
    limited = forked(lambda: _limit_file_size(budget) or run_main(args), TIMEOUT_SECONDS)
    if limited.code not in (0, 2) or "Traceback" in limited.output:
        return f"code {limited.code}: {limited.output}"
    if limited.code == 2 and str(scratch) not in limited.output:
        return f"the message names no file: {limited.output}"
    again = forked(lambda: run_main(args), TIMEOUT_SECONDS)
    if again.code != 0:
        return f"again, code {again.code}: {again.output}"
    ended = torch.load(scratch / "tiny" / "default" / "checkpoints" / "last.pth", weights_only=True)
    return "" if same({**ended, "config": ""}, {**expected, "config": ""}) else "it ended with other weights"
