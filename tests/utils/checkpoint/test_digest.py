"""utils/checkpoint/digest.py and schema.py: files that carry their digest, and entries that a run needs."""

import io
import random
import zipfile
from pathlib import Path

import pytest
import torch

from tests._tiny import run_main, write_images, write_recipe
from utils.checkpoint import digest
from utils.checkpoint.io import read_checkpoint
from utils.checkpoint.schema import class_names_in, validate_checkpoint
from utils.checkpoint.weights import extract_weights
from utils.errors import UserError

CONTENTS = {"model": {"w": torch.arange(5000.0), "b": torch.ones(3)}, "state": {"images_seen": 4096}, "text": "x" * 100}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with open(tmp_path / "last.pth", "wb") as file:
        digest.save(CONTENTS, file)
    return tmp_path / "last.pth"


def test_save_writes_a_file_that_torch_load_reads(path: Path):
    assert digest.verify_digest(path)
    for options in ({}, {"mmap": True}):
        read = torch.load(path, weights_only=True, **options)
        assert torch.equal(read["model"]["w"], CONTENTS["model"]["w"]) and read["state"] == CONTENTS["state"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")


def test_verify_digest_returns_none_for_other_files(tmp_path: Path):
    torch.save(CONTENTS, tmp_path / "theirs.pth")
    (tmp_path / "short").write_bytes(b"PK")
    assert digest.verify_digest(tmp_path / "theirs.pth") is None
    assert digest.verify_digest(tmp_path / "short") is None
    assert read_checkpoint(str(tmp_path / "theirs.pth"))["state"] == CONTENTS["state"]


def test_verify_digest_notices_every_flipped_bit(path: Path):
    """Also in the zip's directory, which has no checksum. A flip in the mark `sha256:` leaves only the CRC-32s."""
    whole, draws = path.read_bytes(), random.Random(0)
    places = [*draws.sample(range(len(whole)), 150), *range(len(whole) - 72, len(whole))]
    mark = range(len(whole) - 71, len(whole) - 64)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
        assert digest.verify_digest(path) is (None if place in mark else False), place


def test_save_hashes_small_writes_like_large_ones(monkeypatch: pytest.MonkeyPatch):
    def save(contents: bytes, file) -> None:
        for start in range(0, len(contents), 1):
            file.write(contents[start : start + 1])

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    monkeypatch.setattr(torch, "save", save)
    out = io.BytesIO()
    digest.save(buffer.getvalue(), out)
    assert zipfile.ZipFile(out).read("a") == b"b"
    assert out.getvalue()[:-73] == buffer.getvalue()[:-2]


def test_read_checkpoint_refuses_tensors_that_are_no_plain_arrays(tmp_path: Path):
    for value in (torch.zeros(1).expand(1 << 20, 1 << 20), torch.eye(3).to_sparse()):
        torch.save({"w": value}, tmp_path / "w.pth")
        with pytest.raises(UserError, match="w.pth: holds a tensor that is no plain array"):
            read_checkpoint(str(tmp_path / "w.pth"))
    endless: dict = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pth")
    with pytest.raises(UserError, match="nested without end"):
        read_checkpoint(str(tmp_path / "w.pth"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The checkpoint of a real run."""
    root = tmp_path_factory.mktemp("run")
    short = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    words = ["--cfg", write_recipe(root), "--data-path", write_images(root / "images"), "--output", root / "logs"]
    assert run_main([*words, *short]) == 0
    return read_checkpoint(str(root / "logs" / "tiny" / "default" / "checkpoints" / "last.pth"))


def test_validate_checkpoint_accepts_a_real_run(run: dict):
    validate_checkpoint(run, "last.pth")
    assert class_names_in(run, "last.pth") == ["blue", "green"] and extract_weights(run, "last.pth").state_dict


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("format", 2, "has format 2"),
        ("model", None, "model missing or invalid"),
        ("config", 5, "config missing"),
        ("class_names", [1], "class_names are no list of names"),
        ("optimizer.param_groups", {}, "optimizer.param_groups missing"),
        ("optimizer.state.0.exp_avg", 5, "optimizer.state.0.exp_avg missing"),
        ("state.images_seen", -1, "state.images_seen missing"),
        ("state.images_seen", True, "state.images_seen missing"),
        ("train_data", "x", "train_data missing"),
        ("train_data.num_images", 0, "train_data.num_images missing"),
        ("train_data.dataset_digest", None, "train_data.dataset_digest missing"),
        ("state.better_weights", "x", "state.better_weights missing"),
        ("state.end_epoch", 0, "state.end_epoch missing"),
        ("state.epoch_sums.loss", "x", "state.epoch_sums.loss missing"),
    ],
)
def test_validate_checkpoint_names_an_invalid_entry(run: dict, entry: str, value: object, message: str):
    copy = torch.load(_saved(run), weights_only=True)
    *above, key = [int(part) if part.isdigit() else part for part in entry.split(".")]
    node = copy
    for name in above:
        node = node[name]
    node[key] = value
    with pytest.raises(UserError, match=f"last.pth: .*{message}"):
        validate_checkpoint(copy, "last.pth")


def test_validate_checkpoint_refuses_weights_alone():
    with pytest.raises(UserError, match="no run to continue. Start a new run from them with --pretrained"):
        validate_checkpoint({"model": {}}, "w.pth")


def _saved(contents: dict) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    buffer.seek(0)
    return buffer
