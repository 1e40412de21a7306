"""A few cases of each fuzz harness. `python -m tests.fuzz` runs more; docs/reports/FAULTS.md has the results."""

import os
import subprocess
import sys

import pytest

from utils.paths import REPO_ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def fuzz(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *args], cwd=REPO_ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_fuzz_in_short_form():
    fuzz("--short")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["images", "configs", "trees", "packs", "checkpoints"])
def test_fuzz_in_full(kind: str):
    fuzz(kind, "--seed", "3")
