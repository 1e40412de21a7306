"""A plugin of pytest: writes a line for each test that fails, with what it raised, into the file $FIRST_ERRORS.

FIRST_ERRORS=FILE python -m tests.fake_cuda python -m pytest -p tests.fake_cuda.first_errors -m gpu tests
"""

import os
from collections.abc import Iterator

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    yield
    outcome = "passed" if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}"
    if call.when == "call" or call.excinfo is not None:
        with open(os.environ["FIRST_ERRORS"], "a") as file:
            file.write(f"{item.nodeid}\t{outcome.splitlines()[0][:200]}\n")
