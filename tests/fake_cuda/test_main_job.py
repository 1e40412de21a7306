"""main.py on the stand-in CUDA runtime: it trains, saves, is killed and resumes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda.run import fake_environment
from utils.paths import REPO_ROOT

OPTS = "AMP_DTYPE bfloat16 TRAIN.EPOCHS 3 TRAIN.WARMUP_EPOCHS 0 DATA.BATCH_SIZE 64 SAVE_STEPS 10 PRINT_FREQ 10"


@pytest.mark.slow
def test_main_job_is_killed_and_resumes(tmp_path: Path):
    output = tmp_path / "runs"
    command = [sys.executable, "-m", "benchmarks.gpu.resume", "--output", str(output), "--kills", "1", "--opts"]
    # Losses are whatever was in memory, so that steps are skipped as not finite.
    command += [*OPTS.split(), "TRAIN.COMPILE", "False", "TRAIN.MAX_BAD_STEPS", "100000"]
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=fake_environment(), capture_output=True, text=True, timeout=280
    )  # 1: other bits, as nothing is computed
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert done.stdout.startswith("killed 1 times, 4,352 images: "), done.stdout
    log = (output / "killed.txt").read_text()
    assert "on NVIDIA H100 80GB HBM3 (fake), bfloat16" in log
    assert "resumed from" in log and "epoch 3:" in log
