"""The registry of released weights agrees with timm, torchvision, the recipes and the models."""

import re

import pytest
import timm
import torch
import torchvision

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from models.pretrained.registry import COUNTED, RELEASES, Release
from utils.origins import ORIGINS
from utils.paths import REPO_ROOT

QUICK = {("swin_tiny", 1000), ("swin_tiny_22k", 21841), ("swinv2_tiny_w8", 1000), ("swin_mlp_tiny_c24", 1000)}


def test_names_files_and_urls_are_unique():
    for attribute in ("name", "file", "url"):
        assert len({getattr(release, attribute) for release in RELEASES}) == len(RELEASES) == 89
    assert {release.origin for release in RELEASES} == set(ORIGINS)
    assert {(release.recipe, release.classes) for release in RELEASES} == set(COUNTED)


@pytest.mark.parametrize("release", [r for r in RELEASES if r.origin == "torchvision"], ids=lambda r: r.name)
def test_torchvision_publishes_the_same(release: Release):
    weights = torchvision.models.get_model_weights(release.name.removeprefix("torchvision/")).DEFAULT
    metrics = weights.meta["_metrics"]["ImageNet-1K"]
    assert (release.url, release.top1, release.top5) == (weights.url, metrics["acc@1"], metrics["acc@5"])
    parameters, macs = COUNTED[release.recipe, 1000]
    # torchvision's V2 has key biases, which stay zero, and counts the position bias's operations once.
    assert 0 <= weights.meta["num_params"] - parameters <= 20_000
    assert macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=0.01)
    assert re.fullmatch("[0-9a-f]{8}", release.sha256)


@pytest.mark.parametrize("release", [r for r in RELEASES if r.origin == "timm"], ids=lambda r: r.name)
def test_timm_publishes_the_same(release: Release):
    cfg = timm.get_pretrained_cfg(release.name.removeprefix("timm/"))
    assert release.url == f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
    assert cfg.num_classes == release.classes
    (source,) = [original for original in RELEASES if original.url == cfg.url]
    assert (source.recipe, source.top1, source.top5) == (release.recipe, release.top1, release.top5)


def test_every_swin_of_timm_is_listed():
    names = [name for name in timm.list_pretrained(["swin_*", "swinv2_*"]) if "_cr_" not in name and "_s3_" not in name]
    assert {f"timm/{name}" for name in names} == {release.name for release in RELEASES if release.origin == "timm"}


@pytest.mark.parametrize(
    "key",
    [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in COUNTED],
    ids=lambda key: f"{key[0]}-{key[1]}",
)
def test_counted_parameters_and_macs(key: tuple[str, int]):
    recipe, classes = key
    config = get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")
    with torch.device("meta"):
        model = build_model(config, classes).eval()
    assert COUNTED[key] == (count_parameters(model), count_macs(model, config.DATA.IMG_SIZE))


def test_every_recipe_exists_and_has_the_image_size_of_its_release():
    for release in RELEASES:
        config = get_config(REPO_ROOT / "configs" / f"{release.recipe}.yaml")
        pixels = re.findall(r"(?:to|_|-)(192|224|256|384)(?![0-9])", release.url)
        if release.origin != "torchvision":
            assert config.DATA.IMG_SIZE == int(pixels[-1]), release.name
        kind = "swinv2" if "v2" in release.name else "swin_mlp" if "mlp" in release.name else "swin"
        assert config.MODEL.TYPE == kind, release.name
