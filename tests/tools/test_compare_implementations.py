"""tools/compare_implementations.py: equal models are reported as equal, different ones as different."""

import pytest
from yacs.config import CfgNode

from config import get_config
from models import other_libraries
from models.build import architecture_of, build_model
from models.count import count_parameters
from tools.compare_implementations import compare, distinct_models, main

SMALL = {"DATA.IMG_SIZE": 64, "EMBED_DIM": 16, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 4}


def small_config(kind: str, **changes: object) -> CfgNode:
    section = f"MODEL.{kind.upper()}"
    opts = {key if "." in key else f"{section}.{key}": value for key, value in (SMALL | changes).items()}
    return get_config(None, ["MODEL.TYPE", kind, *(part for pair in opts.items() for part in pair)])


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_compare_finds_equal_models_equal(kind: str):
    config = small_config(kind)
    parameters, macs, timm, torchvision, transformers, largest = compare(config, 7)
    assert parameters == count_parameters(build_model(config, 7)) and macs > 0
    assert torchvision is None and 0 <= timm < 1e-5 and 0 <= transformers < 1e-5 and largest > 0.1


def test_compare_finds_different_models_different(monkeypatch: pytest.MonkeyPatch):
    other = architecture_of(small_config("swinv2", PRETRAINED_WINDOW_SIZES=[8, 8]), 7)
    monkeypatch.setitem(other_libraries.LIBRARIES, "timm", lambda _: other_libraries.timm_swin(other))
    assert compare(small_config("swinv2"), 7)[2] > 1e-3


def test_swin_mlp_has_no_other_implementation():
    assert compare(small_config("swin_mlp"), 7)[2:] == [None, None, None, None]


def test_distinct_models_lists_each_model_once():
    ((recipes, classes, config),) = distinct_models(["swin_tiny", "swin_tiny_22kto1k"])
    assert (recipes, classes) == (["swin_tiny", "swin_tiny_22kto1k"], 1000)
    assert other_libraries.torchvision_swin(architecture_of(config, 3)).head.out_features == 3
    assert other_libraries.torchvision_swin(architecture_of(small_config("swin"), 3)) is None


def test_unknown_recipe(capsys: pytest.CaptureFixture):
    assert main(["--only", "swin_giant"]) == 2
    assert "--only swin_giant: not the recipe of a release" in capsys.readouterr().err
