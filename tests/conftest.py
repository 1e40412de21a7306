"""What holds for all tests."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
