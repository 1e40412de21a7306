"""A table of results for the terminal, as Markdown and as CSV, with notes on the measurement below it."""

import csv
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.files import write_text
from utils.tracking.run_dir import collect_env

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column: its heading, and the format specification of its values."""

    name: str
    format: str = ""

    def text(self, value: object) -> str:
        if value is None:
            return MISSING
        return str(value) if isinstance(value, str) else format(value, self.format)


@dataclass
class Table:
    """Rows of values under columns; None is a missing value. `stem` is the name of its files without suffix."""

    stem: str
    title: str
    columns: list[Column]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Returns the rows as text."""
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def terminal(self) -> str:
        """Formats the table for a terminal, with numbers aligned to the right."""
        headings, cells, right = self._headings(), self.cells(), self._right_aligned()
        widths = [max(len(row[i]) for row in [headings, *cells]) for i in range(len(headings))]
        lines = [
            "  ".join(text.rjust(n) if r else text.ljust(n) for text, n, r in zip(row, widths, right, strict=True))
            for row in [headings, ["-" * n for n in widths], *cells]
        ]
        return "\n".join([self.title, "", *(line.rstrip() for line in lines), "", *self.notes])

    def markdown(self) -> str:
        """Formats the table as Markdown."""
        lines = [
            "| " + " | ".join(self._headings()) + " |",
            "|" + "|".join(" ---: " if r else " --- " for r in self._right_aligned()) + "|",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells()),
        ]
        return "\n".join([f"# {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes), ""])

    def csv(self) -> str:
        """Formats the table as CSV, with unrounded values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._headings())
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return text.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Writes `stem`.md and `stem`.csv into `folder` and returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.stem}.md", folder / f"{self.stem}.csv"]
        for path, text in zip(paths, (self.markdown(), self.csv()), strict=True):
            write_text(path, text)
        return paths

    def _headings(self) -> list[str]:
        return [column.name for column in self.columns]

    def _right_aligned(self) -> list[bool]:
        """Whether each column contains numbers."""
        return [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(self.columns))]


def circumstances() -> list[str]:
    """Returns notes for a table: hardware, versions, commit, command."""
    env = collect_env()
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return [
        f"Hardware: {env['hardware']}.",
        f"Versions: Python {env['python']}, {versions}; {env['platform']}.",
        f"Commit: {env['git_commit'] or 'unknown'}.",
        f"Command: `{shlex.join(['python', *sys.orig_argv[1:]])}`",
    ]
