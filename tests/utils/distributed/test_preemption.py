"""utils/distributed/preemption.py: a signal stops all ranks, one step later unless they wait."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch.distributed as dist

from utils import interrupt
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


def test_a_lost_connection_stops_but_not_under_nohup():
    previous = signal.getsignal(signal.SIGHUP)
    with closing(PreemptionHandler(timeout=10)) as preemption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert preemption.should_stop() and not preemption.interrupted
    assert signal.getsignal(signal.SIGHUP) is previous
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with closing(PreemptionHandler(timeout=10)) as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.should_stop()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_terminal_that_is_gone_is_written_to_no_more(monkeypatch: pytest.MonkeyPatch):
    """With the connection the terminal goes: writing into it fails, which must not keep the run from being saved."""
    controller, terminal = os.openpty()
    kept = os.dup(1)
    os.dup2(terminal, 1)
    os.close(terminal)
    try:
        with closing(PreemptionHandler(timeout=10)):
            os.close(controller)
            with pytest.raises(OSError):
                os.write(1, b"lost")
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"nowhere")
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_an_interrupt_is_deferred_until_closed(monkeypatch: pytest.MonkeyPatch):
    deferred = []
    monkeypatch.setattr(interrupt, "defer", deferred.append)
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert deferred == []
        preemption.defer_interrupts()
        assert not preemption.should_stop()
        deferred[0]()
        assert preemption.should_stop() and preemption.interrupted
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.interrupted, "it stays an interrupt"
    assert deferred[1:] == [None]


@pytest.mark.parametrize(("of_another", "interrupted"), [(0, False), (1, False), (2, True)])
def test_ranks_agree_on_an_interrupt_of_any_one(of_another, interrupted, one_process_group, monkeypatch):
    all_reduce = dist.all_reduce

    def with_another_rank(flag, operation, **kwargs):
        assert operation == dist.ReduceOp.MAX
        flag.clamp_(min=of_another)
        return all_reduce(flag, operation, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert preemption.should_stop(wait=True) == (of_another > 0)
        assert preemption.interrupted == interrupted


def test_iterate_until_stop_ends_early(one_process_group):
    with closing(PreemptionHandler(timeout=10)) as preemption:
        assert list(preemption.iterate_until_stop([1, 2], max_items=3)) == [1, 2]
        seen = []
        for item in preemption.iterate_until_stop(range(9), max_items=9):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [0, 1, 2, 3]
