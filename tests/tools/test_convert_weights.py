"""tools/convert_weights.py: other libraries read its files, and converting back gives the same bytes."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.other_libraries import transformers_config
from tests._origins import SMALL, WeightsCase, logits_of
from tests._swin import small, spread
from tools.convert_weights import main
from utils.checkpoint.io import write_weights

CASES = pytest.mark.parametrize("case", SMALL, ids=WeightsCase.name)


def convert(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The message of a command line that is refused, with exit code 2."""
    assert main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def hf_file(case: WeightsCase, folder: Path) -> Path:
    """The file that transformers itself writes."""
    case.theirs().save_pretrained(folder)
    return folder / "model.safetensors"


@CASES
def test_converting_back_gives_the_same_file(case: WeightsCase, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Byte for byte in safetensors, through the original format in a PyTorch file."""
    file, between, back = tmp_path / "model.safetensors", tmp_path / "between.pth", tmp_path / "back.safetensors"
    if case.origin == "hf":
        hf_file(case, tmp_path)
    else:
        safetensors.torch.save_file(dict(case.theirs().state_dict()), file, metadata={"format": "pt"})
    convert(file, between, "--to", "original")
    output = capsys.readouterr().out
    assert f"{file}: Swin V{case.version}, format {case.origin}, " in output and f"{between}: format original" in output
    convert(between, back, "--to", case.origin)
    assert back.read_bytes() == file.read_bytes()
    assert torch.load(between, weights_only=True).keys() == {"model"}


@CASES
def test_other_libraries_read_the_converted_files(case: WeightsCase, tmp_path: Path):
    ours = spread(case.ours())
    write_weights(tmp_path / "ours.pth", ours.state_dict(), key="model")
    ending = "safetensors" if case.origin == "hf" else "pth"
    file = tmp_path / f"model.{ending}"
    convert(tmp_path / "ours.pth", file, "--to", case.origin, "--window-size", case.window_size)
    if case.origin == "hf":
        import transformers

        transformers_config(case.architecture()).save_pretrained(tmp_path)
        kind = (transformers.SwinForImageClassification, transformers.Swinv2ForImageClassification)[case.version - 1]
        theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
    else:
        theirs = case.theirs()
        theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    images = case.images()
    torch.testing.assert_close(logits_of(theirs.eval(), images), logits_of(ours, images), atol=1e-5, rtol=0)


def test_pytorch_files_survive_converting_back(tmp_path: Path):
    case = SMALL[2]
    weights = dict(case.theirs().state_dict())
    torch.save(weights, tmp_path / "tv.pth")
    convert(tmp_path / "tv.pth", tmp_path / "hf.bin", "--to", "hf")
    convert(tmp_path / "hf.bin", tmp_path / "back.pth", "--to", "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], value) for name, value in weights.items())
    assert (tmp_path / "back.pth").stat().st_size < 1.1 * (tmp_path / "tv.pth").stat().st_size


def test_omitted_entries_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = {f"module.encoder.{name}": value for name, value in spread(small()).state_dict().items()}
    weights["module.encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    weights["module.decoder.bias"] = torch.zeros(3)
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "out.pth", "--to", "timm")
    output = capsys.readouterr().out
    for text in (
        "format original, prefix 'module.encoder.'",
        "left out, outside the model: decoder.bias",
        "left out, derived buffers that the format timm does not store: 1",
        "left out, not weights: optimizer, epoch",
    ):
        assert text in output
    assert "head.fc.weight" in torch.load(tmp_path / "out.pth", weights_only=True)
    convert(tmp_path / "run.pth", tmp_path / "kept.pth", "--to", "timm", "--keep-buffers")
    assert "layers.0.blocks.1.attn_mask" in torch.load(tmp_path / "kept.pth", weights_only=True)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_mmpretrain(version: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = spread(WeightsCase("timm", version).ours()).state_dict()
    torch.save({"model": weights}, tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", tmp_path / "mm.pth", "--to", "mmpretrain")
    theirs = torch.load(tmp_path / "mm.pth", weights_only=True)
    torch.save({"meta": {"epoch": 300}, "state_dict": theirs}, tmp_path / "published.pth")
    convert(tmp_path / "published.pth", tmp_path / "timm.safetensors", "--to", "timm")
    assert f"published.pth: Swin V{version}, format mmpretrain, " in capsys.readouterr().out
    convert(tmp_path / "timm.safetensors", tmp_path / "back.pth", "--to", "mmpretrain")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], value) for name, value in theirs.items())


def test_averaged_weights_are_named_and_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture):
    raw, average = (spread(small()).state_dict() for _ in range(2))
    average["norm.bias"] = raw["norm.bias"] + 1
    file, out = tmp_path / "best.pth", tmp_path / "out.pth"

    def converted(contents: dict, *flags: str) -> str:
        torch.save(contents, file)
        convert(file, out, "--to", "timm", *flags)
        bias = torch.load(out, weights_only=True)["norm.bias"]
        return "raw" if torch.equal(bias, raw["norm.bias"]) else "average"

    both = {"model": raw, "ema": average, "optimizer": {}}
    assert converted(both | {"state": {"better_weights": "ema"}}) == "average"
    output = capsys.readouterr().out
    assert "best.pth holds weights as trained under 'model', averaged weights (EMA) under 'ema': takes the av" in output
    assert "left out, not weights: optimizer, state" in output
    assert converted(both | {"state": {"better_weights": "ema"}}, "--no-ema") == "raw"
    assert converted(both) == "raw" and "--ema takes the averaged ones" in capsys.readouterr().out
    assert converted(both, "--ema") == "average"
    assert converted({"state_dict_ema": average}) == "average"
    torch.save({"model": raw}, file)
    assert "holds no averaged weights (EMA)" in refused(capsys, file, out, "--to", "timm", "--ema")


def test_errors_are_reported_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture):
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
    assert "is no number from 1" in refused(capsys, file, out, "--to", "torchvision", "--window-size", 0)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert "other.pth: these are not the weights of a Swin" in refused(
        capsys, tmp_path / "other.pth", out, "--to", "hf"
    )
    weights = {f"encoder.{name}": value for name, value in small().state_dict().items()}
    torch.save(weights | {"decoder.weight": torch.zeros(10**5)}, tmp_path / "large.pth")
    assert "decoder.weight" in refused(capsys, tmp_path / "large.pth", out, "--to", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.pth", "other.pth", "v2.pth"]


def test_nonfinite_values_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = dict(small().state_dict())
    weights["norm.bias"] = torch.full((32,), float("nan"))
    weights["head.bias"] = torch.full((5,), float("inf"))
    write_weights(tmp_path / "bad.safetensors", weights)  # which sorts them by name
    message = refused(capsys, tmp_path / "bad.safetensors", tmp_path / "out.pth", "--to", "timm")
    assert "bad.safetensors: head.bias and 1 more: not all values are finite" in message
