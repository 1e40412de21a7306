"""Runs of main.py to be harmed: real processes, forked from one that has imported everything, so that a start takes a
fraction of a second; and the comparison of what they leave.

A run's processes, and the workers that they fork, are one process group: `kill -9` hits them all in the same moment.
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

PATIENCE = 300.0  # seconds for one start; a run takes two, on a machine that does nothing else
TRAIN, VAL, BATCH = 44, 10, 8  # an epoch is five and a half updates, which reach over its end
Inject = Callable[[int], None]  # called with the rank, in its process, before main


class Start:
    """One start of a run: the processes of all its ranks."""

    def __init__(self, argv: list, processes: int, log: Path, inject: Inject | None = None, agent: bool = False):
        """`agent`: another process keeps the list of processes, as torchrun does, instead of rank 0."""
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
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    self.ended[pid] = time.monotonic() - self.began
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit codes by rank, once all have ended; None for those that have not by then, which are killed."""
        until = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < until:
            time.sleep(0.005)
        codes = [self.codes.get(pid) for pid in self.pids]
        self.kill()
        return codes

    def kill(self) -> None:
        """`kill -9` to everything that belongs to this start; returns when all of it is gone."""
        try:
            os.killpg(self.group, signal.SIGKILL)
        except ProcessLookupError:
            pass  # none is left but perhaps the dead
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
        """The child: never returns."""
        code = 1
        try:
            os.setpgid(0, self.group if self.pids else 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(agent))
            random.seed()
            utils.tracking.run_dir.git_commit = lambda: None  # asks git, and nothing depends on the answer
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
    """A process that does nothing but keep the store over which processes find each other."""
    pid = os.fork()
    if pid:
        return pid
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store is not None:
        signal.pause()
    os._exit(1)


def adopt_orphans() -> None:
    """Workers whose parent was killed become children of this process, which can then wait for their end."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Place:
    """A folder with the images, the recipe and all runs of a harness."""

    def __init__(self, root: Path, train: int = TRAIN, val: int = VAL):
        self.root = root
        self.recipe = write_recipe(root)
        self.images = write_images(root / "images", train, val)

    def argv(self, tag: str, *opts: object, batch: int = BATCH, words: tuple = ()) -> list:
        """The command line of the run `tag`; `batch` images for each process and micro-batch."""
        where = ["--data-path", self.images, "--output", self.root / "logs", "--tag", tag, "--batch-size", batch]
        return ["--cfg", self.recipe, *where, *words, *(["--opts", *opts] if opts else [])]

    def folder(self, tag: str) -> Path:
        return self.root / "logs" / "tiny" / tag

    def checkpoints(self, tag: str) -> Path:
        return self.folder(tag) / "checkpoints"

    def start(
        self, tag: str, *opts: object, processes: int = 1, inject: Inject | None = None, agent: bool = False, **more
    ) -> Start:
        """`opts`: KEY VALUE …; `more`: what else `argv` takes. What the run says is added to `<tag>.log`."""
        return Start(self.argv(tag, *opts, **more), processes, self.root / f"{tag}.log", inject, agent)


def last(place: Place, tag: str) -> dict:
    return read_checkpoint(str(place.checkpoints(tag) / "last.pth"))


def difference(one: object, other: object, where: str = "") -> str:
    """Where the two differ in a single bit, all the way down; "" for nowhere."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return "" if alike and torch.equal(_bytes_of(one), _bytes_of(other)) else where
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: other entries"
        return next(filter(None, (difference(one[key], other[key], f"{where}.{key}") for key in one)), "")
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{where}.{i}") for i, (a, b) in pairs)), "")
    return "" if type(one) is type(other) and one == other else f"{where}: {one!r} and {other!r}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def difference_of_runs(place: Place, tag: str, reference: str) -> str:
    """What the finished run `tag` has otherwise than `reference`, beside its name and how often it was started."""
    one, other = place.checkpoints(tag), place.checkpoints(reference)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    if names[0] != names[1]:
        return f"checkpoints {names[0]} and {names[1]}"
    for name in names[0]:
        pair = [{**read_checkpoint(str(folder / name)), "config": ""} for folder in (one, other)]
        if found := difference(*pair):
            return f"{name}{found}"
    if found := difference(records(place.folder(tag), "epoch"), records(place.folder(reference), "epoch"), "epochs"):
        return found
    updates = [record["step"] for record in records(place.folder(tag), "train")]
    return "" if updates == sorted(set(updates)) else f"updates in metrics.jsonl: {updates}"
