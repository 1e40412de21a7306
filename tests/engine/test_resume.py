"""Which checkpoint a run resumes from, and that a start reads it once."""

from pathlib import Path

import pytest
import torch

from config import dump, get_config
from data.build import Data
from engine.resume import (
    ResumePoint,
    TrainDataInfo,
    check_resume_data,
    load_resume_checkpoint,
    suggest_batch_flags,
)
from utils.checkpoint.folder import CheckpointFolder
from utils.distributed.process_group import DistInfo
from utils.tracking.run_dir import RunDir

ALONE = DistInfo.single(torch.device("cpu"))


def contents(images_seen: int) -> dict:
    """The entries of a checkpoint of a run, as small as the schema allows."""
    state = {
        "images_seen": images_seen,
        "best_metric": 0.0,
        "best_loss": 1.0,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "epoch_sums": {},
    }
    info = TrainDataInfo(num_images=8, dataset_digest="", global_batch_size=4)
    return {
        "model": {},
        "optimizer": {"param_groups": [], "state": {}},
        "optimizer_name": "AdamW",
        "scaler": {},
        "ema": None,
        "format": 1,
        "state": state,
        "train_data": info.state_dict(),
        "class_names": None,
        "config": "",
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    return run_dir


@pytest.fixture
def checkpoints(run_dir: RunDir) -> CheckpointFolder:
    folder = CheckpointFolder(run_dir.checkpoints, keep=3)
    folder.prepare()
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint outside of the run's folder."""
    folder = CheckpointFolder(tmp_path / "other", keep=1)
    folder.prepare()
    folder.save(contents(100))
    return folder.last


def choose(run_dir: RunDir, checkpoints: CheckpointFolder, *opts: object) -> ResumePoint | None:
    return load_resume_checkpoint(get_config(None, opts), ALONE, run_dir, checkpoints)


def test_a_new_run_has_nothing_to_resume(run_dir, checkpoints):
    assert choose(run_dir, checkpoints) is None


def test_the_newest_checkpoint_in_the_folder_is_resumed(run_dir, checkpoints):
    checkpoints.save(contents(4), epoch=1)
    checkpoints.save(contents(8))
    assert choose(run_dir, checkpoints).path == str(checkpoints.last)
    assert choose(run_dir, checkpoints, "TRAIN.AUTO_RESUME", False) is None


def test_a_named_checkpoint_wins_over_the_folder(run_dir, checkpoints, other):
    checkpoints.save(contents(8))
    assert choose(run_dir, checkpoints, "MODEL.RESUME", str(other)).contents["state"]["images_seen"] == 100


def test_a_run_that_began_from_a_named_checkpoint_resumes_itself(run_dir, checkpoints, other):
    run_dir.record_launch({"resumed_from": str(other)})
    run_dir.record_launch({"resumed_from": None})  # a later start without the flag changes nothing
    assert choose(run_dir, checkpoints, "MODEL.RESUME", str(other)).path == str(other)  # nothing saved yet
    checkpoints.save(contents(104))
    assert choose(run_dir, checkpoints, "MODEL.RESUME", str(other)).path == str(checkpoints.last)


def test_a_start_reads_its_checkpoint_once(run_dir, checkpoints, monkeypatch):
    checkpoints.save(contents(4), epoch=1, best=True)
    checkpoints.save(contents(8))
    read, loaded = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(path) or loaded(path, **options))
    assert choose(run_dir, checkpoints).contents["state"]["images_seen"] == 8
    assert read == [checkpoints.last]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("", ""),
        ("TRAIN.EPOCHS 30", "the learning rate of the next step is 2.94e-06 instead of 3.91e-08 (times 75.2)"),
        ("TRAIN.BASE_LR 0", "the learning rate of the next step is 0 instead of 3.91e-08 (times 0)"),
        ("TRAIN.ACCUMULATION_STEPS 2", "the learning rate of the next step is 7.81e-08 instead of 3.91e-08 (times 2)"),
    ],
)
def test_a_changed_learning_rate_is_logged(changes, message, monkeypatch, caplog):
    """After all 10 epochs of 8 images, the cosine is at its end."""
    monkeypatch.setattr("engine.resume.dataset_digest", lambda images: "")
    base = ["DATA.BATCH_SIZE", 4, "TRAIN.EPOCHS", 10, "TRAIN.WARMUP_EPOCHS", 0]
    config = get_config(None, base + (["TRAIN.MIN_LR", 0] if "BASE_LR" in changes else []) + changes.split())
    point = ResumePoint("last.pth", contents(80) | {"config": dump(get_config(None, base))})
    data = Data(train=range(8), val=range(8), num_classes=2, class_names=None)
    check_resume_data(config, ALONE, data, point, allow_config_change=True)
    logged = [line for line in caplog.messages if "learning rate" in line]
    assert logged == ([f"with these changes {message}"] if message else [])


@pytest.mark.parametrize(
    ("global_batch_size", "batch_size", "world_size", "advice"),
    [
        (64, 8, 2, "--accumulation-steps 4"),
        (48, 32, 2, "--batch-size 24 --accumulation-steps 1"),
        (64, 8, 3, "start 2 or 4 of them"),
    ],
)
def test_flags_that_keep_the_global_batch_size(global_batch_size, batch_size, world_size, advice):
    assert advice in suggest_batch_flags(global_batch_size, batch_size, world_size)
