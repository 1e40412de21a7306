"""tools/plot_run.py: the plot of a run, and its errors."""

import json
import sys
from pathlib import Path

import pytest

from tools.plot_run import main, read_launches, resume_points
from utils.tracking.metric_writer import MetricWriter


def write_run(folder: Path, metrics: dict[str, float], launch: dict[str, object]) -> None:
    writer = MetricWriter(folder, folder / "tensorboard", images_seen=0)
    for step in (1, 2, 3, 4):
        writer.add("train", step, 10 * step, {"loss": 2.0 / step})
    writer.add("epoch", 4, 40, {"epoch": 1, "val_loss": 0.7} | metrics)
    lines = [json.dumps(launch | {"images_seen": images_seen}) for images_seen in (0, 20)]
    (folder / "starts.jsonl").write_text("\n".join([*lines, '{"images_se']))


@pytest.mark.parametrize(
    ("metrics", "launch", "expected"),
    [
        ({"acc1": 60.0, "ema_acc1": 61.0}, {}, "acc1"),
        ({"acc1": 60.0, "mAP": 40.0, "ema_mAP": 41.0}, {"main_metric": "mAP"}, "mAP"),
    ],
)
def test_plot_shows_the_main_metric(tmp_path: Path, metrics: dict, launch: dict, expected: str):
    write_run(tmp_path, metrics, launch)
    assert main([str(tmp_path), str(tmp_path / "curve.svg")]) == 0
    image = (tmp_path / "curve.svg").read_text()
    assert f"<!-- ema_{expected} -->" in image and "<!-- resumed -->" in image
    assert main([str(tmp_path), str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_resume_points_skips_the_first_start_and_cut_lines(tmp_path: Path):
    write_run(tmp_path, {}, {})
    assert resume_points(read_launches(tmp_path)) == [20]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "none"), "x.png"]) == 2
    assert "Give the folder of a run" in capsys.readouterr().err
    write_run(tmp_path, {}, {})
    assert main([str(tmp_path), "x.png"]) == 2
    assert "no epoch is complete yet" in capsys.readouterr().err
    write_run(tmp_path, {"acc1": 60.0}, {})
    assert main([str(tmp_path), str(tmp_path / "x.nothing")]) == 2
    assert "Give a path that ends in .png or .svg" in capsys.readouterr().err


def test_without_matplotlib_the_way_to_install_it_is_named(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(tmp_path), str(tmp_path / "x.png")]) == 2
    assert "pip install -r requirements-plot.txt" in capsys.readouterr().err
