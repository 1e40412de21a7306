"""A table of results, on the terminal, as Markdown and as CSV, with what its figures depend on written below it."""

import csv
import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from utils.files import write_text
from utils.tracking.run_dir import collect_env

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A heading, and how Python's `format` writes the values below it."""

    name: str
    format: str = ""

    def text(self, value: object) -> str:
        if value is None:
            return MISSING
        return str(value) if isinstance(value, str) else format(value, self.format)


@dataclass
class Table:
    """Rows of values under columns; None is a value that there is not. `stem` names its files."""

    stem: str
    title: str
    columns: list[Column]
    rows: list[list[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def terminal(self) -> str:
        """Columns of equal width, numbers to the right."""
        heads, cells = [column.name for column in self.columns], self.cells()
        widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
        right = [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(heads))]
        lines = [
            "  ".join(text.rjust(n) if r else text.ljust(n) for text, n, r in zip(row, widths, right, strict=True))
            for row in [heads, ["-" * n for n in widths], *cells]
        ]
        return "\n".join([self.title, "", *(line.rstrip() for line in lines), "", *self.notes])

    def markdown(self) -> str:
        heads = [column.name for column in self.columns]
        right = [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(heads))]
        lines = [
            "| " + " | ".join(heads) + " |",
            "|" + "|".join(" ---: " if r else " --- " for r in right) + "|",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells()),
        ]
        return "\n".join([f"# {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes), ""])

    def csv(self) -> str:
        """The values as they are, not as they are shown."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return text.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Writes `stem`.md and `stem`.csv into `folder` and returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.stem}.md", folder / f"{self.stem}.csv"]
        for path, text in zip(paths, (self.markdown(), self.csv()), strict=True):
            write_text(path, text)
        return paths


def circumstances() -> list[str]:
    """Notes on what made the figures: hardware, versions, commit, command."""
    facts = collect_env()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"Hardware: {facts['hardware']}.",
        f"Versions: Python {facts['python']}, {versions}; {facts['platform']}.",
        f"Commit: {facts['git_commit'] or 'unknown'}.",
        f"Command: `{shlex.join(['python', *sys.orig_argv[1:]])}`",
    ]
