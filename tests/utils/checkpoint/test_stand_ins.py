"""utils/checkpoint/stand_ins.py: plain data of numpy and of the standard library next to weights, and what lies."""

import argparse
import collections
import datetime
import pickle
import types
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch

from tests.fuzz.pickles import FAMILIES, NUMPY_LIES, WRAPPINGS
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError


@pytest.fixture(params=[True, False], ids=["zip format", "format before 1.6"])
def read(request: pytest.FixtureRequest, tmp_path: Path):
    """Saves an object next to weights, and returns what is read."""

    def saved_and_read(value: object) -> object:
        torch.save(
            {"model": {"w": torch.zeros(2)}, "extra": value},
            tmp_path / "w.pth",
            _use_new_zipfile_serialization=request.param,
        )
        return read_checkpoint(tmp_path / "w.pth")["extra"]

    return saved_and_read


def nested() -> collections.defaultdict:
    value: collections.defaultdict = collections.defaultdict(dict)
    value["a"]["b"] = np.int64(3)
    return value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.float64(71.5), 71.5),
        (np.float32(0.5), 0.5),
        (np.float16(0.25), 0.25),
        (np.int64(-3), -3),
        (np.uint8(255), 255),
        (np.bool_(True), True),
        (np.complex128(1 + 2j), 1 + 2j),
        (np.str_("swin"), "swin"),
        (np.bytes_(b"swin"), b"swin"),
        (b"", b""),
        ([np.float64(1.0), {"a": (np.int32(2),)}], [1.0, {"a": (2,)}]),
        ({np.int64(5): "epoch"}, {5: "epoch"}),
        (np.array(["a", "bc"]), ["a", "bc"]),
        (np.array([1, "a", None], dtype=object), [1, "a", None]),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
        (nested(), {"a": {"b": 3}}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (Path("/data/imagenet"), "/data/imagenet"),
        (PureWindowsPath("C:\\data"), "C:\\data"),
        (frozenset((1, 2)), frozenset((1, 2))),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02 03:04:00"),
        (datetime.timedelta(hours=1), "1:00:00"),
        (types.SimpleNamespace(path=Path("a")), {}),
        (argparse.Namespace(path=Path("a"), kind=int), {}),
        (np.dtype("float32"), None),
    ],
)
def test_data_beside_weights_are_plain_values(read, given: object, expected: object):
    value = read(given)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, dict)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.arange(3, dtype=">f8"),
        np.array(2.5),
        np.zeros((0, 4), dtype=np.uint8),
        np.array([True, False]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_are_tensors(read, array: np.ndarray):
    value = read(array)
    assert isinstance(value, torch.Tensor) and value.shape == array.shape
    assert value.tolist() == array.tolist()
    value.zero_()  # not the bytes of the pickle, which are read-only


@pytest.mark.parametrize("array", [np.zeros(2, dtype=[("a", "f4")]), np.array(["2026-01-01"], dtype="datetime64[D]")])
def test_arrays_of_other_values_are_named(read, array: np.ndarray):
    with pytest.raises(UserError, match="w.pth: not a readable checkpoint: .*(compound|numpy's type)"):
        read(array)


@pytest.mark.parametrize("lie", sorted(NUMPY_LIES))
@pytest.mark.parametrize("wrapping", ["zip", "before 1.6"])
def test_arrays_that_lie_are_refused(tmp_path: Path, lie: str, wrapping: str):
    path = tmp_path / "lies.pth"
    path.write_bytes(WRAPPINGS[wrapping](NUMPY_LIES[lie]))
    with pytest.raises(UserError, match="lies.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "stand-in" in name or "numpy" in name])
def test_code_in_the_arguments_of_stand_ins_is_refused(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(WRAPPINGS["zip"](FAMILIES[family]))
    with pytest.raises(UserError, match="evil.pth: refused, nothing in it was run"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_value_in_many_places_is_read_once(tmp_path: Path):
    """Lists that hold the list before twice would take 2^40 steps."""
    value: list = []
    for _ in range(40):
        value = [value, value]
    torch.save({"model": {"w": torch.zeros(1)}, "extra": value}, tmp_path / "w.pth")
    first, second = read_checkpoint(tmp_path / "w.pth")["extra"]
    assert first is second


def test_plain_pickles_are_still_no_checkpoints(tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"best": np.float64(1)}, 4))
    with pytest.raises(UserError, match="w.pth: "):
        read_checkpoint(tmp_path / "w.pth")
