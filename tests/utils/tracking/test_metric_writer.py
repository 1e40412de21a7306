"""What a run leaves to look at, before and after it was interrupted; and the folder it lies in."""

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


def records(folder: Path, update: int = 0) -> MetricWriter:
    return MetricWriter(folder, folder / "tensorboard", update, samples=update * 10)


def test_resumed_run_leaves_no_doubled_points(tmp_path: Path):
    first = records(tmp_path)
    for update in range(1, 9):
        first.add("train", update, update * 10, {"loss": float(update)})
        if update % 4 == 0:
            first.add("epoch", update, update * 10, {"epoch": update // 4, "acc1": float(update)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "upd')  # killed in the middle of a line

    second = records(tmp_path, update=5)  # back to the checkpoint of update 5
    for update in range(6, 9):
        second.add("train", update, update * 10, {"loss": -float(update)})
    second.add("epoch", 8, 80, {"epoch": 2, "acc1": 88.0})

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses == [1, 2, 3, 4, 5, -6, -7, -8]
    rows = list(csv.DictReader(open(tmp_path / "summary.csv")))
    assert [(row["epoch"], row["acc1"]) for row in rows] == [("1", "4.0"), ("2", "88.0")]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(u, u if u < 6 else -u) for u in range(1, 9)]
    assert [(e.step, e.value) for e in shown.Scalars("epoch/acc1")] == [(4, 4.0), (8, 88.0)]


def test_figures_that_are_not_finite_are_null_in_json(tmp_path: Path):
    written = records(tmp_path)
    written.add("train", 1, 10, {"loss": float("nan"), "lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_full_disk_is_said_once_and_when_it_is_over(tmp_path: Path, monkeypatch, caplog):
    """What is written stays whole; what cannot be is lacking; nothing is raised."""
    written = records(tmp_path)
    written.add("train", 1, 10, {"loss": 1.0})
    with monkeypatch.context() as full:
        for module in ("utils.tracking.metric_writer", "utils.tracking.tensorboard"):
            full.setattr(f"{module}.append", no_room)
        full.setattr("utils.tracking.metric_writer.write_text", no_room)
        for update in (2, 3):
            written.add("train", update, update * 10, {"loss": 1.0})
        written.add("epoch", 3, 30, {"epoch": 1, "acc1": 5.0})
    written.add("train", 4, 40, {"loss": 1.0})
    written.add("epoch", 4, 40, {"epoch": 2, "acc1": 6.0})
    said = [line.partition(":")[0] for line in caplog.messages if "not written" in line]
    assert sorted(said) == ["TensorBoard", "metrics.jsonl", "summary.csv"]
    assert sum("written again" in line for line in caplog.messages) == 3
    updates = [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert updates == [1, 4, 4]
    assert [row["acc1"] for row in csv.DictReader(open(tmp_path / "summary.csv"))] == ["5.0", "6.0"]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in shown.Scalars("train/loss")] == [1, 4]


def no_room(*args):
    raise OSError(28, "No space left on device")


def test_event_files_follow_each_other_also_when_the_clock_goes_back(tmp_path: Path, monkeypatch):
    for now in (2e9, 1e9, 1e9):
        monkeypatch.setattr("utils.tracking.tensorboard.time.time", lambda now=now: now)
        TensorBoardFile(tmp_path)
    stamps = [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())]
    assert stamps == ["2000000000", "2000000001", "2000000002"]


def test_what_is_said_before_there_is_a_log_file_stands_in_it(tmp_path: Path):
    def start() -> None:
        logger.set_up(0)
        logging.getLogger("config").warning("a key has no effect")
        logger.add_file(tmp_path / "log.txt")
        logging.getLogger("engine").info("run folder")

    assert forked(start).code == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    said = [line.split(" ", 2)[2] for line in lines]
    assert said == ["WARNING config: a key has no effect", "INFO modes: run folder"]


def test_second_live_run_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path):
    code = (
        "import sys, pathlib; from utils.tracking.run_dir import RunDir\n"
        f"with RunDir(pathlib.Path({str(tmp_path / 'run')!r})).claim(): print('held', flush=True); sys.stdin.read()"
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


def test_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*--output"):
        with RunDir(tmp_path / "file" / "run").lock():
            pass


def test_every_start_is_noted(tmp_path: Path):
    folder = RunDir(tmp_path)
    folder.record_launch({"processes": 2})
    folder.record_launch({"processes": 4})
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["processes"] for start in starts] == [2, 4]
    assert starts[0]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert os.path.basename(sys.argv[0]) in starts[0]["command"]


def test_captions_name_what_was_mixed():
    names = ["ant", "bee", "cow"]
    assert caption_of(torch.tensor(1), names) == "bee"
    assert caption_of(torch.tensor([0.03, 0.94, 0.03]), names) == "bee"
    assert caption_of(torch.tensor([0.33, 0.0, 0.67]), names) == "cow:0.7 ant:0.3"
    assert caption_of(torch.tensor(2), None) == "2"


def test_grid_holds_every_image():
    picture = captioned_grid(torch.rand(5, 3, 10, 10), ["a"] * 5, columns=2, tile=40)
    assert picture.shape == (3, 3 * 52, 80) and picture.dtype == torch.uint8
