"""utils/distributed/process_group.py: how a lost connection is reported."""

import pytest

from tests.utils.distributed.test_launch import TORCHRUN
from utils import interrupt
from utils.distributed import process_group
from utils.errors import LostProcess


class StubHeartbeat:
    def describe_lost_ranks(self) -> str:
        return "rank 1 was killed"

    def stop(self, reason: str) -> None:
        pass


@pytest.mark.parametrize(("interrupted", "expected"), [(False, LostProcess), (True, KeyboardInterrupt)])
def test_a_rank_that_was_interrupted_itself_does_not_report_another_as_lost(interrupted, expected, monkeypatch):
    """Ctrl-C reaches all ranks, and those that have nothing to save end first."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process_group, "_join", lambda *args: StubHeartbeat())
    monkeypatch.setattr(interrupt, "received", lambda: interrupted)
    with pytest.raises(expected):
        with process_group.process_group(timeout=10):
            raise RuntimeError("[gloo] Connection closed by peer")
