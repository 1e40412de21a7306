"""utils/cli.py: numbers with bounds, errors of the machine, exit codes; tools and benchmarks given nonsense."""

import argparse
import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import loader, tables, throughput
from tools import convert_weights, models, pack_dataset, plot_run
from utils.cli import as_user_error, number, run_cli, user_path, user_path_or_empty
from utils.errors import ExitCode, TrainingDiverged, UserError
from utils.paths import REPO_ROOT


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "logs/x"),
            "logs/x: No space left on device. Free some space",
        ),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Ways out: a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "Ways out: a smaller --batch-size"),
    ],
)
def test_as_user_error_translates_errors_of_the_machine(error, message):
    assert message in str(as_user_error(error))


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ValueError("x"), OSError("no number"), RecursionError()])
def test_as_user_error_leaves_bugs_alone(error):
    assert as_user_error(error) is None


def test_run_cli_returns_exit_codes(capsys):
    def fails(error: BaseException):
        def program() -> int:
            raise error

        return program

    assert run_cli(lambda: 0) == 0
    assert run_cli(fails(UserError("fix it"))) == 2
    assert run_cli(fails(TrainingDiverged("not finite"))) == 3
    assert run_cli(fails(PermissionError(errno.EACCES, "Permission denied", "f"))) == 2
    assert run_cli(fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines()[:3] == [
        "error: fix it", "error: not finite",
        "error: f: Permission denied. Free some space, fix the permissions, or choose another path",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="a fault"):
        run_cli(fails(RuntimeError("a fault")))


def test_programs_whose_reader_has_exited_end_quietly(tmp_path: Path):
    """stdout is a pipe without a reader: what is printed ends the program, what is logged does not."""
    printing = ("from utils.cli import run_cli", "sys.exit(run_cli(lambda: print('x' * 100000) or 0))")
    logging_ = ("from utils.cli import log_to_stdout, run_cli", "log_to_stdout()",
                "sys.exit(run_cli(lambda: [logging.info('x' * 100000) for _ in range(3)] and 0))")  # fmt: skip
    for lines, code in ((printing, ExitCode.CLOSED_PIPE), (logging_, ExitCode.OK)):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", "\n".join(("import logging, sys", *lines))]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPO_ROOT, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (code, "")


def test_number_has_bounds():
    assert number(int, 1, 8)("8") == 8 and number(float, 0, 1)("0.5") == 0.5
    for text in ("0", "9", "x", "1.5", "nan", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number from 1 to 8"):
            number(int, 1, 8)(text)


def test_user_path_begins_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a.md") == Path("/home/me/a.md") and user_path("a~.md") == Path("a~.md")
    assert user_path_or_empty("") == "" and user_path_or_empty("~") == "/home/me"
    with pytest.raises(argparse.ArgumentTypeError, match="there is no user 'nosuchuser'"):
        user_path("~nosuchuser/a.md")


def test_programs_refuse_nonsense_with_a_message(tmp_path: Path, capsys):
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.txt", "no images")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("a.jpg", "no image")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "epoch", "step": 1, "images_seen": 8}\n5\nnonsense\n')
    for program, words in (
        (throughput.main, ["--batch-size", "0"]),
        (throughput.main, ["--batch-size", "many"]),
        (throughput.main, ["--rounds", "-1"]),
        (throughput.main, ["--seconds", "nan"]),
        (loader.main, ["--images", f"{tmp_path}/nowhere.zip"]),
        (loader.main, ["--images", f"{tmp_path}/no.zip"]),
        (loader.main, ["--images", f"{tmp_path}/none.zip"]),
        (loader.main, ["--images", f"{tmp_path}/bad.zip"]),
        (loader.main, ["--images", str(tmp_path)]),
        (tables.main, []),
        (tables.main, ["6"]),
        (tables.main, ["1", "--batch-size", "-1", "--output", ""]),
        (tables.main, ["1", "--rounds", "0", "--output", ""]),
        (tables.main, ["1", "--only", "nothing", "--output", ""]),
        (tables.main, ["4", "--cfg", f"{tmp_path}/nowhere.yaml", "--output", ""]),
        (models.main, ["nothing of that name"]),
        (models.main, ["swin_tiny", "--write", f"{tmp_path}/no.zip/table.md"]),
        (plot_run.main, [str(tmp_path), "x.png"]),
        (plot_run.main, [str(tmp_path / "run"), "x.png"]),
        (models.main, ["swin_tiny", "--write", "~nosuchuser/table.md"]),
        (pack_dataset.main, [f"{tmp_path}/packed", "--data-path", "~nosuchuser/data"]),
        (pack_dataset.main, ["~nosuchuser/packed", "--data-path", str(tmp_path)]),
        (convert_weights.main, ["~nosuchuser/a.pth", f"{tmp_path}/out.pth", "--to", "timm"]),
        (convert_weights.main, []),
        (convert_weights.main, ["nowhere.pth", f"{tmp_path}/out.pth", "--to", "timm"]),
        (convert_weights.main, [f"{tmp_path}/no.zip", f"{tmp_path}/out.pth", "--to", "timm"]),
    ):
        try:
            code = program(words)
        except SystemExit as error:  # raised by argparse itself
            code = error.code
        output = capsys.readouterr().err
        assert code == 2 and "error: " in output and "Traceback" not in output, (program.__module__, words, output)
