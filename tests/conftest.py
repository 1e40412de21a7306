"""What holds for every test."""

import logging
from collections.abc import Iterator

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """main() sets logging up for the whole process, which outlives a test that calls it."""
    root, modes = logging.getLogger(), logging.getLogger("engine")
    handlers, levels = list(root.handlers), (root.level, modes.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    modes.setLevel(levels[1])  # benchmarks.step makes it quieter
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def compiled_anew(request: pytest.FixtureRequest) -> None:
    """What torch.compile remembers of another test's shapes would make it look for code for all shapes, slowly."""
    if "compile" in request.node.name:
        torch.compiler.reset()
