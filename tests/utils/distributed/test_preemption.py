"""utils/distributed/preemption.py: a signal stops all ranks, one step later unless they wait."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch.distributed as dist

from utils.distributed.preemption import PreemptionHandler


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_should_stop_without_a_process_group_answers_at_once():
    previous = signal.getsignal(signal.SIGUSR1)
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert not preemption.should_stop() and not preemption.should_stop(wait=True)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.should_stop()
    assert signal.getsignal(signal.SIGUSR1) is previous


def test_should_stop_answers_one_call_later_unless_it_waits(one_process_group):
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert not preemption.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert [preemption.should_stop() for _ in range(3)] == [False, True, True]
    with closing(PreemptionHandler(timeout=10)) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(wait=True)


def test_iterate_until_stop_ends_early(one_process_group):
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert list(preemption.iterate_until_stop([1, 2], max_items=3)) == [1, 2]
        seen = []
        for item in preemption.iterate_until_stop(range(9), max_items=9):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [0, 1, 2, 3]
