"""Tests for a GPU, on the stand-in CUDA runtime: they run up to a comparison of values, which then fails.

A mistake that stops one before that, such as a generator of the CPU asked for numbers on the GPU, is found here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda.run import fake_environment
from utils.paths import REPO_ROOT

SELECTED = [
    "tests/models/ops/test_triton_attention.py",
    "tests/models/ops/test_dispatch.py",
    "tests/engine/test_ddp.py",
    "tests/engine/test_compile.py",
    "tests/data/loader/test_shared_memory.py",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", SELECTED)
def test_gpu_tests_run_to_their_comparison(path: str, tmp_path: Path):
    report = tmp_path / "errors.txt"
    options = ["-p", "tests.fake_cuda.first_errors", "-p", "no:cacheprovider", "-n", "0", "-m", "gpu and not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, path],
        cwd=REPO_ROOT, env=fake_environment(FIRST_ERRORS=str(report)), capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    results = dict(line.split("\t", 1) for line in report.read_text().splitlines())
    assert results
    comparisons = ("passed", "AssertionError:", "OpCheckError: ")
    stopped = {name: result for name, result in results.items() if not result.startswith(comparisons)}
    assert stopped == {}
