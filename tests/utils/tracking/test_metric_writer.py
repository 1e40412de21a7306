"""utils/tracking: metrics before and after an interruption, the log file, and the lock of the run's folder."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests._forked import forked
from utils.errors import UserError
from utils.tracking import logger
from utils.tracking.image_grid import caption_of, captioned_grid
from utils.tracking.metric_writer import MetricWriter
from utils.tracking.run_dir import RunDir
from utils.tracking.tensorboard import TensorBoardFile


def open_writer(folder: Path, step: int = 0) -> MetricWriter:
    return MetricWriter(folder, folder / "tensorboard", images_seen=step * 10)


def test_a_resumed_run_leaves_no_duplicate_points(tmp_path: Path):
    first = open_writer(tmp_path)
    for step in range(1, 9):
        first.add("train", step, step * 10, {"loss": float(step)})
        if step % 4 == 0:
            first.add("epoch", step, step * 10, {"epoch": step // 4, "acc1": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "upd')  # killed in the middle of a line

    second = open_writer(tmp_path, step=5)  # back to the checkpoint of step 5
    for step in range(6, 9):
        second.add("train", step, step * 10, {"loss": -float(step)})
    second.add("epoch", 8, 80, {"epoch": 2, "acc1": 88.0})

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses == [1, 2, 3, 4, 5, -6, -7, -8]
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["epoch"], row["acc1"]) for row in rows] == [("1", "4.0"), ("2", "88.0")]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [
        (10 * step, step if step < 6 else -step) for step in range(1, 9)
    ]
    assert [(e.step, e.value) for e in shown.Scalars("epoch/acc1")] == [(40, 4.0), (80, 88.0)]


def test_tensorboard_counts_images_so_a_larger_global_batch_hides_no_epoch(tmp_path: Path):
    first = MetricWriter(tmp_path, tmp_path / "tensorboard", images_seen=0)
    for epoch in (1, 2, 3):  # of 32 images, 4 in a step
        first.add("epoch", 8 * epoch, 32 * epoch, {"acc1": float(epoch)})
    second = MetricWriter(tmp_path, tmp_path / "tensorboard", images_seen=96)
    second.add("epoch", 16, 128, {"acc1": 4.0})  # 8 in a step
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("epoch/acc1")] == [(32, 1.0), (64, 2.0), (96, 3.0), (128, 4.0)]


def test_a_run_that_begins_anew_hides_the_points_of_the_first_attempt(tmp_path: Path):
    """Killed before its first checkpoint."""
    for value in (1.0, 2.0):
        MetricWriter(tmp_path, tmp_path / "tensorboard", images_seen=0).add("train", 1, 8, {"loss": value})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(8, 2.0)]


def test_a_pending_epoch_is_written_again_and_its_last_steps_stay(tmp_path: Path):
    first = open_writer(tmp_path)
    first.add("train", 4, 40, {"loss": 4.0})
    first.add("epoch", 4, 40, {"epoch": 1, "acc1": 1.0})
    second = MetricWriter(tmp_path, tmp_path / "tensorboard", images_seen=40, eval_pending=True)
    second.add("epoch", 4, 40, {"epoch": 1, "acc1": 2.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(40, 4.0)]
    assert [(e.step, e.value) for e in shown.Scalars("epoch/acc1")] == [(40, 2.0)]


def test_metrics_that_are_not_finite_are_null_in_json(tmp_path: Path):
    writer = open_writer(tmp_path)
    writer.add("train", 1, 10, {"loss": float("nan"), "lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_full_disk_is_reported_once_and_when_it_is_over(tmp_path: Path, monkeypatch, caplog):
    """Records stay complete, those that cannot be written are missing, and nothing is raised."""
    writer = open_writer(tmp_path)
    writer.add("train", 1, 10, {"loss": 1.0})
    with monkeypatch.context() as full:
        for module in ("utils.tracking.metric_writer", "utils.tracking.tensorboard"):
            full.setattr(f"{module}.append", no_room)
        full.setattr("utils.tracking.metric_writer.write_text", no_room)
        for step in (2, 3):
            writer.add("train", step, step * 10, {"loss": 1.0})
        writer.add("epoch", 3, 30, {"epoch": 1, "acc1": 5.0})
    writer.add("train", 4, 40, {"loss": 1.0})
    writer.add("epoch", 4, 40, {"epoch": 2, "acc1": 6.0})
    failing = [line.partition(":")[0] for line in caplog.messages if "not written" in line]
    assert sorted(failing) == ["TensorBoard", "metrics.jsonl", "summary.csv"]
    assert sum("written again" in line for line in caplog.messages) == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 4, 4]
    assert [row["acc1"] for row in csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())] == [
        "5.0",
        "6.0",
    ]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in shown.Scalars("train/loss")] == [10, 40]


def no_room(*args):
    raise OSError(28, "No space left on device")


def test_event_files_follow_each_other_also_when_the_clock_goes_back(tmp_path: Path, monkeypatch):
    for now in (2e9, 1e9, 1e9):
        monkeypatch.setattr("utils.tracking.tensorboard.time.time", lambda now=now: now)
        TensorBoardFile(tmp_path)
    stamps = [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())]
    assert stamps == ["2000000000", "2000000001", "2000000002"]


def test_the_log_file_begins_with_earlier_messages(tmp_path: Path):
    def start() -> None:
        logger.set_up(0)
        logging.getLogger("config").warning("a key has no effect")
        logger.add_file(tmp_path / "log.txt")
        logging.getLogger("engine").info("run folder")

    assert forked(start).code == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    messages = [line.split(" ", 2)[2] for line in lines]
    assert messages == ["WARNING config: a key has no effect", "INFO engine: run folder"]


def test_run_dir_refuses_a_second_live_run_but_not_after_a_dead_one(tmp_path: Path):
    code = (
        "import sys, pathlib; from utils.tracking.run_dir import RunDir\n"
        f"with RunDir(pathlib.Path({str(tmp_path / 'run')!r})).lock(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run is live.*process {holder.pid} on .*--tag"):
        with RunDir(tmp_path / "run").lock():
            pass
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with RunDir(tmp_path / "run").lock():
            assert str(os.getpid()) in (tmp_path / "run" / "lock").read_text()


def test_run_dir_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*--output"):
        with RunDir(tmp_path / "file" / "run").lock():
            pass


def test_record_launch_appends_each_start(tmp_path: Path):
    folder = RunDir(tmp_path)
    folder.record_launch({"processes": 2})
    folder.record_launch({"processes": 4})
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["processes"] for start in starts] == [2, 4]
    assert starts[0]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert os.path.basename(sys.argv[0]) in starts[0]["command"]


def test_caption_of_names_the_mixed_classes():
    names = ["ant", "bee", "cow"]
    assert caption_of(torch.tensor(1), names) == "bee"
    assert caption_of(torch.tensor([0.03, 0.94, 0.03]), names) == "bee"
    assert caption_of(torch.tensor([0.33, 0.0, 0.67]), names) == "cow:0.7 ant:0.3"
    assert caption_of(torch.tensor(2), None) == "2"


def test_captioned_grid_contains_every_image():
    grid = captioned_grid(torch.rand(5, 3, 10, 10), ["a"] * 5, columns=2, tile=40)
    assert grid.shape == (3, 3 * 52, 80) and grid.dtype == torch.uint8
