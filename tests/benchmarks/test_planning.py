"""benchmarks/planning.py: the model's arithmetic, and its predictions for two real hosts on a slow link."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import planning
from benchmarks.planning import Cluster, ModelSize, Plan
from tests.faults import hosts
from utils.paths import REPO_ROOT

TINY = ModelSize(parameters=28_000_000, macs=4_500_000_000)


def test_one_gpu_sends_nothing():
    plan = Plan(TINY, Cluster(gpu_tflops=100, mfu=0.27), gpus=1, images=100)
    assert plan.sent == 0
    assert plan.seconds == pytest.approx(0.1)  # 6 operations x 4.5 G x 100 images at 27 TFLOP/s
    assert plan.images_per_second == pytest.approx(1000)
    assert plan.bottleneck == "arithmetic"


def test_slow_link_between_nodes_is_the_bottleneck():
    plan = Plan(TINY, Cluster(node_gbits=8), gpus=16, images=64)
    assert plan.sent == pytest.approx(2 * 15 / 16 * 112e6)
    assert plan.network == pytest.approx(0.21)
    assert plan.seconds == pytest.approx(0.21 + plan.compute / 3)
    assert plan.bottleneck == "network"


@pytest.mark.parametrize(
    ("slow", "bottleneck"), [({"images_per_core": 20}, "cores"), ({"read_gbytes": 0.1}, "storage")]
)
def test_slow_images_are_the_bottleneck(slow: dict, bottleneck: str):
    assert Plan(TINY, Cluster(**slow), gpus=8, images=128).bottleneck == bottleneck


def test_committed_page_is_up_to_date():
    committed = (REPO_ROOT / "docs" / "reports" / "PLANNING.md").read_text()
    assert planning.make_page(Cluster()) == committed


def test_assumptions_are_checked(capsys: pytest.CaptureFixture):
    assert planning.main(["--mfu", "0"]) == 2
    assert "argument --mfu: '0' is no number from" in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_match_two_real_hosts_on_a_slow_link(tmp_path: Path):
    if reason := hosts.unsupported_reason():
        pytest.skip(reason)
    with hosts.two_hosts() as pair:
        cluster = hosts.Cluster(pair, tmp_path)
        cluster.prepare()
        keys = ("MODEL.SWIN.EMBED_DIM", "48", "TRAIN.EPOCHS", "2", "SAVE_STEPS", "0", "TRAIN.EMA_DECAY", "0")

        def train(tag: str) -> tuple[float, float]:
            """Bytes that the second host sent per step, and the median seconds per step."""
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
    size = ModelSize(sum(weight.numel() for weight in weights.values()), macs=0)
    assumed = Cluster(gpus_per_node=1, node_gbits=mbits / 1e3)
    plan = Plan(size, assumed, gpus=2, images=hosts.BATCH)
    assert plan.sent < sent < 1.15 * plan.sent  # headers, and other messages of the processes
    assert plan.network > 2 * compute, "the link must be the bottleneck"
    assert seconds == pytest.approx(plan.network + compute / 3, rel=0.25)
    assert plan.checkpoint < saved.stat().st_size < 1.1 * plan.checkpoint + 2e5
