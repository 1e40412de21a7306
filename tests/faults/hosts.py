"""Two hosts on one machine, by Linux network namespaces: each has an address, a host name and a process list of its own
for what is killed on it; a wire (veth) joins them, and a folder is shared as on a cluster's file system.

    python -m tests.faults hosts --count 3 --seed 1

Training goes over gloo across the wire. A host is killed (every process on it, `kill -9`) at a random moment:
`comes back`: torchrun waits for it, and the finished run is equal to the bit to one that was never interrupted;
`goes on alone`: torchrun --nnodes=1:2 continues on the host that is left, which holds the global batch by accumulation,
and takes the other in again when it comes back.
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
TRAIN, EPOCHS, BATCH = 400, 4, 8  # 100 updates of 16 images, 25 an epoch
PATIENCE = 240  # seconds for a whole run with its restarts


def unsupported_reason() -> str | None:
    """What this machine lacks for two hosts, or None."""
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if _said("unshare", "--net", "--uts", "--mount", "true").returncode:
        return "this machine does not allow network namespaces"
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace `name` with one interface, which has `address`."""

    name: str
    interface: str
    address: str

    def start(self, words: list[str], names: Path, log: Path) -> subprocess.Popen:
        """Starts torchrun on this host; `names` is its /etc/hosts, and what it says is appended to `log`."""
        inside = f'hostname {self.name} && mount --bind {names} /etc/hosts && exec "$@"'
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--local-addr={self.address}", *words]
        settings = {
            "GLOO_SOCKET_IFNAME": self.interface,
            # torchrun (seen in 2.14) tells the address of rank 0 once and then remembers it: a host that comes in fresh
            # later waits for it in vain, unless the store is not shared.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with open(log, "a") as said:
            return subprocess.Popen(
                [*command, *torchrun], env=os.environ | settings, cwd=REPO_ROOT, stdout=said, stderr=subprocess.STDOUT
            )

    def slow_down(self, mbits: int) -> None:
        """From now on its wire sends no more than `mbits` million bits a second."""
        limit = ["tbf", "rate", f"{mbits}mbit", "burst", "64kb", "latency", "1s"]
        _must("ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", self.interface, "root", *limit)

    def sent(self) -> int:
        """Bytes that it has sent over its wire."""
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(_said("ip", "netns", "exec", self.name, "cat", counter).stdout)

    def kill(self) -> None:
        """`kill -9` to every process on this host, until none is left."""
        while pids := _said("ip", "netns", "pids", self.name).stdout.split():
            _said("kill", "-9", *pids)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Makes the hosts and the wire between them, and takes them away with all that runs on them."""
    mark = os.getpid() % 10000
    hosts = tuple(Host(f"swin{mark}{end}", f"wire{mark}{end}", f"10.77.3.{i}") for i, end in ((1, "a"), (2, "b")))
    with ExitStack() as stack:
        for host in hosts:
            _must("ip", "netns", "add", host.name)
            stack.callback(_said, "ip", "netns", "del", host.name)
            stack.callback(host.kill)
        one, other = hosts
        wire = ["type", "veth", "peer", "name", other.interface, "netns", other.name]
        _must("ip", "link", "add", one.interface, "netns", one.name, *wire)
        for host in hosts:
            _must("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _must("ip", "-n", host.name, "link", "set", "lo", "up")
            _must("ip", "-n", host.name, "link", "set", host.interface, "up")
        yield hosts


@dataclass(frozen=True)
class Cluster:
    """Two hosts and the folder that they share: images, recipe, runs."""

    hosts: tuple[Host, Host]
    folder: Path

    def prepare(self) -> None:
        write_images(self.folder / "images", train=TRAIN, val=8)
        write_recipe(self.folder)
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.hosts)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, host: Host, tag: str, nodes: str, *more: str) -> subprocess.Popen:
        """The same command on each host, as a user would type it on a cluster; `more` are further keys and values."""
        words = [
            f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-id={tag}",
            f"--rdzv-endpoint={self.hosts[0].address}:{PORT}", "--rdzv-conf=last_call_timeout=2",
            "main.py", "--cfg", str(self.folder / "tiny.yaml"), "--data-path", str(self.folder / "images"),
            "--output", str(self.folder / "logs"), "--tag", tag, "--batch-size", str(BATCH),
            "--opts", "TRAIN.EPOCHS", str(EPOCHS), "SAVE_STEPS", "5", "SAVE_KEEP", "0", *more,
        ]  # fmt: skip
        return host.start(words, self.folder / "hosts", self.folder / f"{tag}-{host.name[-1]}.txt")

    def finished(self, tag: str) -> dict:
        return torch.load(self.folder / "logs" / "tiny" / tag / "checkpoints" / "last.pth", weights_only=True)

    def last_words(self, tag: str) -> str:
        texts = [path.read_text()[-1500:] for path in sorted(self.folder.glob(f"{tag}-?.txt"))]
        return " | ".join(texts)

    def wait_for_update(self, tag: str, number: int, deadline: float) -> None:
        """Waits until the run has logged update `number`."""
        metrics = self.folder / "logs" / "tiny" / tag / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {number},' in metrics.read_text()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"update {number} was not reached: {self.last_words(tag)}")
            time.sleep(0.05)


def run(count: int, seed: int) -> Report:
    """`count` killed hosts of each kind."""
    tally, draw = Report("hosts", seed), random.Random(seed)
    if reason := unsupported_reason():
        tally.add("can run here", False, reason)
        return tally
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        cluster = Cluster(hosts, Path(folder))
        cluster.prepare()
        tally.add("two hosts train", *_together(cluster))
        for i in range(count):
            update = 2 * draw.randint(4, 40)
            tally.add("killed, comes back: the same bits", *_comes_back(cluster, f"back{i}", update))
            tally.add("killed, the other goes on alone", *_goes_on_alone(cluster, f"alone{i}", update))
    return tally


def _together(cluster: Cluster) -> tuple[bool, str]:
    started = [cluster.start(host, "whole", "2") for host in cluster.hosts]
    codes = [process.wait(PATIENCE) for process in started]
    return codes == [0, 0], f"exit codes {codes}: {cluster.last_words('whole')}"


def _comes_back(cluster: Cluster, tag: str, update: int) -> tuple[bool, str]:
    """Kills the second host after `update`, and starts it again."""
    deadline = time.monotonic() + PATIENCE
    first, second = (cluster.start(host, tag, "2") for host in cluster.hosts)
    cluster.wait_for_update(tag, update, deadline)
    cluster.hosts[1].kill()
    second.wait()
    second = cluster.start(cluster.hosts[1], tag, "2")
    codes = [process.wait(deadline - time.monotonic()) for process in (first, second)]
    if codes != [0, 0]:
        return False, f"killed after update {update}: exit codes {codes}: {cluster.last_words(tag)}"
    whole, continued = cluster.finished("whole"), cluster.finished(tag)
    different = [
        f"{part}.{name}" for part in ("model", "ema") for name, tensor in whole[part].items()
        if not torch.equal(continued[part][name], tensor)
    ]  # fmt: skip
    return not different, f"killed after update {update}: {len(different)} tensors differ, such as {different[:3]}"


def _goes_on_alone(cluster: Cluster, tag: str, update: int) -> tuple[bool, str]:
    """Kills the second host after `update`, lets the first go on alone, and starts the second again."""
    deadline = time.monotonic() + PATIENCE
    first, second = (cluster.start(host, tag, "1:2") for host in cluster.hosts)
    cluster.wait_for_update(tag, update, deadline)
    cluster.hosts[1].kill()
    second.wait()
    cluster.wait_for_update(tag, update + 8, deadline)  # without the other
    second = cluster.start(cluster.hosts[1], tag, "1:2")
    codes = [process.wait(deadline - time.monotonic()) for process in (first, second)]
    starts = (cluster.folder / "logs" / "tiny" / tag / "starts.jsonl").read_text()
    alone = starts.count('"processes": 1,') > 0
    whole, continued = cluster.finished("whole"), cluster.finished(tag)
    same_clock = continued["state"]["images_seen"] == whole["state"]["images_seen"]
    furthest = max(float((continued["model"][n] - t).abs().max()) for n, t in whole["model"].items())
    found = f"exit codes {codes}, was alone: {alone}, same end: {same_clock}, weights differ by {furthest:.2g} at most"
    ok = codes == [0, 0] and alone and same_clock
    return ok, f"killed after update {update}: {found}: {cluster.last_words(tag)}"


def _said(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def _must(*command: str) -> None:
    done = _said(*command)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
