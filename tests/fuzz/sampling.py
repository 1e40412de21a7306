"""Draws cases with hypothesis from a seed."""

from typing import TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")


def sample_cases(strategy: SearchStrategy[Case], count: int, seed: int) -> list[Case]:
    """Draws `count` distinct cases; the same for the same seed and version of hypothesis.

    Hypothesis only generates them: the harness tests all of them, also after a failure.
    """
    cases: list[Case] = []
    seen: set[str] = set()

    @hypothesis.seed(seed)
    @settings(
        max_examples=20 * count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def draw(case: Case) -> None:
        if len(cases) < count and (shown := repr(case)) not in seen:
            seen.add(shown)
            cases.append(case)

    draw()
    if len(cases) < count:
        raise RuntimeError(f"only {len(cases)} of {count} cases could be drawn")
    return cases
