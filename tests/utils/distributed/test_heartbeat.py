"""utils/distributed/heartbeat.py: beats, and the description of lost ranks."""

import json
import os

import pytest
import torch

from utils.distributed import heartbeat
from utils.distributed.heartbeat import Heartbeat


def beat(beats: int, exit_reason: str | None = None) -> dict:
    location = "engine/train_step.py:5"
    return {"process": "process 7 on node", "beats": beats, "location": location, "exit_reason": exit_reason}


def test_describe_compares_two_beats_of_each_rank():
    dead = heartbeat._describe([beat(3), beat(3), beat(3)], [beat(9, ""), beat(3), beat(9)])
    assert dead.startswith("rank 1 (process 7 on node) was killed or stopped")
    hung = heartbeat._describe([beat(3), beat(3)], [beat(9, ""), beat(9)])
    assert hung == "rank 1 (process 7 on node) hangs at engine/train_step.py:5"
    ended = heartbeat._describe([beat(3), beat(3)], [beat(9, ""), beat(4, "UserError: no room")])
    assert ended == "rank 1 (process 7 on node) ended: UserError: no room"
    assert "connection" in heartbeat._describe([beat(3), beat(3)], [beat(9, ""), beat(9, "")])


def test_heartbeat_reports_location_and_exit_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    mine = Heartbeat(store, 0, 1)
    written = mine._read()[0]
    assert f"process {os.getpid()} on " in written["process"]
    assert written["location"].startswith("tests/utils/distributed/test_heartbeat.py:")
    mine.stop("UserError: why")
    assert mine._read()[0]["exit_reason"] == "UserError: why" and not mine._thread.is_alive()
    json.dumps(written)
