"""The plan of the house, checked: a file imports only from layers below its own, and no file grows past a sitting."""

import ast
from pathlib import Path

import pytest

from utils.paths import REPO_ROOT

LAYERS = [  # from the lowest; within one package, siblings may import each other
    {"config", "utils"},
    {"models.ops"},
    {"models", "data", "optimizer", "lr_scheduler"},
    {"data.build"},
    {"tasks"},
    {"engine"},
    {"main", "tools", "benchmarks"},
]
CONFIG_READERS = {"models.build", "data.build", "optimizer", "lr_scheduler", "main", "config"}


def modules() -> dict[str, Path]:
    paths = [p for p in REPO_ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(REPO_ROOT).parts)]
    return {".".join(p.relative_to(REPO_ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def layer_and_package(module: str) -> tuple[int, str] | None:
    """The layer of a module of this project and the package (package or file) it belongs to."""
    for name in (".".join(module.split(".")[:2]), module.split(".")[0]):
        for layer, packages in enumerate(LAYERS):
            if name in packages:
                return layer, name
    return None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str):
    place = layer_and_package(module)
    assert place is not None, f"{module} stands on no layer: add it to LAYERS and to docs/ARCHITECTURE.md"
    layer, package = place
    for imported in imports(modules()[module]):
        target = layer_and_package(imported)
        if target is None or target[1] == package:
            continue
        ground = layer == target[0] == 0
        assert target[0] < layer or ground, f"{module} (layer {layer}) imports {imported} (layer {target[0]})"


@pytest.mark.parametrize("module", sorted(modules()))
def test_few_read_the_config(module: str):
    names = {node.id for node in ast.walk(ast.parse(modules()[module].read_text())) if isinstance(node, ast.Name)}
    package = module.split(".")[0]
    if package not in ("tools", "benchmarks", "utils", "engine", "tasks") and "config" in names:
        assert module in CONFIG_READERS, f"{module} reads the config: pass it plain arguments"


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_file_is_longer_than_a_sitting(module: str):
    assert len(modules()[module].read_text().splitlines()) <= 420
