"""data/loader/loader.py: how worker processes begin and end."""

import multiprocessing
import signal
from multiprocessing.context import ForkProcess

import pytest
import torch

from data.loader.loader import BatchLoader
from data.loader.shared_memory import Sample


class Dots(torch.utils.data.Dataset):
    def __getitem__(self, key: int) -> Sample:
        return self.make(key, None)

    def make(self, key: int, out: dict[str, torch.Tensor] | None) -> Sample:
        ignored = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
                   if signal.getsignal(n) is signal.SIG_IGN]  # fmt: skip
        return Sample({"image": torch.full((2,), float(key))}, len(ignored), [])


def loader(workers: int = 2) -> BatchLoader:
    keys = [[0, 1], [2, 3]]
    return BatchLoader(Dots(), keys, workers, torch.device("cpu"), False, 2, {"image": ((2,), torch.float32)})


def test_workers_leave_signals_to_the_main_process_and_are_gone_afterwards():
    with loader().started() as batches:
        assert next(batches)["target"].tolist() == [4, 4]
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the half-built iterator
def test_a_worker_that_cannot_be_forked_leaves_none_behind(monkeypatch: pytest.MonkeyPatch):
    """Those before it would ignore SIGTERM, and the interpreter would wait for them at its end."""
    started = []
    start = ForkProcess.start

    def fails(self) -> None:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(ForkProcess, "start", fails)
    with pytest.raises(BlockingIOError):
        with loader().started():
            pass
    started[0].join(5)
    assert not started[0].is_alive()
