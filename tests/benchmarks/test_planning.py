"""The planning page's model, held against its own arithmetic and against two real processes with a slow wire."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import planning
from benchmarks.planning import Cluster, Plan, Size
from tests.faults import hosts
from utils.paths import REPO_ROOT

TINY = Size(parameters=28_000_000, macs=4_500_000_000)


def test_one_gpu_sends_nothing_and_computes_all_the_time():
    plan = Plan(TINY, Cluster(gpu_tflops=100, mfu=0.27), gpus=1, images=100)
    assert plan.sent == 0
    assert plan.seconds == pytest.approx(0.1)  # 6 operations x 4.5 G x 100 images at 27 TFLOP/s
    assert plan.images_per_second == pytest.approx(1000)
    assert plan.bottleneck == "arithmetic"


def test_a_slow_wire_between_nodes_ends_first():
    plan = Plan(TINY, Cluster(node_gbits=8), gpus=16, images=64)
    assert plan.sent == pytest.approx(2 * 15 / 16 * 112e6)
    assert plan.network == pytest.approx(0.21)
    assert plan.seconds == pytest.approx(0.21 + plan.compute / 3)
    assert plan.bottleneck == "network"


@pytest.mark.parametrize(("slow", "ends"), [({"images_per_core": 20}, "cores"), ({"read_gbytes": 0.1}, "storage")])
def test_images_that_come_too_slowly_end_first(slow: dict, ends: str):
    assert Plan(TINY, Cluster(**slow), gpus=8, images=128).bottleneck == ends


def test_the_page_is_that_of_the_repository():
    committed = (REPO_ROOT / "docs" / "reports" / "PLANNING.md").read_text()
    assert planning.page(Cluster()) == committed


def test_assumptions_are_checked(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        planning.main(["--mfu", "0"])
    assert stopped.value.code == 2
    assert "--mfu must be more than 0" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_and_time_are_those_of_two_real_hosts_with_a_slow_wire(tmp_path: Path):
    if reason := hosts.unsupported_reason():
        pytest.skip(reason)
    with hosts.two_hosts() as pair:
        cluster = hosts.Cluster(pair, tmp_path)
        cluster.prepare()
        keys = ("MODEL.SWIN.EMBED_DIM", "48", "TRAIN.EPOCHS", "2", "SAVE_STEPS", "0", "TRAIN.EMA_DECAY", "0")

        def train(tag: str) -> tuple[float, float]:
            """Bytes that the second host sent, and the median of the seconds, for an update."""
            before = pair[1].sent()
            started = [cluster.start(host, tag, "2", *keys) for host in pair]
            assert [process.wait(hosts.PATIENCE) for process in started] == [0, 0], cluster.last_words(tag)
            lines = (tmp_path / "logs" / "tiny" / tag / "metrics.jsonl").read_text().splitlines()
            speeds = [record["images_per_second"] for line in lines if "loss" in (record := json.loads(line))]
            updates = 2 * hosts.TRAIN / (2 * hosts.BATCH)
            return (pair[1].sent() - before) / updates, 2 * hosts.BATCH / statistics.median(speeds)

        _, compute = train("fast")
        mbits = 20
        for host in pair:
            host.slow_down(mbits)
        sent, seconds = train("slow")
        saved = tmp_path / "logs" / "tiny" / "slow" / "checkpoints" / "last.pth"
        weights = torch.load(saved, weights_only=True)["model"]
    size = Size(sum(weight.numel() for weight in weights.values()), macs=0)
    assumed = Cluster(gpus_per_node=1, node_gbits=mbits / 1e3)
    plan = Plan(size, assumed, gpus=2, images=hosts.BATCH)
    assert plan.sent < sent < 1.15 * plan.sent  # headers, and the other things that processes tell each other
    assert plan.network > 2 * compute, "the wire was to be the slowest"
    assert seconds == pytest.approx(plan.network + compute / 3, rel=0.25)
    assert plan.checkpoint < saved.stat().st_size < 1.1 * plan.checkpoint + 2e5
