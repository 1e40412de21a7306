"""benchmarks/throughput.py: the comparison runs on a small model."""

import re
from pathlib import Path

from benchmarks import throughput


def test_rows_for_both_modes_and_dtypes(tmp_path: Path):
    table = tmp_path / "table.md"
    options = ["--batch-size", "2", "--seconds", "0.01", "--rounds", "1"]
    assert throughput.main(["--model", "demo", *options, "--write", str(table)]) == 0
    text = table.read_text()
    cells = [line.split("|")[1:-1] for line in re.findall(r"\| (?:inference|training), .*", text)]
    assert [cell[0].strip() for cell in cells] == [
        f"{mode}, {dtype}" for dtype in ("float32", "bfloat16") for mode in ("inference", "training")
    ]
    assert [cell[2].strip() == "–" for cell in cells] == [True, False] * 2  # no loop around inference
    assert "torch 2" in text and "Command: " in text
