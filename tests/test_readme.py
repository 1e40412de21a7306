"""What README and the recipes say is true: commands that parse, tables that are counted, links that lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from benchmarks import throughput
from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from tools import plot_run
from utils.paths import REPO_ROOT
from utils.tracking.metric_writer import MetricWriter

README = (REPO_ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
DOCS = [REPO_ROOT / "README.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]


def head_commands() -> list[str]:
    """The commands in the head comments of the recipes."""
    commands = []
    for path in sorted((REPO_ROOT / "configs").glob("*.yaml")):
        head = "".join(line[1:].strip() + "\n" for line in path.read_text().splitlines() if line.startswith("#"))
        found = [c for c in head.replace("\\\n", " ").splitlines() if "main.py" in c]
        assert found or "make demo" in head, f"{path.name} names no command"
        commands += found
    return commands


def help_commands() -> list[str]:
    return [line.strip() for line in main.__doc__.splitlines() if "main.py --cfg" in line]


@pytest.mark.parametrize("command", [*filter(lambda c: "main.py" in c, COMMANDS), *head_commands(), *help_commands()])
def test_command_of_the_main_job_is_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    """All that a command line can get wrong before data and weights are looked at, run for real up to there."""
    monkeypatch.chdir(REPO_ROOT)
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        # torchrun's own flags come first; it stops at main.py.
        assert get_args_parser().parse_args(words[1:]).training_script == "main.py"
    reached = []
    monkeypatch.setattr(main, "run", lambda config, allow_config_change: reached.append(config))
    assert main.main(words[words.index("main.py") + 1 :]) == 0
    assert reached[0].DATA.DATA_PATH in ("DIR", "") or "demo" in command


def test_other_commands_of_the_readme_exist():
    others = [command for command in COMMANDS if "main.py" not in command]
    assert {tuple(shlex.split(command)[:3]) for command in others} == {
        ("python", "-m", "benchmarks.loader"),
        ("python", "-m", "benchmarks.throughput"),
        ("python", "-m", "tools.convert_weights"),
        ("python", "-m", "tools.models"),
        ("python", "-m", "tools.pack_dataset"),
        ("python", "-m", "tools.plot_run"),
        ("tensorboard", "--logdir", "logs"),
    }


@pytest.mark.parametrize("target", ["demo", "test", "test-all"])
def test_make_knows_its_targets(target: str):
    shown = subprocess.run(["make", "--dry-run", target], cwd=REPO_ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert ("configs/demo.yaml" if target == "demo" else "pytest") in shown.stdout


def test_table_of_configurations_is_counted():
    rows = re.findall(r"\| \[(\w+)\]\((configs/\w+\.yaml)\) \| .*?, (\d+) \| ([\d.]+) M \| ([\d.]+) G \|", README)
    assert {path for _, path, *_ in rows} == {f"configs/{p.name}" for p in (REPO_ROOT / "configs").glob("*.yaml")}
    for name, path, size, parameters, macs in rows:
        config = get_config(str(REPO_ROOT / path))
        with torch.device("meta"):
            model = build_model(config)
        assert Path(path).stem == name and config.DATA.IMG_SIZE == int(size)
        assert f"{count_parameters(model) / 1e6:.1f}" == parameters, name
        assert f"{count_macs(model, config.DATA.IMG_SIZE) / 1e9:.2f}" == macs, name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_architecture_names_every_module():
    text = (REPO_ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for folder in ("", "models", "data", "utils"):
        for path in (REPO_ROOT / folder).glob("*.py"):
            if path.stem != "__init__":
                assert re.search(rf"\b{path.stem}\b", text), f"docs/ARCHITECTURE.md does not mention {path}"


def test_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real comparison, on a model and a time that are small."""
    from timm import create_model

    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    monkeypatch.setattr(throughput.timm, "create_model", lambda name, **kwargs: create_model(name, **kwargs, **small))
    opts = [word for key, value in small.items() for word in (f"MODEL.SWIN.{key.upper()}", list_or_number(value))]
    tiny = get_config(str(throughput.CONFIG), opts)
    monkeypatch.setattr(throughput, "get_config", lambda path: tiny)
    table = tmp_path / "table.md"
    assert throughput.main(["--batch-size", "2", "--seconds", "0.01", "--turns", "1", "--write", str(table)]) == 0
    text = table.read_text()
    assert len(re.findall(r"\| (?:inference|training), (?:float32|bfloat16) \|", text)) == 4
    assert "torch 2" in text and "python -m benchmarks.throughput" in text


def list_or_number(value):
    return list(value) if isinstance(value, tuple) else value


def test_curves_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    records = MetricWriter(tmp_path, tmp_path / "tensorboard", 0, 0)
    for update in (1, 2, 3, 4):
        records.add("train", update, 10 * update, {"loss": 2.0 / update})
    records.add("epoch", 4, 40, {"epoch": 1, "val_loss": 0.7, "acc1": 60.0, "ema_acc1": 61.0})
    (tmp_path / "starts.jsonl").write_text('{"samples": 0}\n{"samples": 20}\n')
    assert plot_run.main([str(tmp_path), str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert plot_run.main([str(tmp_path / "none"), "x.png"]) == 2
    assert "Give the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_reaches_what_it_promises(tmp_path: Path):
    words = [sys.executable, "main.py", "--cfg", "configs/demo.yaml", "--output", str(tmp_path)]
    done = subprocess.run(
        [*words, "--data-path", str(tmp_path / "digits")], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"best top-1 ([\d.]+) %", done.stdout).group(1)) >= 96.0
