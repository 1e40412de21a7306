"""What measures and counts the step: the table of benchmarks.step, the bytes of benchmarks.footprint, the script for a
GPU.
"""

import csv
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import footprint, step
from benchmarks.footprint import Ledger
from benchmarks.subprocess_step import SubprocessStep
from utils.paths import REPO_ROOT

SESSION = REPO_ROOT / "benchmarks" / "gpu_session.sh"


def test_a_matrix_product_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step.engine, "measure", lambda run, images, *_, **__: run().sum() and 100.0)
    assert step.matrix_product("bfloat16", torch.device("cpu")) == 100 * 2 * 2048**3


def test_table_grows_from_run_to_run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Two runs of one measurement each in one file; the second replaces what it measures again."""
    monkeypatch.setattr(step, "matrix_product", lambda dtype, device: 1e11)
    table = tmp_path / "step.md"
    words = ["--models", "demo", "--dtypes", "float32", "--ways", "eager", "--turns", "1", "--seconds", "0.01"]
    words += ["--device", "cpu", "--write", str(table), "--batch-sizes"]
    assert step.main([*words, "2", "--libraries", "timm", "--variant", "skip", "MODEL.DROP_PATH_SKIP", "true"]) == 0
    with open(table.with_suffix(".csv"), newline="") as file:
        first = list(csv.DictReader(file))
    assert [(row["mode"], row["implementation"]) for row in first] == [
        (mode, f"{name}, eager") for mode in ("inference", "training") for name in ("here", "here skip", "timm")
    ]
    for row in first:
        assert float(row["images/s"]) > 0 and 0 < float(row["memory, GiB"]) < 1
        assert float(row["of the matrix product, %"]) > 0 and row["of the data sheet, %"] == ""
    assert float(first[2]["over the best peer"]) == 1.0
    assert step.main([*words, "1", "2", "--libraries", "--modes", "inference"]) == 0
    with open(table.with_suffix(".csv"), newline="") as file:
        second = list(csv.DictReader(file))
    assert [row["batch"] for row in second if row["mode"] == "inference"] == ["1", "2", "2", "2"]
    wanted = {"mode": "inference", "batch": "2", "implementation": "here, eager"}
    here = [row for row in second if wanted.items() <= row.items()]
    assert len(here) == 1 and here[0]["over the best peer"] == ""  # the one without peers came later
    text = table.read_text()
    assert len(re.findall(r"^- Run: 1 interleaved turns.*TFLOP/s in float32.*Command: ", text, re.M)) == 2
    assert "here skip, eager" in capsys.readouterr().out


def touch(folder: Path) -> tuple[step.Step, int]:
    """A step that leaves the number of its process in `folder`."""
    return lambda: (folder / str(os.getpid())).touch(), os.getpid()


def fail(folder: Path) -> tuple[step.Step, int]:
    (folder / str(os.getpid())).touch()
    raise torch.OutOfMemoryError("too much")


def test_apart_a_step_that_cannot_be_built_leaves_no_process(tmp_path: Path):
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        SubprocessStep(fail, tmp_path)
    (file,) = tmp_path.iterdir()
    assert not Path("/proc", file.name).exists()


def test_apart_a_step_runs_where_it_was_built(tmp_path: Path):
    apart = SubprocessStep(touch, tmp_path)
    apart()
    apart()
    apart.close()
    assert apart.known != os.getpid() and [file.name for file in tmp_path.iterdir()] == [str(apart.known)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models swin_huge", "--models swin_huge: there is no configs/swin_huge.yaml"),
        ("--turns 0", "--turns count from 1"),
        ("--device cpu --ways graphs", "CUDA graphs need a GPU"),
        ("--device cpu --ways tuned", "give it --apart"),
        ("--write table.txt", "ends in .md"),
        ("--variant broken NO.SUCH_KEY 1 --device cpu --turns 1", "NO.SUCH_KEY"),
    ],
)
def test_mistakes_end_with_code_2(words: str, message: str, capsys: pytest.CaptureFixture):
    assert step.main(["--models", "demo", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_ledger_counts_what_lives_and_what_moves():
    x = torch.ones(10, 100)  # 4,000 bytes, made before: not counted as held
    with Ledger() as ledger:
        y = x + 1
        assert (ledger.live, sum(ledger.moved.values())) == (4000, 8000)
        view = y.view(100, 10).t()
        assert (ledger.live, sum(ledger.moved.values())) == (4000, 8000)
        z = F.gelu(view)
        assert (ledger.live, ledger.peak) == (8000, 8000)
        y.mul_(2)
        assert ledger.live == 8000 and ledger.moved["aten::mul_"] == 8000
        del y, view
        assert (ledger.live, ledger.peak) == (4000, 8000)
        del z
    assert (ledger.live, ledger.peak) == (0, 8000)


def test_a_repeated_row_is_read_once():
    with Ledger() as ledger:
        torch.ones(1, 10).expand(100, 10) + 1
    assert ledger.moved["aten::add"] == 40 + 4000


def test_attention_that_writes_no_scores_holds_less(capsys: pytest.CaptureFixture, tmp_path: Path):
    words = "--models demo --batch-size 8 --libraries timm --variant reference MODEL.ATTN reference".split()
    words += "--variant checkpoint TRAIN.USE_CHECKPOINT True".split()
    assert footprint.main([*words, "--output", str(tmp_path)]) == 0
    with open(tmp_path / "footprint.csv", newline="") as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    held = {name: float(row["held, MB an image"]) for name, row in rows.items()}
    assert held["here checkpoint"] < held["here"] < held["timm"] and held["here"] < held["here reference"]
    assert "window_attention" in rows["here"]["most moved by"]
    assert footprint.main(["--models", "swin_huge"]) == 2


def session(*words: str, **environment: str) -> subprocess.CompletedProcess:
    path = "/usr/bin:/bin"
    return subprocess.run([SESSION, *words], capture_output=True, text=True, env={"PATH": path, **environment})


def test_gpu_session_stays_below_ten_minutes():
    shown = session("--dry-run", PYTHON="python")
    assert shown.returncode == 0, shown.stderr
    assert int(re.search(r"at most (\d+) s in all", shown.stdout)[1]) < 600
    for part in ("tests", "eager", "checkpointing", "bf16", "fp16", "first_step_cached", "graphs", "compiled"):
        assert re.search(rf"^{part} +at most", shown.stdout, re.M), part


def test_gpu_session_goes_on_after_a_failure_and_names_it(tmp_path: Path):
    ran = session(str(tmp_path), PYTHON="/bin/false", DEVICE="cpu")
    parts = re.findall(r"^(\w+) +\d+ s  FAILED \(1\)$", ran.stdout, re.M)
    assert len(parts) >= 8 and ran.returncode == len(parts)
    assert f"failed or stopped: {' '.join(parts)}" in ran.stderr


def test_gpu_session_refuses_in_words(tmp_path: Path):
    assert session("--unknown").returncode == 2
    without = session(str(tmp_path), PYTHON="/bin/false")  # whatever asks it, there is no GPU
    assert without.returncode == 2 and "finds no GPU" in without.stderr
