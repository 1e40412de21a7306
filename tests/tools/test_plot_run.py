"""tools/plot_run.py: the plot of a run, and its errors."""

import json
from pathlib import Path

import pytest

from tools.plot_run import main, resume_points


def write_run(folder: Path, **epoch: object) -> None:
    train = [{"kind": "train", "update": n, "samples": 10 * n, "loss": 2.0 / n} for n in (1, 2, 3, 4)]
    epoch = {"kind": "epoch", "update": 4, "samples": 40, "epoch": 1, "val_loss": 0.7} | epoch
    lines = [json.dumps(record) + "\n" for record in (*train, epoch)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "starts.jsonl").write_text('{"samples": 0}\n{"samples": 20}\n{"sampl')


@pytest.mark.parametrize(
    "epoch", [{"acc1": 60.0, "ema_acc1": 61.0}, {"main_metric": "mAP", "mAP": 40.0, "ema_mAP": 41}]
)
def test_plot_shows_the_main_metric(tmp_path: Path, epoch: dict):
    write_run(tmp_path, **epoch)
    image = tmp_path / "curve.svg"
    assert main([str(tmp_path), str(image)]) == 0
    metric = epoch.get("main_metric", "acc1")
    assert f"<!-- ema_{metric} -->" in image.read_text() and "<!-- resumed -->" in image.read_text()
    assert main([str(tmp_path), str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_resume_points_skips_the_first_start_and_cut_lines(tmp_path: Path):
    write_run(tmp_path)
    assert resume_points(tmp_path) == [20]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "none"), "x.png"]) == 2
    assert "Give the folder of a run" in capsys.readouterr().err
    write_run(tmp_path)
    assert main([str(tmp_path), "x.png"]) == 2
    assert "no epoch is complete yet" in capsys.readouterr().err
    write_run(tmp_path, acc1=60.0)
    assert main([str(tmp_path), str(tmp_path / "x.nothing")]) == 2
    assert "Give a path that ends in .png or .svg" in capsys.readouterr().err
