"""utils/orphans.py: a worker that ignores SIGTERM ends with its parent, in whatever way that one ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.paths import REPO_ROOT

PARENT = """
import multiprocessing, os, signal, sys, time
from utils.orphans import end_with_parent

def work(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    ready.set()
    time.sleep(60)

context = multiprocessing.get_context("fork")
ready = context.Event()
worker = context.Process(target=work, args=(ready,), daemon=True)
worker.start()
ready.wait()
print(worker.pid, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(130)", "sys.exit(3)", "raise RuntimeError"])
def test_no_worker_is_left_and_none_is_waited_for(end: str):
    parent = subprocess.run(
        [sys.executable, "-c", PARENT.format(end=end)], cwd=REPO_ROOT, text=True, capture_output=True, timeout=30
    )
    worker, deadline = int(parent.stdout), time.monotonic() + 10
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker is left"
        time.sleep(0.005)
    assert parent.returncode == {"os._exit(130)": 130, "sys.exit(3)": 3, "raise RuntimeError": 1}.get(end, -9)
    assert parent.stderr.count("Traceback") == (end == "raise RuntimeError")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_whose_parent_is_gone_already_ends(monkeypatch: pytest.MonkeyPatch):
    from utils import orphans

    class Parent:
        pid = os.getppid() + 1

    ended = []
    monkeypatch.setattr(orphans, "_LIBC", object())
    monkeypatch.setattr(orphans.multiprocessing, "parent_process", Parent)
    monkeypatch.setattr(os, "_exit", ended.append)
    orphans.end_with_parent()
    assert ended == [1]
