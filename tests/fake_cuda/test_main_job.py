"""main.py on the stand-in CUDA runtime: it trains, saves, is killed and resumes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fake_cuda.run import fake_environment, run_on_fake_cuda
from utils.paths import REPO_ROOT

SECONDS_TO_FIRST_SAVE = 200


def command(folder: Path) -> list[str]:
    return [
        sys.executable, "main.py", "--cfg", "configs/demo.yaml", "--data-path", str(folder / "digits"),
        "--output", str(folder / "runs"), "--opts", "AMP_DTYPE", "bfloat16", "TRAIN.EPOCHS", "4",
        "TRAIN.WARMUP_EPOCHS", "0", "DATA.BATCH_SIZE", "64", "SAVE_STEPS", "10", "PRINT_FREQ", "10",
        "TRAIN.MAX_BAD_STEPS", "100000",
    ]  # fmt: skip


def kill_after_first_save(folder: Path, environment: dict[str, str]) -> None:
    """Starts a run and kills it as soon as it has saved."""
    saved = folder / "runs" / "demo" / "default" / "checkpoints" / "last.pth"
    deadline = time.monotonic() + SECONDS_TO_FIRST_SAVE
    with open(folder / "output.txt", "w") as output:
        run = subprocess.Popen(command(folder), cwd=REPO_ROOT, env=environment, stdout=output, stderr=output)
    try:
        while not saved.exists():
            assert run.poll() is None and time.monotonic() < deadline, (folder / "output.txt").read_text()
            time.sleep(0.02)
    finally:
        run.kill()
    assert run.wait() == -signal.SIGKILL, "it was over before it could be killed"


@pytest.mark.slow
def test_main_job_is_killed_and_resumes(tmp_path: Path):
    environment = fake_environment()
    kill_after_first_save(tmp_path, environment)
    resumed = run_on_fake_cuda(command(tmp_path), environment)
    printed = resumed.stdout + resumed.stderr
    assert "on NVIDIA H100 80GB HBM3 (fake), bfloat16" in printed
    assert "resumed from" in printed and "epoch 4:" in printed
