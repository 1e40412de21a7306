"""The folder of one run: its lock, its configuration, and the environment of each launch."""

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
from utils.locks import try_lock
from utils.paths import REPO_ROOT

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "yacs", "tensorboard", "triton")


class RunDir:
    """`<OUTPUT>/<MODEL.NAME>/<TAG>/`, which rank 0 of one live run at a time may write."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.log_file = path / "log.txt"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it for the body. The system frees the lock when this process ends in any way.

        Raises:
            UserError: another live process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}). Give another folder with --output") from error
        try:
            # fcntl's lock, not flock's: forked workers do not keep it when this process is killed, and it works across
            # machines on network file systems.
            consequence = "two runs in this folder would overwrite each other unnoticed"
            if not try_lock(fcntl.lockf, lock, self.path / "lock", consequence):
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{self.path}: another run is live in this folder ({holder}). Wait for it, or give this run "
                    "another name with --tag"
                )
            try:
                os.ftruncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error}). Free space, or give another folder with --output"
                ) from error
            yield
        finally:
            os.close(lock)

    def write_config(self, text: str) -> None:
        """Saves the run's configuration as YAML."""
        write_text(self.config_file, text)

    def launches(self) -> list[dict]:
        """Returns the launches recorded so far. Incomplete lines are left out."""
        path = self.path / "starts.jsonl"
        records = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in records if isinstance(record, dict)]

    def record_launch(self, details: dict) -> None:
        """Appends a line to `starts.jsonl`: time, command, git commit, versions, and `details`."""
        record = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **details, **collect_env()}
        append(self.path / "starts.jsonl", (json.dumps(record) + "\n").encode())


def collect_env() -> dict:
    """Returns what results depend on apart from the configuration: command, commit, versions, hardware."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def hardware() -> str:
    """Returns the name of the GPU, or of the CPU with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """Returns the commit of this code, with `+changes` if the working tree differs; None outside a git checkout."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *arguments], cwd=REPO_ROOT, capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if status.strip() else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
