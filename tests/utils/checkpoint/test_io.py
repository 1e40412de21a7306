"""utils/checkpoint/io.py: complete files or none, nothing executed, messages for bad files."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import not_finite, read_checkpoint
from utils.checkpoint.weights import extract_weights
from utils.errors import UserError


class Command:
    """Pickles to something that runs a command when it is loaded in earnest."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before 1.6"])
def test_read_checkpoint_turns_files_of_the_original_code_into_plain_data(tmp_path: Path, zipped: bool):
    config = CfgNode({"MODEL": {"NAME": "swin"}, "BASE": [""]})
    config.freeze()
    path = tmp_path / "original.pth"
    contents = {"model": {"head.bias": torch.ones(3)}, "max_accuracy": 81.2, "config": config}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(str(path))
    assert read["config"] == {"MODEL": {"NAME": "swin"}, "BASE": [""]}
    assert not isinstance(read["config"], CfgNode)
    assert torch.equal(extract_weights(read, "file").state_dict["head.bias"], torch.ones(3))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_read_checkpoint_refuses_code_by_name_and_does_not_run_it(tmp_path: Path, kind: str):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    contents = {"model": {"w": torch.zeros(2)}, "extra": Command(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Command(marker)}))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"evil.pth: refused.*posix.system"):
        read_checkpoint(str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: b"no checkpoint at all", "truncated or damaged"),
    ],
)
def test_read_checkpoint_refuses_damaged_files(tmp_path: Path, damage, message: str):
    path = tmp_path / "damaged.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"damaged.pth.*{message}"):
        read_checkpoint(str(path))


def test_read_checkpoint_never_loads_flipped_bits(tmp_path: Path):
    """A bit anywhere in the file: it is refused, or lies where nothing reads it and the contents are the same."""
    path = tmp_path / "last.pth"
    weights = torch.arange(2000, dtype=torch.float32)
    torch.save({"model": {"w": weights}, "state": {"images_seen": 4096}}, path)
    whole = path.read_bytes()
    draws, refused = random.Random(0), 0
    for _ in range(300):
        place = draws.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
        try:
            contents = read_checkpoint(str(path))
        except UserError as error:
            assert "last.pth" in str(error)
            refused += 1
            continue
        assert torch.equal(contents["model"]["w"], weights) and contents["state"] == {"images_seen": 4096}
    assert refused > 250


def test_read_checkpoint_refuses_missing_files_and_other_contents(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere.pth: no such file"):
        read_checkpoint(str(tmp_path / "nowhere.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(str(tmp_path / "list.pth"))


def test_checkpoint_folder_names_prunes_and_finds_the_newest(tmp_path: Path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    folder.prepare()
    assert folder.newest() is None
    for epoch in range(1, 12):
        folder.save({"epoch": epoch, "w": torch.full((3,), float(epoch))}, epoch=epoch, best=epoch == 4)
    assert sorted(p.name for p in folder.folder.iterdir()) == [
        "best.pth",
        "epoch_0010.pth",
        "epoch_0011.pth",
        "last.pth",
    ]
    assert read_checkpoint(str(folder.best))["epoch"] == 4
    path, contents = folder.newest()
    assert path == folder.last and contents["epoch"] == 11


def test_checkpoint_folder_falls_back_by_number_not_by_time(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = CheckpointFolder(tmp_path, keep=0)
    for epoch in (1, 2, 3):
        folder.save({"epoch": epoch}, epoch=epoch)
    os.utime(tmp_path / "epoch_0001.pth", (4e9, 4e9))
    folder.last.write_bytes(b"damaged")  # a hard link of epoch 3 too: that is what sharing one file means
    folder.last.unlink()
    folder.last.write_bytes(b"damaged")
    (tmp_path / "epoch_0003.pth").unlink()
    path, contents = folder.newest()
    assert path.name == "epoch_0002.pth" and contents["epoch"] == 2
    assert "last.pth: not a readable checkpoint" in caplog.text
    for left in tmp_path.glob("*.pth"):
        left.unlink()
        left.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        folder.newest()


def test_not_finite_names_the_tensor():
    model = {"w": torch.ones(2), "n": torch.tensor(3), "none": torch.zeros(0)}
    good = {"model": model, "state": {"best_metric": float("-inf")}}
    assert not_finite(good) is None
    large = torch.full((3,), 3e38)  # its square is not a number in float32, and it is one
    for bad in (float("nan"), float("inf"), float("-inf")):
        state = {"optimizer": {"state": {0: {"exp_avg": torch.tensor([1.0, bad]), "exp_avg_sq": large}}}}
        assert not_finite(good | state) == "optimizer.state.0.exp_avg"
    assert not_finite({"ema": [large, large.double() * 10]}) is None
