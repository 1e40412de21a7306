"""Starts runs of main.py for the harnesses, and compares their results.

The ranks are forked from a process that has imported everything, so a start takes a fraction of a second. All ranks of
a run and their loader workers form one process group, so that `kill -9` reaches all of them at once.
"""

import ctypes
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import main
import utils.tracking.run_dir
from tests._forked import load_native_parts
from tests._tiny import write_images, write_recipe
from utils.checkpoint.io import read_checkpoint

TIMEOUT_SECONDS = 300.0  # for one start; an undisturbed run takes two seconds on an idle machine
TRAIN, VAL, BATCH = 44, 10, 8  # an epoch is 5.5 steps, so one step spans two epochs
Inject = Callable[[int], None]  # called with the rank, in its process, before main


class Start:
    """One start of a run: the processes of all its ranks."""

    def __init__(self, argv: list, processes: int, log: Path, inject: Inject | None = None, agent: bool = False):
        """`agent`: a separate process hosts the rendezvous store, as torchrun does, instead of rank 0."""
        self.argv = [str(word) for word in argv]
        self.log = log
        self.began = time.monotonic()
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}  # by pid; negative: the signal
        self.ended: dict[int, float] = {}  # by pid, seconds after `began`
        load_native_parts()
        port = free_port()
        sys.stdout.flush()
        self._agent = _fork_agent(port) if agent else 0
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, processes, port, inject, agent)
            self.pids.append(pid)
            os.setpgid(pid, self.group)

    @property
    def group(self) -> int:
        return self.pids[0]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> bool:
        """Returns whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    self.ended[pid] = time.monotonic() - self.began
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> list[int | None]:
        """Returns the exit codes by rank once all have ended. Ranks still running after `seconds` are killed: None."""
        until = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < until:
            time.sleep(0.005)
        codes = [self.codes.get(pid) for pid in self.pids]
        self.kill()
        return codes

    def kill(self) -> None:
        """Kills all processes of this start with `kill -9`, and returns when they are gone."""
        try:
            os.killpg(self.group, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        if self._agent:
            os.kill(self._agent, signal.SIGKILL)
            os.waitpid(self._agent, 0)
            self._agent = 0
        while True:
            try:
                pid, status = os.waitpid(-self.group, 0)
            except ChildProcessError:
                return
            self.codes.setdefault(pid, os.waitstatus_to_exitcode(status))
            self.ended.setdefault(pid, time.monotonic() - self.began)

    def _be_rank(self, rank: int, processes: int, port: int, inject: Inject | None, agent: bool) -> None:
        """Runs rank `rank` in the child; never returns."""
        code = 1
        try:
            os.setpgid(0, self.group if self.pids else 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in ranks.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(agent))
            random.seed()
            utils.tracking.run_dir.git_commit = lambda: None  # saves starting git
            if inject is not None:
                inject(rank)
            code = main.main(self.argv)
            threading._shutdown()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _fork_agent(port: int) -> int:
    """Forks a process that only hosts the rendezvous store."""
    pid = os.fork()
    if pid:
        return pid
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store is not None:
        signal.pause()
    os._exit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of workers whose parent was killed, so that it can wait for their end."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Workspace:
    """The folder with the images, the recipe and all runs of a harness."""

    def __init__(self, root: Path, train: int = TRAIN, val: int = VAL):
        self.root = root
        self.recipe = write_recipe(root)
        self.images = write_images(root / "images", train, val)

    def argv(self, tag: str, *opts: object, batch: int = BATCH, args: tuple = ()) -> list:
        """Returns the command line of the run `tag`, with `batch` images per micro-batch."""
        where = ["--data-path", self.images, "--output", self.root / "logs", "--tag", tag, "--batch-size", batch]
        return ["--cfg", self.recipe, *where, *args, *(["--opts", *opts] if opts else [])]

    def folder(self, tag: str) -> Path:
        return self.root / "logs" / "tiny" / tag

    def checkpoints(self, tag: str) -> Path:
        return self.folder(tag) / "checkpoints"

    def start(
        self, tag: str, *opts: object, processes: int = 1, inject: Inject | None = None, agent: bool = False, **more
    ) -> Start:
        """Starts the run; the output is appended to `<tag>.log`. `opts`: KEY VALUE …; `more`: arguments of `argv`."""
        return Start(self.argv(tag, *opts, **more), processes, self.root / f"{tag}.log", inject, agent)


def last(workspace: Workspace, tag: str) -> dict:
    return read_checkpoint(str(workspace.checkpoints(tag) / "last.pth"))


def difference(one: object, other: object, where: str = "") -> str:
    """Returns where two nested structures first differ in any bit, or ""."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return "" if same_kind and torch.equal(_as_bytes(one), _as_bytes(other)) else where
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: different keys"
        return next(filter(None, (difference(one[key], other[key], f"{where}.{key}") for key in one)), "")
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{where}.{i}") for i, (a, b) in pairs)), "")
    return "" if type(one) is type(other) and one == other else f"{where}: {one!r} and {other!r}"


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def difference_of_runs(workspace: Workspace, tag: str, reference: str) -> str:
    """Returns the first difference between two finished runs other than their names and numbers of starts, or ""."""
    one, other = workspace.checkpoints(tag), workspace.checkpoints(reference)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    if names[0] != names[1]:
        return f"checkpoints {names[0]} and {names[1]}"
    for name in names[0]:
        pair = [{**read_checkpoint(str(folder / name)), "config": ""} for folder in (one, other)]
        if found := difference(*pair):
            return f"{name}{found}"
    if found := difference(
        records(workspace.folder(tag), "epoch"), records(workspace.folder(reference), "epoch"), "epochs"
    ):
        return found
    steps = [record["step"] for record in records(workspace.folder(tag), "train")]
    return "" if steps == sorted(set(steps)) else f"steps in metrics.jsonl: {steps}"
