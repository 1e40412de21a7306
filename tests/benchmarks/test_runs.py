"""benchmarks/runs.py: main.py is started and the files that it writes are read."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import runs
from config import get_config
from models.build import build_model
from tests._images import write_splits
from utils.errors import UserError


def test_metrics_are_read_from_results_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_main(arguments: Sequence[str]) -> None:
        output = Path(arguments[arguments.index("--output") + 1])
        run_dir = output / "swin_tiny_patch4_window7_224" / "default"
        run_dir.mkdir(parents=True)
        results = {"metrics": {"loss": 1.0, "acc1": 75.0, "acc5": 100.0}, "images": 4}
        (run_dir / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(runs, "run_main", run_main)
    assert runs.evaluate(get_config(None), "weights.pth", "data", []) == {"loss": 1.0, "acc1": 75.0, "acc5": 100.0}
    with pytest.raises(UserError, match="wrote no results.json"):
        runs.read_metrics(tmp_path)


def test_evaluate_runs_main(tmp_path: Path):
    """The model always predicts the second class, which three of four images have."""
    data = write_splits(tmp_path / "data", {"a": 1, "b": 1}, {"a": 1, "b": 3})
    small_swin = ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [1], "MODEL.SWIN.NUM_HEADS", [1]]
    loading = ["DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 0, "MODEL.NUM_CLASSES", 0]
    config = get_config(None, [*small_swin, *loading])
    model = build_model(config, 2)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 1.0])
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    assert runs.evaluate(config, str(tmp_path / "weights.pth"), str(data), ["DATA.BATCH_SIZE", "2"])["acc1"] == 75.0
    with pytest.raises(UserError, match="(?s)--pretrained missing.pth failed:\n.*missing.pth: no such file"):
        runs.evaluate(config, "missing.pth", str(data), [])


def test_several_processes_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch):
    started = []

    class Started:
        def __init__(self, command, **options):
            started.append(command)
            self.stdout, self.returncode = iter(["done\n"]), 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(runs.subprocess, "Popen", Started)
    runs.run_main(["--cfg", "a.yaml"], processes=8)
    assert started[0][:5] == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"
    ]  # fmt: skip
    assert Path(started[0][5]).name == "main.py" and started[0][6:] == ["--cfg", "a.yaml"]
