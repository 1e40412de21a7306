"""Runs a command on the stand-in CUDA runtime, for tests."""

import subprocess
from collections.abc import Mapping, Sequence

import pytest

from tests.fake_cuda.build import CannotBuild, build, environment
from utils.paths import REPO_ROOT


def fake_environment(**extra: str) -> dict[str, str]:
    """Returns the environment of such a command. Skips the test where the stand-in cannot be built."""
    try:
        return {**environment(build()), **extra}
    except CannotBuild as error:
        pytest.skip(f"no stand-in CUDA runtime: {error}")


def run_on_fake_cuda(
    command: Sequence[str], environment: Mapping[str, str], timeout: float = 280
) -> subprocess.CompletedProcess:
    """Runs `command` in the repository. Fails with what it printed if it does not exit with 0."""
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done
