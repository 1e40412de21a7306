"""benchmarks/step.py and subprocess_step.py: the table of steps, and steps in processes of their own."""

import csv
import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.subprocess_step import SubprocessStep


def test_matrix_product_counts_operations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "images_per_second", lambda run, images, *_, **__: run().sum() and 100.0)
    assert step.matrix_product("bfloat16", torch.device("cpu")) == 100 * 2 * 2048**3


def test_write_adds_rows_and_replaces_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Two runs write to one file; the second replaces the row that it measures again."""
    monkeypatch.setattr(step, "matrix_product", lambda dtype, device: 1e11)
    table = tmp_path / "step.md"
    words = [
        "--models",
        "demo",
        "--dtypes",
        "float32",
        "--compile-modes",
        "eager",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
    ]
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
    assert len(here) == 1 and here[0]["over the best peer"] == ""  # the second run, which has no peers
    text = table.read_text()
    assert len(re.findall(r"^- Run: 1 interleaved rounds.*TFLOP/s in float32.*Command: ", text, re.M)) == 2
    assert "here skip, eager" in capsys.readouterr().out


def touch(folder: Path) -> tuple[step.Step, int]:
    """A step that creates a file named as its process id in `folder`."""
    return lambda: (folder / str(os.getpid())).touch(), os.getpid()


def fail(folder: Path) -> tuple[step.Step, int]:
    (folder / str(os.getpid())).touch()
    raise torch.OutOfMemoryError("too much")


def test_subprocess_step_that_cannot_be_built_leaves_no_process(tmp_path: Path):
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        SubprocessStep(fail, tmp_path)
    (file,) = tmp_path.iterdir()
    assert not Path("/proc", file.name).exists()


def test_subprocess_step_runs_where_it_was_built(tmp_path: Path):
    subprocess_step = SubprocessStep(touch, tmp_path)
    subprocess_step()
    subprocess_step()
    subprocess_step.close()
    pid = subprocess_step.info
    assert pid != os.getpid() and [file.name for file in tmp_path.iterdir()] == [str(pid)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models swin_huge", "--models swin_huge: there is no configs/swin_huge.yaml"),
        ("--rounds 0", "--rounds: '0' is no number from 1"),
        ("--device cpu --compile-modes graphs", "CUDA graphs need a GPU"),
        ("--device cpu --compile-modes tuned", "add --subprocess"),
        ("--write table.txt", "ends in .md"),
        ("--variant broken NO.SUCH_KEY 1 --device cpu --rounds 1", "NO.SUCH_KEY"),
    ],
)
def test_mistakes_end_with_code_2(words: str, message: str, capsys: pytest.CaptureFixture):
    assert step.main(["--models", "demo", *words.split()]) == 2
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output
