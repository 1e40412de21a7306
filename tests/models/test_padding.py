"""Maps that are not a multiple of the window, against transformers and torchvision: values and gradients.

Their padding is part of what the released weights compute: zeros after the norm and before the projection, not masked.
"""

import os

import pytest
import torch
import torchvision
from timm.models import swin_transformer as timm_models
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as torchvision_models

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

from models.other_libraries import Logits
from models.pretrained.convert import detect_format, to_original
from models.pretrained.key_maps import DERIVED
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests._swin import assert_same_gradients, from_timm, logits_and_gradients, spread
from tests._swin_v2 import spread_v2

IMPLEMENTATIONS = ("reference", "sdpa", "native")
SIZES = [(224, 224), (256, 256), (250, 330), (512, 512), (800, 1344)]
# Two stages as narrow as a head of 16, the smallest of the native code. At all of SIZES, the maps are larger than a
# window, so that every library shifts them.
ARCHITECTURE = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 7}


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights or gradients of another library under this project's names, without derived buffers."""
    return {n: v for n, v in to_original(detect_format(values)).items() if not n.endswith(DERIVED)}


def by_transformers(version: int) -> nn.Module:
    settings = {**ARCHITECTURE, "image_size": 224, "num_labels": 5, "drop_path_rate": 0.0}
    if version == 1:
        return transformers.SwinForImageClassification(transformers.SwinConfig(**settings))
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**settings))


def by_torchvision(version: int) -> nn.Module:
    window = ARCHITECTURE["window_size"]
    block, merging = (
        (torchvision_models.SwinTransformerBlock, torchvision_models.PatchMerging)
        if version == 1
        else (torchvision_models.SwinTransformerBlockV2, torchvision_models.PatchMergingV2)
    )
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=ARCHITECTURE["embed_dim"],
        depths=list(ARCHITECTURE["depths"]),
        num_heads=list(ARCHITECTURE["num_heads"]),
        window_size=[window, window],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=block,
        downsample_layer=merging,
    )


def here(version: int, weights: dict[str, Tensor]) -> nn.Module:
    build = SwinTransformer if version == 1 else SwinTransformerV2
    model = build(img_size=224, num_classes=5, drop_path_rate=0.0, **ARCHITECTURE)
    model.load_state_dict(renamed(weights), strict=True)
    return model


def compare(library, version: int, size: tuple[int, int]) -> None:
    """Logits and every gradient, for every implementation."""
    theirs = Logits((spread if version == 1 else lambda model: spread_v2(model, past_limit=2.0))(library(version)))
    images = images_of(size)
    expected, gradients = logits_and_gradients(theirs, images)
    expected_gradients = renamed({name.removeprefix("model."): value for name, value in gradients.items()})
    model = here(version, theirs.model.state_dict())
    for attn in IMPLEMENTATIONS:
        for block in model.blocks():
            block.attn.impl = attn
        logits, gradients = logits_and_gradients(model, images)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_equal_to_transformers(version: int, size: tuple[int, int]):
    compare(by_transformers, version, size)


@pytest.mark.parametrize("size", [size for size in SIZES if size != (250, 330)], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_equal_to_torchvision(version: int, size: tuple[int, int]):
    compare(by_torchvision, version, size)


def test_torchvision_drops_incomplete_patches():
    """Its patch embedding ignores the last 2 of 250 and of 330 pixels, which are padded to a patch here."""
    theirs = spread(by_torchvision(1)).eval()
    model, images = here(1, theirs.state_dict()).eval(), images_of((250, 330))
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(model(images[:, :, :248, :328]), expected, atol=1e-5, rtol=0)
        assert (model(images) - expected).abs().max() > 1e-5


def test_timm_shifts_before_it_pads(monkeypatch):
    """A map that is padded after its cyclic shift is cut elsewhere: timm equals the others once it pads first."""
    theirs = spread(timm_models.SwinTransformer(img_size=256, num_classes=5, drop_path_rate=0.0, **ARCHITECTURE)).eval()
    model, images = here(1, from_timm(theirs)).eval(), images_of((256, 256))
    attend = timm_models.SwinTransformerBlock._attn

    def pad_first(block: nn.Module, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        return attend(block, F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7)))[:, :height, :width]

    with torch.no_grad():
        logits = model(images)
        assert (theirs(images) - logits).abs().max() > 1e-5
        monkeypatch.setattr(timm_models.SwinTransformerBlock, "_attn", pad_first)
        torch.testing.assert_close(theirs(images), logits, atol=1e-5, rtol=0)
