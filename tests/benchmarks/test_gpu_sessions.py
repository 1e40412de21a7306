"""benchmarks/gpu/: time limits of the sessions, what becomes of a part that fails, the comparison of checkpoints."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import resume
from utils.paths import REPO_ROOT

FOLDER = REPO_ROOT / "benchmarks" / "gpu"


def run_session(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment}
    return subprocess.run([FOLDER / f"session_{name}.sh", *args], capture_output=True, text=True, env=env)


@pytest.mark.parametrize(("name", "most"), [("a", 330), ("b", 440)])
def test_limits_add_up_to_less_than_a_call_may_take(name: str, most: int):
    """Those of parts that run beside each other count once, and each has three seconds until it is killed."""
    listed = run_session(name, DRY_RUN="1")
    assert listed.returncode == 0, listed.stderr
    total, longest = 0, 0
    for line in listed.stdout.splitlines()[:-1]:
        limit, beside = re.match(r"at most +(\d+) s(, beside others)?  \w+: ", line).groups()
        if beside:
            longest = max(longest, int(limit))
            continue
        total += (longest + 3 if longest else 0) + int(limit) + 3
        longest = 0
    total += longest + 3 if longest else 0
    assert listed.stdout.splitlines()[-1] == f"at most {total} s in all"
    assert total <= most


def test_order_is_by_value():
    """Whether it is right, then the headline, then a real training."""
    listed = run_session("a", DRY_RUN="1").stdout
    places = [listed.index(f"  {part}: ") for part in ("kernels", "tests", "time_here", "time_timm", "cifar10")]
    assert places == sorted(places)


def test_candidates_are_compiled_before_they_are_timed_with_the_same_options():
    for name in "ab":
        listed = run_session(name, DRY_RUN="1").stdout
        options = {}
        for kind, candidate, words in re.findall(r"(compile|time)_(\w+): .*? (--models .*)", listed):
            options.setdefault(candidate, {})[kind] = words
        compiled = {candidate: each for candidate, each in options.items() if "compile" in each}
        assert len(compiled) >= 3
        for candidate, each in compiled.items():
            assert each["compile"] == each["time"], candidate


STUB = """#!/bin/sh
case "$*" in
    *torch.cuda.is_available*) exit 0 ;;
    *benchmarks.loader*) echo "no images"; exit 3 ;;
    *) echo "stub: $*" ;;
esac
"""


def test_a_part_that_fails_is_named_and_all_outputs_are_archived(tmp_path: Path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    ran = run_session("b", PYTHON=str(stub), OUT=str(tmp_path / "out"), WORK=str(tmp_path / "work"))
    assert ran.returncode == 1 and ran.stdout.endswith("failed or stopped: loader\n")
    assert re.search(r"### loader: exit code 3, \d+ of \d+ s\nno images\n", ran.stdout)
    assert "### time_graphs: exit code 0" in ran.stdout, "the parts after it run"
    with tarfile.open(tmp_path / "out" / "b.tgz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"compile_v2_timm.log", "time_base_here.log", "loader.log", "save.log"} <= names


def test_without_a_gpu_nothing_is_run(tmp_path: Path):
    ran = run_session("a", PYTHON="/bin/false", OUT=str(tmp_path / "out"))
    assert ran.returncode == 2 and "finds no GPU" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_differences_are_of_bits():
    a = {"w": torch.tensor([0.0, float("nan")]), "n": [1, torch.ones(2, dtype=torch.bfloat16)], "x": 3}
    same = {"w": a["w"].clone(), "n": [1, a["n"][1].clone()], "x": 3}
    assert list(resume.differences(a, same, "model")) == []
    other = {"w": torch.tensor([-0.0, float("nan")]), "n": [2, a["n"][1].float()], "x": 3}
    assert list(resume.differences(a, other, "model")) == ["model.w", "model.n.0", "model.n.1"]
    assert list(resume.differences(a, {"w": a["w"]}, "model")) == ["model"]
