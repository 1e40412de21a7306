"""A few trials of each fault harness, and unit tests of what the harnesses rely on."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from data.loader.sampler import StreamSampler
from engine.resume import suggest_batch_flags
from utils.checkpoint.async_saver import AsyncCheckpointer
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError
from utils.paths import REPO_ROOT

SHORT = ["kill", "elastic", "preempt", "hang", "nonfinite", "lock", "memory", "interrupt"]


def run_harnesses(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *args], cwd=REPO_ROOT, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)  # takes 40 s on an idle machine
def test_harnesses_in_short_form():
    """Runs all harnesses in one process, which imports PyTorch once and forks all runs."""
    output = run_harnesses(*SHORT, "--short")
    heads = re.findall(r"^(.+): (\d+) of (\d+) passed", output, re.MULTILINE)
    assert len(heads) == len(SHORT) and all(good == count != "0" for _, good, count in heads), output


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "args",
    [
        ("kill", "--count", "40"),
        ("torchrun", "--count", "3"),
        ("hang", "--count", "10"),
        ("interrupt", "--count", "16"),
    ],
)
def test_harnesses_with_more_trials(args: tuple[str, ...]):
    run_harnesses(*args)


def contents(value: float, size: int = 3) -> dict:
    return {"model": {"w": torch.full((size,), value)}, "state": {"images_seen": int(value)}}


def test_async_checkpointer_saves_the_values_at_the_call(tmp_path: Path):
    """Training changes the same tensors while the thread writes."""
    saver = AsyncCheckpointer(CheckpointFolder(tmp_path, keep=0))
    now = contents(1.0, size=100_000)
    for number in range(2, 20):
        saver.save(now, epoch=number)
        now["model"]["w"].fill_(number)
    saver.finish()
    saver.close()
    for number in range(2, 20):
        saved = read_checkpoint(str(tmp_path / f"epoch_{number:04d}.pth"))["model"]["w"]
        assert saved.eq(number - 1).all()


def test_async_checkpointer_retries_best_after_a_failed_write(tmp_path: Path, caplog, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=0)
    saver = AsyncCheckpointer(folder)
    saver.save(contents(1), best=True)
    saver.wait()
    write = CheckpointFolder.save

    def full(*args, **kwargs):
        raise UserError("last.pth: could not be written (No space left on device)")

    monkeypatch.setattr(CheckpointFolder, "save", full)
    saver.save(contents(2), best=True)
    saver.save(contents(3))
    with pytest.raises(UserError, match="No space left"):
        saver.finish()
    assert caplog.text.count("Training goes on, and the next save tries again") == 2
    assert read_checkpoint(str(folder.last))["state"]["images_seen"] == 1
    monkeypatch.setattr(CheckpointFolder, "save", write)
    saver.save(contents(4))
    saver.finish()
    saver.close()
    assert read_checkpoint(str(folder.last))["state"]["images_seen"] == 4
    assert read_checkpoint(str(folder.best))["state"]["images_seen"] == 2


def test_async_checkpointer_raises_bugs_of_its_thread(tmp_path: Path):
    saver = AsyncCheckpointer(CheckpointFolder(tmp_path, keep=0))
    saver.save({"model": threading.Lock()})  # cannot be pickled
    with pytest.raises(TypeError):
        saver.wait()
    saver.close()


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "processes", "expected"),
    [
        (1024, 128, 4, "--accumulation-steps 2"),
        (1024, 128, 16, "--batch-size 64 --accumulation-steps 1"),
        (96, 16, 4, "--batch-size 12 --accumulation-steps 2"),
        (1024, 128, 3, "start 2 or 4 of them"),
        (6, 2, 4, "start 3 or 6 of them"),
    ],
)
def test_suggest_batch_flags_keeps_the_global_batch_size(
    global_batch: int, batch_size: int, processes: int, expected: str
):
    output = suggest_batch_flags(global_batch, batch_size, processes)
    assert expected in output
    if found := re.search(r"(?:--batch-size (\d+) )?--accumulation-steps (\d+)", output):
        assert int(found[1] or batch_size) * int(found[2]) * processes == global_batch


def test_stream_sampler_starts_within_a_second_in_an_imagenet_epoch():
    n, batch = 1_281_167, 128
    start = (7 * n + n // 2) // batch * batch
    began = time.process_time()
    keys = next(iter(StreamSampler(n, 0, batch, 0, 1, start, start + 100 * batch)))
    assert len(keys) == batch and time.process_time() - began < 1.0
