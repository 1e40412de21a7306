"""utils/checkpoint/weights.py: which of the state dicts in a file is taken, and what is said about the others."""

import pytest
import torch

from utils.checkpoint.weights import extract_weights, kinds_in
from utils.errors import UserError

RAW = {"head.bias": torch.zeros(2), "not a tensor": 3}
AVERAGE = {"head.bias": torch.ones(2)}


def run(better: object) -> dict:
    """A checkpoint of this project, as far as it matters here."""
    return {"model": RAW, "ema": AVERAGE, "state": {"better_weights": better}}


def value(weights) -> float:
    assert list(weights.state_dict) == ["head.bias"]
    return weights.state_dict["head.bias"][0].item()


@pytest.mark.parametrize(
    "contents",
    [
        RAW,
        {"model": RAW, "epoch": 1},
        *({name: RAW} for name in ("state_dict", "model_state_dict", "net", "weights", "params")),
        {"model": RAW, "ema": None},
        {"model": RAW, "ema": 5, "state": 3},
        {"model": 7, "state_dict": RAW},
    ],
    ids=lambda contents: " ".join(contents),
)
def test_weights_alone_are_taken_without_a_word(contents: dict):
    weights = extract_weights(contents, "file")
    assert (value(weights), weights.kind, weights.note) == (0, "model", "")
    assert kinds_in(contents) == ["model"]
    assert extract_weights(contents, "file", "model") == weights
    with pytest.raises(UserError, match=r"file: holds no averaged weights \(EMA\), only weights as trained.*--ema"):
        extract_weights(contents, "file", "ema")


def test_the_better_weights_of_a_run_are_taken_by_default():
    for better, expected in (("model", 0), ("ema", 1)):
        weights = extract_weights(run(better), "best.pth")
        assert value(weights) == expected and weights.kind == better
        assert "weights as trained under 'model', averaged weights (EMA) under 'ema'" in weights.note
        assert "the better ones at the last evaluation" in weights.note
    for unknown in (None, 3, "x", [1], torch.ones(2)):
        weights = extract_weights(run(unknown), "best.pth")
        assert value(weights) == 0 and "does not say which are better; --ema" in weights.note
    assert value(extract_weights(run("model"), "best.pth", "ema")) == 1
    assert value(extract_weights(run("ema"), "best.pth", "model")) == 0
    assert kinds_in(run("ema")) == ["model", "ema"]


@pytest.mark.parametrize(
    ("raw", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema_state_dict"), ("params", "params_ema")],
)
def test_files_of_other_programs_say_that_they_hold_both(raw: str, average: str):
    both = {raw: RAW, average: AVERAGE, "epoch": 3}
    weights = extract_weights(both, "theirs.pth")
    assert value(weights) == 0 and f"averaged weights (EMA) under '{average}'" in weights.note
    assert value(extract_weights(both, "theirs.pth", "ema")) == 1


@pytest.mark.parametrize("entry", ["ema", "model_ema", "state_dict_ema"])
def test_averaged_weights_alone_are_taken(entry: str):
    contents = {entry: AVERAGE | {"n_averaged": torch.tensor(3)}, "epoch": 3}
    weights = extract_weights(contents, "theirs.pth")
    assert (value(weights), weights.kind) == (1, "ema")
    assert weights.note == f"holds only averaged weights (EMA) under '{entry}'"
    assert kinds_in(contents) == ["ema"]
    with pytest.raises(UserError, match="theirs.pth: holds no weights as trained, only averaged weights.*PRETRAINED_"):
        extract_weights(contents, "theirs.pth", "model")


def test_files_without_weights_and_with_broken_ones_are_refused():
    for contents in ({"epoch": 3}, {"epoch": 3, "model": {}}, {"epoch": 3, "ema": {"a": 1}}):
        with pytest.raises(UserError, match="file: no weights found; its entries are epoch"):
            extract_weights(contents, "file")
    broken = {"model": RAW, "ema": {"head.bias": torch.tensor([float("nan")])}}
    assert value(extract_weights(broken, "file")) == 0
    with pytest.raises(UserError, match="file: head.bias: not all values are finite"):
        extract_weights(broken, "file", "ema")
