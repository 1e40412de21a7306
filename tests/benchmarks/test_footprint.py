"""benchmarks/footprint.py: bytes held and moved, counted without a GPU."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import footprint
from benchmarks.footprint import MemoryTracker


def test_memory_tracker_counts_live_and_moved_bytes():
    x = torch.ones(10, 100)  # 4,000 bytes, created before: not counted as live
    with MemoryTracker() as tracker:
        y = x + 1
        assert (tracker.live, sum(tracker.moved.values())) == (4000, 8000)
        view = y.view(100, 10).t()
        assert (tracker.live, sum(tracker.moved.values())) == (4000, 8000)
        z = F.gelu(view)
        assert (tracker.live, tracker.peak) == (8000, 8000)
        y.mul_(2)
        assert tracker.live == 8000 and tracker.moved["aten::mul_"] == 8000
        del y, view
        assert (tracker.live, tracker.peak) == (4000, 8000)
        del z
    assert (tracker.live, tracker.peak) == (0, 8000)


def test_expanded_row_is_read_once():
    with MemoryTracker() as tracker:
        torch.ones(1, 10).expand(100, 10) + 1
    assert tracker.moved["aten::add"] == 40 + 4000


def test_fused_attention_holds_less_than_reference_and_timm(capsys: pytest.CaptureFixture, tmp_path: Path):
    words = "--models demo --batch-size 8 --libraries timm --variant reference MODEL.ATTN reference".split()
    words += "--variant checkpoint TRAIN.USE_CHECKPOINT True".split()
    assert footprint.main([*words, "--output", str(tmp_path)]) == 0
    with open(tmp_path / "footprint.csv", newline="") as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    held = {name: float(row["held, MB an image"]) for name, row in rows.items()}
    assert held["here checkpoint"] < held["here"] < held["timm"] and held["here"] < held["here reference"]
    assert "window_attention" in rows["here"]["most moved by"]
    assert footprint.main(["--models", "swin_huge"]) == 2
