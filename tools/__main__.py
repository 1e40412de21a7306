"""Lists the programs in this folder, one per line."""

import ast
import sys
from pathlib import Path

from utils.cli import run_cli


def summaries() -> dict[str, str]:
    """Program name to the first line of its docstring, read without importing the program."""
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in paths}
    return {name: docstring.partition("\n")[0] for name, docstring in docstrings.items()}


def main() -> int:
    """Prints the list."""
    for name, summary in summaries().items():
        print(f"python -m tools.{name:<25}{summary}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
