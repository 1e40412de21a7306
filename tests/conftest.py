"""Fixtures of all tests."""

import logging
import pwd
from collections.abc import Iterator

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undoes the process-wide logging setup of main()."""
    root, engine = logging.getLogger(), logging.getLogger("engine")
    handlers, levels = list(root.handlers), (root.level, engine.level)
    yield
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler) and handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    engine.setLevel(levels[1])  # benchmarks/step.py changes it
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def reset_compiler(request: pytest.FixtureRequest) -> None:
    """Clears torch.compile's caches: shapes of other tests would make it compile for dynamic shapes, which is slow."""
    if "compile" in request.node.name:
        torch.compiler.reset()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in the password file and without HOME, as in a container with --user."""
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
