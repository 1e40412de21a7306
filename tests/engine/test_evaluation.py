"""Evaluating and fine-tuning from files that hold averaged weights too: which are taken, and what is written."""

import json
from pathlib import Path

import pytest
import torch

from config import get_config
from models.build import build_model
from tests._tiny import run_main, write_images, write_recipe


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The command line of a tiny run, whose folder it is."""
    root = tmp_path_factory.mktemp("run")
    images = write_images(root / "images", 8, 4)
    (images / "val" / "green" / "0.jpg").unlink()  # so that two images of three are blue
    return ["--cfg", str(write_recipe(root)), "--data-path", str(images), "--output", str(root / "logs")]


@pytest.fixture(scope="module")
def kinds(args: list) -> dict[str, dict]:
    """Weights that answer "blue", and an average that answers "green"."""
    kinds = {}
    for label, kind in enumerate(("model", "ema")):
        weights = build_model(get_config(args[1]), num_classes=2).state_dict()
        weights["head.bias"] = torch.full((2,), -100.0).index_fill_(0, torch.tensor(label), 100.0)
        kinds[kind] = {**weights, "head.weight": torch.zeros_like(weights["head.weight"])}
    kinds["ema"]["norm.bias"] = kinds["ema"]["norm.bias"] + 1
    return kinds


def evaluated(args: list, contents: dict, *flags: str) -> dict:
    file = Path(args[5]).parent / "weights.pth"
    torch.save(contents, file)
    assert run_main([*args, "--eval", "--pretrained", str(file), *flags]) == 0
    return json.loads((Path(args[5]) / "tiny" / "default" / "results.json").read_text())


def test_evaluation_measures_both_or_the_weights_asked_for(args: list, kinds: dict[str, dict]):
    both = {"state_dict": kinds["model"], "state_dict_ema": kinds["ema"]}
    found = evaluated(args, both)
    assert found["metrics"]["acc1"] == pytest.approx(200 / 3) and found["images"] == 3
    assert found["ema_metrics"]["acc1"] == pytest.approx(100 / 3)
    assert "metrics" not in evaluated(args, both, "--ema")
    assert "ema_metrics" not in evaluated(args, both, "--opts", "MODEL.PRETRAINED_EMA", "model")
    alone = evaluated(args, {"model_ema": kinds["ema"]})
    assert "metrics" not in alone and alone["ema_metrics"] == found["ema_metrics"]


@pytest.mark.parametrize(
    ("better", "flags", "expected"), [("ema", [], "ema"), ("model", ["--ema"], "ema"), ("x", [], "model")]
)
def test_fine_tuning_starts_from_the_better_weights(
    args: list, kinds: dict[str, dict], better: str, flags: list, expected: str, capsys: pytest.CaptureFixture
):
    file = Path(args[5]).parent / "best.pth"
    torch.save({**kinds, "state": {"better_weights": better}}, file)
    tag = f"{better}{len(flags)}"
    short = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR", "0.0", "TRAIN.MIN_LR", "0.0"]
    assert run_main([*args, "--tag", tag, "--pretrained", str(file), *flags, *short]) == 0
    output = capsys.readouterr()
    assert "holds weights as trained under 'model', averaged weights (EMA) under 'ema'" in output.out + output.err
    last = torch.load(Path(args[5]) / "tiny" / tag / "checkpoints" / "last.pth", weights_only=True)
    assert torch.equal(last["model"]["norm.bias"], kinds[expected]["norm.bias"])
    assert last["state"]["better_weights"] in ("model", "ema")
