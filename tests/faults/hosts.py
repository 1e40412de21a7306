"""Two hosts on one machine, made of Linux network namespaces. Each has its own address, host name and processes; a
virtual wire (veth) connects them, and they share a folder like the file system of a cluster.

    python -m tests.faults hosts --count 3 --seed 1

Training communicates with gloo over the wire. A host is killed (every process on it, `kill -9`) at a random moment:
`comes back`: torchrun waits for it, and the finished run is bitwise equal to an uninterrupted one;
`goes on alone`: torchrun --nnodes=1:2 continues on the other host, which keeps the global batch size by gradient
accumulation, and admits the killed host again when it comes back.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tests._report import Report
from tests._tiny import write_images, write_recipe
from utils.paths import REPO_ROOT

PORT = 29507
TRAIN, EPOCHS, BATCH = 400, 4, 8  # 100 steps of 16 images, 25 per epoch
TIMEOUT_SECONDS = 240  # for a whole run with its restarts


def unsupported_reason() -> str | None:
    """Returns why this machine cannot run two hosts, or None."""
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if _command("unshare", "--net", "--uts", "--mount", "true").returncode:
        return "this machine does not allow network namespaces"
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace `name` with one interface, which has `address`."""

    name: str
    interface: str
    address: str

    def start(self, args: list[str], names: Path, log: Path) -> subprocess.Popen:
        """Starts torchrun on this host. `names` becomes its /etc/hosts; the output is appended to `log`."""
        inside = f'hostname {self.name} && mount --bind {names} /etc/hosts && exec "$@"'
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--local-addr={self.address}", *args]
        settings = {
            "GLOO_SOCKET_IFNAME": self.interface,
            # torchrun (seen in 2.14) publishes the address of rank 0 only once if the store is shared: a host that
            # joins later would wait for it forever.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with open(log, "a") as output:
            return subprocess.Popen(
                [*command, *torchrun], env=os.environ | settings, cwd=REPO_ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def slow_down(self, mbits: int) -> None:
        """Limits what its wire sends to `mbits` million bits per second."""
        limit = ["tbf", "rate", f"{mbits}mbit", "burst", "64kb", "latency", "1s"]
        _check_command("ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", self.interface, "root", *limit)

    def sent(self) -> int:
        """Returns the bytes that it has sent over its wire."""
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(_command("ip", "netns", "exec", self.name, "cat", counter).stdout)

    def kill(self) -> None:
        """Kills every process on this host with `kill -9`, until none is left."""
        while pids := _command("ip", "netns", "pids", self.name).stdout.split():
            _command("kill", "-9", *pids)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Creates the hosts and the wire between them; at the end removes them and kills their processes."""
    mark = os.getpid() % 10000
    hosts = tuple(Host(f"swin{mark}{end}", f"wire{mark}{end}", f"10.77.3.{i}") for i, end in ((1, "a"), (2, "b")))
    with ExitStack() as stack:
        for host in hosts:
            _check_command("ip", "netns", "add", host.name)
            stack.callback(_command, "ip", "netns", "del", host.name)
            stack.callback(host.kill)
        one, other = hosts
        wire = ["type", "veth", "peer", "name", other.interface, "netns", other.name]
        _check_command("ip", "link", "add", one.interface, "netns", one.name, *wire)
        for host in hosts:
            _check_command("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _check_command("ip", "-n", host.name, "link", "set", "lo", "up")
            _check_command("ip", "-n", host.name, "link", "set", host.interface, "up")
        yield hosts


@dataclass(frozen=True)
class Cluster:
    """Two hosts and their shared folder: images, recipe, runs."""

    hosts: tuple[Host, Host]
    folder: Path

    def prepare(self) -> None:
        write_images(self.folder / "images", train=TRAIN, val=8)
        write_recipe(self.folder)
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.hosts)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, host: Host, tag: str, nodes: str, *more: str) -> subprocess.Popen:
        """Starts the command that a user would run on each host of a cluster; `more` are further keys and values."""
        args = [
            f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-id={tag}",
            f"--rdzv-endpoint={self.hosts[0].address}:{PORT}", "--rdzv-conf=last_call_timeout=2",
            "main.py", "--cfg", str(self.folder / "tiny.yaml"), "--data-path", str(self.folder / "images"),
            "--output", str(self.folder / "logs"), "--tag", tag, "--batch-size", str(BATCH),
            "--opts", "TRAIN.EPOCHS", str(EPOCHS), "SAVE_STEPS", "5", "SAVE_KEEP", "0", *more,
        ]  # fmt: skip
        return host.start(args, self.folder / "hosts", self.folder / f"{tag}-{host.name[-1]}.txt")

    def finished(self, tag: str) -> dict:
        return torch.load(self.folder / "logs" / "tiny" / tag / "checkpoints" / "last.pth", weights_only=True)

    def log_tails(self, tag: str) -> str:
        texts = [path.read_text()[-1500:] for path in sorted(self.folder.glob(f"{tag}-?.txt"))]
        return " | ".join(texts)

    def wait_for_step(self, tag: str, number: int, deadline: float) -> None:
        """Waits until the run has logged step `number`."""
        metrics = self.folder / "logs" / "tiny" / tag / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {number},' in metrics.read_text()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {number} was not reached: {self.log_tails(tag)}")
            time.sleep(0.05)


def run(count: int, seed: int) -> Report:
    """Kills `count` hosts of each kind."""
    report, rng = Report("hosts", seed), random.Random(seed)
    if reason := unsupported_reason():
        report.add("can run here", False, reason)
        return report
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        cluster = Cluster(hosts, Path(folder))
        cluster.prepare()
        report.add("two hosts train", *_train_on_both(cluster))
        for i in range(count):
            step = 2 * rng.randint(4, 40)
            report.add("killed, comes back: the same bits", *_kill_and_restart(cluster, f"back{i}", step))
            report.add("killed, the other goes on alone", *_continue_on_one(cluster, f"alone{i}", step))
    return report


def _train_on_both(cluster: Cluster) -> tuple[bool, str]:
    started = [cluster.start(host, "whole", "2") for host in cluster.hosts]
    codes = [process.wait(TIMEOUT_SECONDS) for process in started]
    return codes == [0, 0], f"exit codes {codes}: {cluster.log_tails('whole')}"


def _kill_and_restart(cluster: Cluster, tag: str, step: int) -> tuple[bool, str]:
    """Kills the second host after `step` and starts it again."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    first, second = (cluster.start(host, tag, "2") for host in cluster.hosts)
    cluster.wait_for_step(tag, step, deadline)
    cluster.hosts[1].kill()
    second.wait()
    second = cluster.start(cluster.hosts[1], tag, "2")
    codes = [process.wait(deadline - time.monotonic()) for process in (first, second)]
    if codes != [0, 0]:
        return False, f"killed after step {step}: exit codes {codes}: {cluster.log_tails(tag)}"
    whole, continued = cluster.finished("whole"), cluster.finished(tag)
    different = [
        f"{part}.{name}" for part in ("model", "ema") for name, tensor in whole[part].items()
        if not torch.equal(continued[part][name], tensor)
    ]  # fmt: skip
    return not different, f"killed after step {step}: {len(different)} tensors differ, such as {different[:3]}"


def _continue_on_one(cluster: Cluster, tag: str, step: int) -> tuple[bool, str]:
    """Kills the second host after `step`, lets the first continue alone, and starts the second again."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    first, second = (cluster.start(host, tag, "1:2") for host in cluster.hosts)
    cluster.wait_for_step(tag, step, deadline)
    cluster.hosts[1].kill()
    second.wait()
    cluster.wait_for_step(tag, step + 8, deadline)  # the first host alone
    second = cluster.start(cluster.hosts[1], tag, "1:2")
    codes = [process.wait(deadline - time.monotonic()) for process in (first, second)]
    starts = (cluster.folder / "logs" / "tiny" / tag / "starts.jsonl").read_text()
    alone = starts.count('"world_size": 1,') > 0
    whole, continued = cluster.finished("whole"), cluster.finished(tag)
    same_images_seen = continued["state"]["images_seen"] == whole["state"]["images_seen"]
    largest_difference = max(float((continued["model"][n] - t).abs().max()) for n, t in whole["model"].items())
    found = f"exit codes {codes}, was alone: {alone}, same images seen: {same_images_seen}"
    found += f", largest difference of the weights {largest_difference:.2g}"
    ok = codes == [0, 0] and alone and same_images_seen
    return ok, f"killed after step {step}: {found}: {cluster.log_tails(tag)}"


def _command(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def _check_command(*command: str) -> None:
    done = _command(*command)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
