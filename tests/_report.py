"""Counts the passed cases of a harness by kind, and collects its failures."""

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """The cases of one harness so far; `seed` reproduces them."""

    name: str
    seed: int
    passed_by_kind: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, kind: str, passed: bool, detail: str = "") -> None:
        """Counts a case; `detail` describes the failure of one that has not passed."""
        if passed:
            self.passed_by_kind[kind] += 1
        else:
            self.failures.append(f"{kind}: {detail}")

    def note(self, line: str) -> None:
        """Adds a line to print with the counts."""
        self.notes.append(line)

    @property
    def count(self) -> int:
        return sum(self.passed_by_kind.values()) + len(self.failures)

    def lines(self) -> list[str]:
        """Returns the lines to print: the counts by kind, the seed, the time, and each failure."""
        minutes = (time.monotonic() - self.started) / 60
        head = f"{self.name}: {self.count - len(self.failures)} of {self.count} passed"
        kinds = [f"  {number:5d}  {kind}" for kind, number in sorted(self.passed_by_kind.items())]
        failed = [f"  FAILED {failure}" for failure in self.failures]
        notes = [f"  {note}" for note in self.notes]
        return [f"{head} (seed {self.seed}, {minutes:.1f} minutes)", *kinds, *notes, *failed]
