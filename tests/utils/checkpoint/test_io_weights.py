"""utils/checkpoint/io.py: weight files in safetensors and PyTorch format."""

import json
from pathlib import Path

import pytest
import torch

from utils.checkpoint.io import read_checkpoint, write_weights
from utils.checkpoint.weights import extract_weights
from utils.errors import UserError
from utils.files import TEMPORARY


def test_safetensors_are_detected_by_name_or_contents(tmp_path: Path):
    weights = {"a": torch.ones(2), "b": torch.arange(6, dtype=torch.int64).reshape(2, 3).T}
    write_weights(tmp_path / "w.safetensors", weights)
    (tmp_path / "renamed.pth").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for name in ("w.safetensors", "renamed.pth"):
        read = extract_weights(read_checkpoint(tmp_path / name), name).state_dict
        assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)
    header = (tmp_path / "w.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: data[:-1]])
def test_damaged_safetensors_are_refused(tmp_path: Path, damage):
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": torch.ones(20)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="w.safetensors: not a readable checkpoint"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_failing_write_leaves_the_old_file(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / f"w.{ending}"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="could not be written.*No space"):
        write_weights(path, {"a": torch.ones(20)})
    assert path.read_bytes() == b"old" and not list(tmp_path.glob(f"*{TEMPORARY}"))
