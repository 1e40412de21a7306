"""The command that converts weights: files in, files out that their own libraries read, and the same bytes back."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests._origins import SMALL, Case, hf_config, logits_of
from tests._swin import small, spread
from tools.convert_weights import main
from utils.checkpoint.io import extract_state_dict, read_checkpoint, write_weights
from utils.errors import UserError
from utils.files import TEMPORARY

CASES = pytest.mark.parametrize("case", SMALL, ids=Case.name)


def convert(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What is said about a command line that is refused in one message, with exit code 2."""
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def hf_file(case: Case, folder: Path) -> Path:
    """What transformers itself writes, and its model."""
    case.theirs().save_pretrained(folder)
    return folder / "model.safetensors"


@CASES
def test_there_and_back_gives_the_file_back(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Byte for byte in safetensors, by way of the original's layout in PyTorch's format."""
    file, between, back = tmp_path / "model.safetensors", tmp_path / "between.pth", tmp_path / "back.safetensors"
    if case.origin == "hf":
        hf_file(case, tmp_path)
    else:
        safetensors.torch.save_file(dict(case.theirs().state_dict()), file, metadata={"format": "pt"})
    convert(file, between, "--to", "original")
    said = capsys.readouterr().out
    assert f"{file}: Swin V{case.version}, layout {case.origin}, " in said and f"{between}: layout original" in said
    convert(between, back, "--to", case.origin)
    assert back.read_bytes() == file.read_bytes()
    assert torch.load(between, weights_only=True).keys() == {"model"}


@CASES
def test_their_libraries_read_what_is_written(case: Case, tmp_path: Path):
    ours = spread(case.ours())
    write_weights(tmp_path / "ours.pth", ours.state_dict(), key="model")
    ending = "safetensors" if case.origin == "hf" else "pth"
    file = tmp_path / f"model.{ending}"
    convert(tmp_path / "ours.pth", file, "--to", case.origin, "--window-size", case.window_size)
    if case.origin == "hf":
        import transformers

        hf_config(case).save_pretrained(tmp_path)
        kind = (transformers.SwinForImageClassification, transformers.Swinv2ForImageClassification)[case.version - 1]
        theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
    else:
        theirs = case.theirs()
        theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    images = case.images()
    torch.testing.assert_close(logits_of(theirs.eval(), images), logits_of(ours, images), atol=1e-5, rtol=0)


def test_pytorch_files_come_back_too(tmp_path: Path):
    case = SMALL[2]
    weights = dict(case.theirs().state_dict())
    torch.save(weights, tmp_path / "tv.pth")
    convert(tmp_path / "tv.pth", tmp_path / "hf.bin", "--to", "hf")
    convert(tmp_path / "hf.bin", tmp_path / "back.pth", "--to", "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], value) for name, value in weights.items())
    assert (tmp_path / "back.pth").stat().st_size < 1.1 * (tmp_path / "tv.pth").stat().st_size


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = {f"module.encoder.{name}": value for name, value in spread(small()).state_dict().items()}
    weights["module.encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    weights["module.decoder.bias"] = torch.zeros(3)
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "out.pth", "--to", "timm")
    said = capsys.readouterr().out
    for words in (
        "layout original, behind the prefix 'module.encoder.'",
        "beside the model: decoder.bias",
        "derived: 1 buffers",
        "not weights: optimizer, epoch",
    ):
        assert words in said
    assert "head.fc.weight" in torch.load(tmp_path / "out.pth", weights_only=True)
    convert(tmp_path / "run.pth", tmp_path / "kept.pth", "--to", "timm", "--keep-buffers")
    assert "layers.0.blocks.1.attn_mask" in torch.load(tmp_path / "kept.pth", weights_only=True)


def test_mistakes_are_answered_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "v2.pth"
    torch.save(dict(SMALL[1].theirs().state_dict()), file)
    out = tmp_path / "out.pth"
    assert "--help" in refused(capsys, file, out)
    assert "--to" in refused(capsys, file, out, "--to", "keras")
    assert "no such file" in refused(capsys, tmp_path / "none.pth", out, "--to", "timm")
    assert ".safetensors, .pth" in refused(capsys, file, tmp_path / "out.h5", "--to", "timm")
    assert "same file" in refused(capsys, file, file, "--to", "hf")
    assert "no such folder" in refused(capsys, file, tmp_path / "none" / "out.pth", "--to", "timm")
    assert "--window-size" in refused(capsys, file, out, "--to", "torchvision")
    assert "at least 1" in refused(capsys, file, out, "--to", "torchvision", "--window-size", 0)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert "other.pth: these are not the weights of a Swin" in refused(
        capsys, tmp_path / "other.pth", out, "--to", "hf"
    )
    weights = {f"encoder.{name}": value for name, value in small().state_dict().items()}
    torch.save(weights | {"decoder.weight": torch.zeros(10**5)}, tmp_path / "large.pth")
    assert "decoder.weight" in refused(capsys, tmp_path / "large.pth", out, "--to", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.pth", "other.pth", "v2.pth"]


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = dict(small().state_dict())
    weights["norm.bias"] = torch.full((32,), float("nan"))
    weights["head.bias"] = torch.full((5,), float("inf"))
    write_weights(tmp_path / "bad.safetensors", weights)  # which sorts them by name
    said = refused(capsys, tmp_path / "bad.safetensors", tmp_path / "out.pth", "--to", "timm")
    assert "bad.safetensors: head.bias and 1 more: not all values are finite" in said


# Files of safetensors ------------------------------------------------------------------------------------------------


def test_safetensors_are_known_by_name_or_contents(tmp_path: Path):
    weights = {"a": torch.ones(2), "b": torch.arange(6, dtype=torch.int64).reshape(2, 3).T}
    write_weights(tmp_path / "w.safetensors", weights)
    (tmp_path / "renamed.pth").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for name in ("w.safetensors", "renamed.pth"):
        read = extract_state_dict(read_checkpoint(str(tmp_path / name)), name)
        assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)
    header = (tmp_path / "w.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: data[:-1]])
def test_damaged_safetensors(tmp_path: Path, damage):
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
