"""The folder of one run: who may write into it, which configuration it belongs to, and under what it ran."""

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import append, write_text
from utils.paths import REPO_ROOT

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "yacs", "tensorboard", "triton")


class RunDir:
    """`<OUTPUT>/<MODEL.NAME>/<TAG>/`, written by rank 0 of one live run at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.log_file = path / "log.txt"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and holds its lock, which is free again when this process ends, however it ends.

        Raises:
            UserError: another live process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}). Give another folder with --output") from error
        try:
            try:
                # A lock of this process alone (fcntl's, not flock's): the workers that it forks do not hold it on when
                # it is killed, and network file systems have it across machines.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{self.path}: another run is live in this folder ({holder}). Wait for it, or give this run a name "
                    "of its own with --tag"
                ) from error
            try:
                os.ftruncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:
                said = f"{self.path}: cannot be written ({error}). Make room, or give another folder with --output"
                raise UserError(said) from error
            yield
        finally:
            os.close(lock)

    def write_config(self, text: str) -> None:
        write_text(self.config_file, text)

    def record_launch(self, details: dict) -> None:
        """Adds this start to `starts.jsonl`: time, command, git commit, versions, and `details`."""
        record = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **details, **collect_env()}
        append(self.path / "starts.jsonl", (json.dumps(record) + "\n").encode())


def collect_env() -> dict:
    """What a figure depends on beside the configuration: command, commit, versions, hardware."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def hardware() -> str:
    """The GPU's name, or the CPU's with the number of threads used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """The commit of the code that runs, with `+changes` where the working tree differs; None outside a checkout."""
    here = REPO_ROOT
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if status.strip() else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
