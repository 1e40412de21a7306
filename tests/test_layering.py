"""The plan of the house, checked: a file imports only from floors below its own, and no file grows past a sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the ground up; within one package, siblings may import each other
    {"config", "utils"},
    {"models.ops.window"},
    {"models.ops.dispatch"},
    {"models", "data", "optimizer", "lr_scheduler"},
    {"objectives"},
    {"engine"},
    {"modes", "models.other_libraries"},
    {"main", "tools", "benchmarks"},
]
CONFIG_READERS = {"models.build", "data.build", "optimizer", "lr_scheduler", "main", "config"}


def modules() -> dict[str, Path]:
    paths = [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def floor_and_room(module: str) -> tuple[int, str] | None:
    """The floor of a module of this project and the room (package or file) it belongs to."""
    for name in (".".join(module.split(".")[:2]), module.split(".")[0]):
        for floor, rooms in enumerate(FLOORS):
            if name in rooms:
                return floor, name
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
    place = floor_and_room(module)
    assert place is not None, f"{module} stands on no floor: add it to FLOORS and to docs/ARCHITECTURE.md"
    floor, room = place
    for imported in imports(modules()[module]):
        target = floor_and_room(imported)
        if target is None or target[1] == room:
            continue
        ground = floor == target[0] == 0
        assert target[0] < floor or ground, f"{module} (floor {floor}) imports {imported} (floor {target[0]})"


@pytest.mark.parametrize("module", sorted(modules()))
def test_few_read_the_config(module: str):
    names = {node.id for node in ast.walk(ast.parse(modules()[module].read_text())) if isinstance(node, ast.Name)}
    room = module.split(".")[0]
    if room not in ("tools", "benchmarks", "utils", "modes") and "config" in names:
        assert module in CONFIG_READERS, f"{module} reads the config: pass it plain arguments"


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_file_is_longer_than_a_sitting(module: str):
    assert len(modules()[module].read_text().splitlines()) <= 420
