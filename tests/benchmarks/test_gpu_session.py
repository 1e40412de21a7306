"""benchmarks/gpu_session.sh: time limits, failing parts, mistakes."""

import re
import subprocess
from pathlib import Path

from utils.paths import REPO_ROOT

SCRIPT = REPO_ROOT / "benchmarks" / "gpu_session.sh"


def run_script(*words: str, **environment: str) -> subprocess.CompletedProcess:
    path = "/usr/bin:/bin"
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env={"PATH": path, **environment})


def test_stays_below_ten_minutes():
    shown = run_script("--dry-run", PYTHON="python")
    assert shown.returncode == 0, shown.stderr
    assert int(re.search(r"at most (\d+) s in all", shown.stdout)[1]) < 600
    for part in ("tests", "eager", "checkpointing", "bf16", "fp16", "first_step_cached", "graphs", "compiled"):
        assert re.search(rf"^{part} +at most", shown.stdout, re.M), part


def test_continues_after_a_failure_and_names_it(tmp_path: Path):
    ran = run_script(str(tmp_path), PYTHON="/bin/false", DEVICE="cpu")
    parts = re.findall(r"^(\w+) +\d+ s  FAILED \(1\)$", ran.stdout, re.M)
    assert len(parts) >= 8 and ran.returncode == len(parts)
    assert f"failed or stopped: {' '.join(parts)}" in ran.stderr


def test_mistakes_end_with_code_2(tmp_path: Path):
    assert run_script("--unknown").returncode == 2
    without = run_script(str(tmp_path), PYTHON="/bin/false")  # this interpreter finds no GPU
    assert without.returncode == 2 and "finds no GPU" in without.stderr
