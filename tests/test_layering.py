"""Checks the layers of docs/ARCHITECTURE.md: a file imports only from layers below its own and from its own package."""

import ast
from pathlib import Path

import pytest

from utils.paths import REPO_ROOT

LAYERS = [  # from the lowest
    {"config", "utils"},
    {"models.ops"},
    {"models", "data", "optimizer", "lr_scheduler"},
    {"data.build"},
    {"tasks"},
    {"engine"},
    {"main", "tools", "benchmarks"},
]
# Everything else below `engine/` and `tasks/` takes plain arguments.
CONFIG_READERS = {"config", "main", "data.build", "models.build", "optimizer", "lr_scheduler"}
CONFIG_READING_PACKAGES = {"utils", "tasks", "engine", "tools", "benchmarks"}
METRIC_NAMES = ("acc1", "acc5", "top-1", "top-5")
MAX_LINES = 400


def find_modules() -> dict[str, Path]:
    """Returns the path of every module by its dotted name, without tests."""
    relative = [path.relative_to(REPO_ROOT) for path in REPO_ROOT.rglob("*.py")]
    ours = [path for path in relative if not path.parts[0].startswith(".") and path.parts[0] != "tests"]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): REPO_ROOT / path for path in ours}


MODULES = find_modules()
all_modules = pytest.mark.parametrize("module", sorted(MODULES))


def find_layer(module: str) -> tuple[int, str] | None:
    """Returns the layer of a module of this project, and its package (or file) in LAYERS."""
    for name in (".".join(module.split(".")[:2]), module.split(".")[0]):
        for layer, packages in enumerate(LAYERS):
            if name in packages:
                return layer, name
    return None


def imported_modules(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@all_modules
def test_imports_go_down(module: str):
    found = find_layer(module)
    assert found is not None, f"{module} is in no layer: add it to LAYERS and to docs/ARCHITECTURE.md"
    layer, package = found
    for imported in imported_modules(MODULES[module]):
        target = find_layer(imported)
        if target is None or target[1] == package:
            continue
        both_lowest = layer == target[0] == 0
        assert target[0] < layer or both_lowest, f"{module} (layer {layer}) imports {imported} (layer {target[0]})"


@all_modules
def test_only_builders_read_the_config(module: str):
    names = {node.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
    if module.split(".")[0] not in CONFIG_READING_PACKAGES and "config" in names:
        assert module in CONFIG_READERS, f"{module} reads the config: pass it plain arguments"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.split(".")[0] == "engine"))
def test_engine_names_no_metric_of_a_task(module: str):
    text = MODULES[module].read_text()
    assert not [name for name in METRIC_NAMES if name in text], f"{module}: metrics belong to tasks/"


@pytest.mark.parametrize("path", sorted(REPO_ROOT.glob("[!.]*/**/__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_have_no_code(path: Path):
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


@all_modules
def test_files_are_short(module: str):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES
