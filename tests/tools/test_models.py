"""tools/models.py: the list of released weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.models import main, release_table
from utils.errors import ExitCode
from utils.paths import REPO_ROOT


def test_table_lists_the_known_facts(capsys: pytest.CaptureFixture):
    assert main(["swin_tiny", "224"]) == 0
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("swin_tiny_patch4_window7_224 "))
    assert re.split(r"\s{2,}", line) == [
        "swin_tiny_patch4_window7_224", "original", "1000", "28.3", "4.5", "108", "81.2", "95.5", "unknown",
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth",
    ]  # fmt: skip
    assert "swin_base" not in output and "timm/swin_tiny_patch4_window7_224.ms_in22k" in output
    assert "704ceda3…" in release_table(["torchvision"]).terminal()


def test_table_is_written(tmp_path: Path):
    assert main(["swin_tiny", "--write", str(tmp_path / "new" / "models.md")]) == 0
    assert "| swin_tiny_patch4_window7_224 |" in (tmp_path / "new" / "models.md").read_text()


def test_no_such_release(capsys: pytest.CaptureFixture):
    assert main(["swin", "giant"]) == 2
    assert "no release has a name with swin and giant" in capsys.readouterr().err


def test_closed_pipe_ends_without_a_traceback():
    """As in `python -m tools.models | head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tools.models"], cwd=REPO_ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (ExitCode.CLOSED_PIPE, "")
