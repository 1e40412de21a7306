"""Counting of a harness: how many cases of what kind came out as they should, and what the others said."""

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """The cases of one harness so far. `seed` gives them again."""

    name: str
    seed: int
    passed_by_kind: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, kind: str, passed: bool, detail: str = "") -> None:
        """Counts a case of the kind `what`; of one that is not `ok`, `detail` says what went wrong, and with what."""
        if passed:
            self.passed_by_kind[kind] += 1
        else:
            self.failures.append(f"{kind}: {detail}")

    def note(self, line: str) -> None:
        """Something that is to be printed with the counts."""
        self.notes.append(line)

    @property
    def count(self) -> int:
        return sum(self.passed_by_kind.values()) + len(self.failures)

    def lines(self) -> list[str]:
        """What is printed: the counts by kind, the seed and the time; and each failure."""
        minutes = (time.monotonic() - self.started) / 60
        head = f"{self.name}: {self.count - len(self.failures)} of {self.count} as they should be"
        kinds = [f"  {number:5d}  {kind}" for kind, number in sorted(self.passed_by_kind.items())]
        failed = [f"  FAILED {failure}" for failure in self.failures]
        notes = [f"  {note}" for note in self.notes]
        return [f"{head} (seed {self.seed}, {minutes:.1f} minutes)", *kinds, *notes, *failed]
