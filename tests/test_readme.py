"""Checks README.md and docs/: commands parse, figures in tables are recomputed, links resolve."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from utils.paths import REPO_ROOT

DOCS = [*sorted(REPO_ROOT.glob("*.md")), REPO_ROOT / "logs" / "README.md", *sorted((REPO_ROOT / "docs").rglob("*.md"))]
CONFIGS = REPO_ROOT / "configs"


def commands(path: Path) -> list[str]:
    """The lines of the bash blocks in a document."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = list(dict.fromkeys(command for path in DOCS for command in commands(path)))


def head_commands() -> list[str]:
    """The commands in the first comment of each recipe."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        head = "".join(line[1:].strip() + "\n" for line in path.read_text().splitlines() if line.startswith("#"))
        named = [c for c in head.replace("\\\n", " ").splitlines() if "main.py" in c]
        assert named or "make demo" in head, f"{path.name} names no command"
        found += named
    return found


def help_commands() -> list[str]:
    return [line.strip() for line in main.__doc__.splitlines() if "main.py --cfg" in line]


@pytest.mark.parametrize("command", [*filter(lambda c: "main.py" in c, COMMANDS), *head_commands(), *help_commands()])
def test_main_accepts_command(command: str, monkeypatch: pytest.MonkeyPatch):
    """Parses the command line and the configuration for real, up to where data and weights would be read."""
    monkeypatch.chdir(REPO_ROOT)
    words = shlex.split(command)
    script = words.index("main.py")
    if "torchrun" in words:
        from torch.distributed.run import get_args_parser

        # torchrun's own flags come first; it stops at main.py.
        arguments = words[words.index("torchrun") + 1 :]
        assert get_args_parser().parse_args(arguments).training_script == "main.py"
    reached = []
    monkeypatch.setattr(main, "run", lambda config, allow_config_change: reached.append(config))
    assert main.main(words[script + 1 :]) == 0
    assert reached[0].DATA.DATA_PATH in ("DIR", "PACKED", "") or "demo" in command


@pytest.mark.parametrize("command", [c for c in COMMANDS if " -m " in c or c.startswith("bash ")])
def test_named_programs_exist(command: str):
    words = shlex.split(command)
    if words[0] == "bash":
        assert (REPO_ROOT / words[1]).is_file()
    else:
        module = words[words.index("-m") + 1]
        assert module in ("venv", "pytest") or importlib.util.find_spec(module), module


def test_no_command_is_left_untested():
    known = ("main.py", " -m ", "tensorboard --logdir logs", "source .venv/", "pip install -r requirements.txt")
    others = [c for c in COMMANDS if not any(part in c for part in (*known, "apt-get install", "import torch"))]
    assert not others


@pytest.mark.parametrize("target", ["demo", "test", "test-all"])
def test_make_targets(target: str):
    result = subprocess.run(["make", "--dry-run", target], cwd=REPO_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("configs/demo.yaml" if target == "demo" else "pytest") in result.stdout


def model_zoo() -> dict[str, tuple[str, ...]]:
    """The rows of the tables in MODEL_ZOO.md by the name of the recipe."""
    text = (REPO_ROOT / "docs" / "MODEL_ZOO.md").read_text()
    link, sizes = r"\| \[(\w+)\]\(\.\./configs/(\w+)\.yaml\) \|", r" (\d+) \| ([\d.]+) M \| ([\d.]+) G \|"
    data, epochs_and_hours = r"(?: [\w\s-]+? \|)?", r" (\d+) \|(?: ([\d.]+) \|)?"
    return {row[0]: row for row in re.findall(link + data + sizes + epochs_and_hours, text)}


def test_model_zoo_lists_every_recipe():
    assert sorted(model_zoo()) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


FAST_ROWS = ("swin_tiny", "swinv2_tiny_w8", "swin_mlp_tiny_c24", "cifar10", "demo")


@pytest.mark.parametrize(
    "name", [n if n in FAST_ROWS else pytest.param(n, marks=pytest.mark.slow) for n in model_zoo()]
)
def test_model_zoo_is_recomputed(name: str):
    """Sizes are counted from the models; hours follow from 10 % of 989 TFLOP/s on each of 8 GPUs."""
    _, file, size, parameters, macs, epochs, hours = model_zoo()[name]
    config = get_config(str(CONFIGS / f"{file}.yaml"))
    with torch.device("meta"):
        model = build_model(config)
    count = count_macs(model, config.DATA.IMG_SIZE)
    assert (name, int(size), int(epochs)) == (file, config.DATA.IMG_SIZE, config.TRAIN.EPOCHS)
    assert f"{count_parameters(model) / 1e6:.1f}" == parameters
    assert f"{count / 1e9:.2f}" == macs
    if hours:
        images = 14_197_122 if config.DATA.DATASET == "imagenet22K" else 1_281_167
        assert f"{6 * count * images * config.TRAIN.EPOCHS / (8 * 0.1 * 989e12) / 3600:.1f}" == hours


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(REPO_ROOT)))
def test_links_resolve(path: Path):
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", path.read_text()):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}{anchor}"


def test_architecture_names_every_module():
    text = (REPO_ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for folder in ("engine", "tasks", "models", "data", "utils"):
        for path in (REPO_ROOT / folder).rglob("*.py"):
            if path.stem != "__init__":
                assert re.search(rf"\b{path.name}\b", text), f"docs/ARCHITECTURE.md does not mention {path}"
    for path in REPO_ROOT.glob("*.py"):
        assert path.name in text, f"docs/ARCHITECTURE.md does not mention {path}"


@pytest.mark.slow
def test_demo_accuracy(tmp_path: Path):
    words = [sys.executable, "main.py", "--cfg", "configs/demo.yaml", "--output", str(tmp_path)]
    result = subprocess.run(
        [*words, "--data-path", str(tmp_path / "digits")], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"best top-1 ([\d.]+) %", result.stdout).group(1)) >= 96.0
