"""Weights of timm, torchvision and transformers: the same outputs here, and the same bits when converted back."""

import itertools

import pytest
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from models.pretrained.convert import detect_format, format_and_prefix, from_original, swin_version, to_original
from models.pretrained.key_maps import DERIVED, FORMATS
from models.pretrained.load import load_weights
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer
from tests._origins import RELEASED, SMALL, WeightsCase, logits_of
from tests._swin import small, spread
from utils.errors import UserError


def case_of(origin: str, version: int) -> WeightsCase:
    return next(case for case in SMALL if (case.origin, case.version) == (origin, version))


def original_form(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_original(detect_format(weights))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def learned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] not in DERIVED}


def check(case: WeightsCase) -> None:
    """Checks the detected format, the logits to 1e-5, and that converting there and back gives the same bits."""
    theirs, ours = case.theirs(), case.ours()
    weights = dict(theirs.state_dict())
    weight_format, _ = format_and_prefix(weights)
    assert weight_format.origin == case.origin and swin_version(weights) == case.version
    report = load_weights(ours, weights)
    assert report.format == case.origin and not report.initialised and not report.resized
    images = case.images()
    torch.testing.assert_close(logits_of(ours, images), logits_of(theirs, images), atol=1e-5, rtol=0)
    original = original_form(weights)
    assert_same_bits(learned(original), dict(ours.state_dict()))
    assert_same_bits(from_original(original, weight_format), weights)


@pytest.mark.parametrize("case", SMALL, ids=WeightsCase.name)
def test_same_outputs_and_same_bits_when_converted_back(case: WeightsCase):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        WeightsCase("timm", img_size=96, window_size=12, depths=(2, 2), num_heads=(2, 4)),  # 24 × 24 and 12 × 12 tokens
        WeightsCase("hf", img_size=96, window_size=12, depths=(2, 2), num_heads=(2, 4), num_classes=21841),
        WeightsCase(
            "torchvision", embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), img_size=224, window_size=7
        ),
        *(
            WeightsCase(
                origin, 2, img_size=64, window_size=8, depths=(2, 2), num_heads=(2, 4), pretrained_window_sizes=(4, 4)
            )
            for origin in ("timm", "hf")
        ),
    ],
    ids=WeightsCase.name,
)
def test_other_windows_and_heads(case: WeightsCase):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", RELEASED, ids=WeightsCase.name)
def test_every_released_size(case: WeightsCase):
    check(case)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(FORMATS, 2)))
@pytest.mark.parametrize("version", [1, 2])
def test_any_format_through_any_other(one: str, other: str, version: int):
    """Converting to any other format and back loses nothing."""
    if version == 2 and "hf5" in (one, other):
        pytest.skip("Swin V2 has the same names in all releases of transformers")
    original = dict(spread(case_of("timm", version).ours()).state_dict())
    first = from_original(original, FORMATS[one], window=4)
    between = from_original(original_form(first), FORMATS[other], window=4)
    assert format_and_prefix(between)[0] is FORMATS[other]
    back = from_original(original_form(between), FORMATS[one], window=4)
    # torchvision's files must have buffers that the original's, and mmpretrain's of V2, may have: those computed on
    # the way stay.
    may_have = one == "original" or (one == "mmpretrain" and version == 2)
    assert_same_bits(learned(back) if may_have else back, first)


@pytest.mark.parametrize("version", [1, 2])
def test_their_models_load_converted_weights(version: int):
    """With strict=True: torchvision's buffers are computed exactly as it computes them."""
    for origin, name in (("timm", "timm"), ("torchvision", "torchvision"), ("hf", "hf5" if version == 1 else "hf")):
        case = case_of(origin, version)
        ours, theirs = spread(case.ours()), case.theirs()
        buffers = {name: value for name, value in theirs.state_dict().items() if name.endswith(DERIVED)}
        converted = from_original(ours.state_dict(), FORMATS[name], window=4)
        assert_same_bits({key: converted[key] for key in buffers}, buffers)
        theirs.load_state_dict(converted, strict=True)
        images = case.images()
        torch.testing.assert_close(logits_of(theirs, images), logits_of(ours, images), atol=1e-5, rtol=0)


def test_timm_reads_the_original_format_in_the_same_way():
    theirs = case_of("timm", 1).theirs()
    weights = dict(theirs.state_dict())
    assert_same_bits(checkpoint_filter_fn(original_form(weights), theirs), weights)


def test_half_precision_is_kept():
    weights = {name: value.bfloat16() for name, value in case_of("hf", 1).theirs().state_dict().items()}
    assert_same_bits(from_original(original_form(weights), FORMATS["hf5"]), weights)


def test_files_of_transformers_before_release_5():
    """Their names, the indices that they contain, and a backbone without classifier."""
    case = case_of("hf", 1)
    weights = from_original(case.ours().state_dict(), FORMATS["hf"])
    index = torch.arange(256).reshape(16, 16)
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    older = weights | {name.replace("bias_table", "index"): index for name in tables}
    assert "swin.encoder.layers.0.blocks.1.attention.self.relative_position_index" in older
    original = original_form(older)
    assert_same_bits(from_original(original, FORMATS["hf"], keep_derived=True), older)
    assert_same_bits(from_original(original, FORMATS["hf"]), weights)
    assert load_weights(case.ours(), older).format == "hf"

    headless = {name.removeprefix("swin."): value for name, value in weights.items() if "classifier" not in name}
    assert "layernorm.weight" in headless
    assert_same_bits(from_original(original_form(headless), FORMATS["hf"]), headless)
    report = load_weights(case.ours(), headless)
    assert [entry.split()[0] for entry in report.initialised] == ["head.weight", "head.bias"]


def test_derived_buffers_of_the_original_and_of_older_timm():
    released = dict(case_of("timm", 1).ours().state_dict())
    released["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    released["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    assert_same_bits(from_original(original_form(released), FORMATS["original"]), released)
    assert not any(name.endswith(DERIVED) for name in from_original(released, FORMATS["timm"]))
    older = from_original(released, FORMATS["timm"], keep_derived=True)
    assert_same_bits(original_form(older), released)


def test_key_bias_of_torchvision_has_no_effect_and_is_kept():
    case = case_of("torchvision", 2)
    theirs = spread(case.theirs())  # key biases that are not zero
    weights = dict(theirs.state_dict())
    assert weights["features.1.0.attn.qkv.bias"].chunk(3)[1].all()
    original = original_form(weights)
    assert_same_bits(from_original(original, FORMATS["torchvision"]), weights)
    ours = case.ours()
    report = load_weights(ours, weights)
    assert sum("k_bias (cosine attention has no key bias" in entry for entry in report.dropped) == sum(case.depths)
    images = case.images()
    torch.testing.assert_close(logits_of(ours, images), logits_of(theirs, images), atol=1e-5, rtol=0)
    theirs = case_of("timm", 2).theirs()
    theirs.load_state_dict(from_original(original, FORMATS["timm"]), strict=True)


# mmpretrain and mmdetection ------------------------------------------------------------------------------------------


def four_stages(version: int, num_classes: int = 7) -> WeightsCase:
    return WeightsCase("timm", version, 8, (1, 1, 2, 1), (1, 2, 4, 8), img_size=128, num_classes=num_classes)


def unfolded(x: Tensor) -> Tensor:
    """Merges patches as mmcv's PatchMerging does. (B, H, W, C) to (B, H/2, W/2, 4 C)."""
    B, H, W, _ = x.shape
    patches = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2)
    return patches.transpose(1, 2).reshape(B, H // 2, W // 2, -1)


@pytest.mark.parametrize("version", [1, 2])
def test_patches_merged_by_unfolding_give_the_same(version: int):
    ours = spread(four_stages(version).ours())
    theirs = from_original(ours.state_dict(), FORMATS["mmpretrain"])
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    merging = ours.get_submodule("layers.0.downsample")
    prefix = f"backbone.stages.{version - 1}.downsample."  # V2 merges at the start of the next stage
    reduction, weight, bias = (theirs[prefix + name] for name in ("reduction.weight", "norm.weight", "norm.bias"))
    with torch.no_grad():
        if version == 1:
            merged = F.linear(F.layer_norm(unfolded(x), (32,), weight, bias), reduction)
        else:
            merged = F.layer_norm(F.linear(unfolded(x), reduction), (16,), weight, bias)
        torch.testing.assert_close(merging(x), merged, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_names_of_mmpretrain(version: int):
    """The names in the files that OpenMMLab publishes, with their prefix and classifier."""
    theirs = from_original(four_stages(version).ours().state_dict(), FORMATS["mmpretrain"])
    attention = ["qkv.weight", "proj.weight", "proj.bias"] + (
        ["qkv.bias", "relative_position_bias_table", "relative_position_index"]
        if version == 1
        else ["q_bias", "v_bias", "logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
    )
    block = [f"attn.w_msa.{name}" for name in attention]
    for layer in ("norm1", "norm2", "ffn.layers.0.0", "ffn.layers.1"):
        block += [f"{layer}.weight", f"{layer}.bias"]
    expected = {
        f"backbone.stages.{i}.blocks.{j}.{n}" for i, d in enumerate((1, 1, 2, 1)) for j in range(d) for n in block
    }
    for i in range(3):
        merging = f"backbone.stages.{i + version - 1}.downsample."
        expected |= {merging + name for name in ("reduction.weight", "norm.weight", "norm.bias")}
    for layer in ("backbone.patch_embed.projection", "backbone.patch_embed.norm", "backbone.norm3", "head.fc"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(theirs) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_weights_of_mmpretrain_are_loaded_and_come_back(version: int):
    case = four_stages(version)
    ours = spread(case.ours())
    theirs = from_original(ours.state_dict(), FORMATS["mmpretrain"])
    model = case.ours()
    report = load_weights(model, theirs)
    assert report.format == "mmpretrain" and not report.initialised and not report.resized
    assert_same_bits(dict(model.state_dict()), dict(ours.state_dict()))
    assert_same_bits(from_original(original_form(theirs), FORMATS["mmpretrain"]), theirs)
    # A file may contain V2's buffers, of which the original form keeps whatever they hold.
    buffers = {f"backbone.stages.0.blocks.0.attn.w_msa.{name}": torch.ones(2, 2) for name in DERIVED[::2]}
    again = from_original(original_form(theirs | buffers), FORMATS["mmpretrain"])
    assert_same_bits(again, theirs | buffers)


def test_merged_patches_of_another_shape_are_refused_by_name():
    case = four_stages(1)
    theirs = from_original(case.ours().state_dict(), FORMATS["mmpretrain"])
    name = "backbone.stages.0.downsample.reduction.weight"
    for other in (torch.tensor(1.0), torch.zeros(16, 30), torch.zeros(0)):
        with pytest.raises(UserError, match="layers.0.downsample.reduction.weight"):
            load_weights(case.ours(), theirs | {name: other})


def test_relative_index_of_mmpretrain():
    theirs = from_original(four_stages(1).ours().state_dict(), FORMATS["mmpretrain"])
    offsets = (7 * torch.arange(4)[:, None] + torch.arange(4)).flatten()  # of a window of 4, whose table has rows of 7
    expected = (offsets[:, None] + offsets).flip(1)
    assert torch.equal(theirs["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"], expected)


def test_backbones_of_mmdetection_with_and_with_no_prefix():
    case = four_stages(1, num_classes=0)
    ours = spread(case.ours())
    theirs = from_original(ours.state_dict(), FORMATS["mmpretrain"])
    assert "norm3.weight" in theirs
    for prefix in ("", "backbone.", "module.backbone."):
        named = {prefix + name: value for name, value in theirs.items()}
        if prefix:
            named["neck.bias"] = torch.zeros(3)
        model = case.ours()
        assert load_weights(model, named).format == "mmpretrain"
        assert_same_bits(dict(model.state_dict()), dict(ours.state_dict()))


# Detection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "encoder.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("case", SMALL, ids=WeightsCase.name)
def test_prefixes_are_detected(case: WeightsCase, prefix: str):
    weights = dict(case.theirs().state_dict())
    detected = detect_format({prefix + name: value for name, value in weights.items()})
    assert detected.prefix == prefix and detected.format.origin == case.origin
    expected = original_form(weights)
    assert_same_bits(to_original(detected), expected)


def test_classifier_outside_the_prefix():
    """As in a classifier around a backbone; `module.` may precede both."""
    weights = dict(spread(small()).state_dict())
    for outer in ("", "module."):
        named = {outer + ("" if name.startswith("head") else "backbone.") + name: v for name, v in weights.items()}
        model = small()
        assert not load_weights(model, named).initialised
        assert_same_bits(dict(model.state_dict()), weights)


def test_few_weights_outside_the_model_are_dropped_and_many_refused():
    weights = {f"encoder.{name}": value for name, value in spread(small()).state_dict().items()}
    size = sum(value.numel() for value in weights.values())
    report = load_weights(small(), {**weights, "decoder.0.bias": torch.zeros(size // 20)})
    assert report.dropped == ["decoder.0.bias (outside the model)"]
    with pytest.raises(UserError, match=r"9\d\.\d% of the parameters have(.|\n)*decoder.0.bias is not in the model"):
        load_weights(small(), {**weights, "decoder.0.bias": torch.zeros(size // 15)})


def test_several_models_in_one_file_are_refused():
    weights = small().state_dict()
    both = {f"{prefix}.{name}": value for prefix in ("student", "teacher") for name, value in weights.items()}
    with pytest.raises(UserError, match="run.pth: there are several models, under 'student.' and 'teacher.'"):
        load_weights(small(), both, source="run.pth")
    twice = {**{f"model.{name}": value for name, value in weights.items()}, "norm.bias": weights["norm.bias"]}
    with pytest.raises(UserError, match="occur twice, with and without the prefix 'model.'"):
        load_weights(small(), twice)


def test_timm_without_classifier_differs_from_the_original():
    original = small(num_classes=0).state_dict()
    assert format_and_prefix(original)[0].name == "original"
    assert format_and_prefix(from_original(original, FORMATS["timm"]))[0].name == "timm"
    assert format_and_prefix({"stem.conv.weight": 0, "layers.0.weight": 1}) == (None, "")


# Loading -------------------------------------------------------------------------------------------------------------


def test_incomplete_weights_are_refused_by_name():
    weights = dict(case_of("hf", 1).theirs().state_dict())
    missing = "swin.encoder.layers.1.blocks.0.attention.k_proj.weight"
    del weights[missing]
    with pytest.raises(UserError) as error:
        load_weights(case_of("hf", 1).ours(), weights, source="model.safetensors")
    for text in (
        "model.safetensors (format: hf): do not fit the model",
        "encoder.layers.1.blocks.0.attention.q_proj.weight is not in the model",
        "layers.1.blocks.0.attn.qkv.weight is missing",
        "% of the parameters",
    ):
        assert text in str(error.value)
    weights[missing] = torch.zeros(3, 3)  # does not match queries and values
    with pytest.raises(UserError, match=r"layers.1.blocks.0.attn.qkv.weight is missing"):
        load_weights(case_of("hf", 1).ours(), weights)
    case = case_of("torchvision", 1)
    with pytest.raises(UserError, match="format: torchvision(.|\n)*head.extra is not in the model"):
        load_weights(case.ours(), dict(case.theirs().state_dict()) | {"head.extra": torch.zeros(1)})


def test_models_of_timm_load_weights_of_any_format():
    theirs, model = case_of("torchvision", 1).theirs(), case_of("timm", 1).theirs()
    nn.init.zeros_(model.norm.weight)
    report = load_weights(model, theirs.state_dict())
    assert report.format == "torchvision" and not report.initialised
    images = case_of("timm", 1).images()
    torch.testing.assert_close(logits_of(model, images), logits_of(theirs, images), atol=1e-5, rtol=0)


def test_another_window_of_v2_is_reported():
    case = case_of("torchvision", 2)
    wider = WeightsCase("torchvision", 2, window_size=8, pretrained_window_sizes=(4, 4, 4)).ours()
    report = load_weights(wider, case.theirs().state_dict())
    entries = [entry for entry in report.dropped if "windows of 4, the model has 8" in entry]
    assert len(entries) == sum(case.depths[:2])  # the last stage's window shrinks to its map of 4 × 4
    assert all("PRETRAINED_WINDOW_SIZES" in entry for entry in entries)


# Models that other libraries lack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf", "hf5"])
def test_models_that_a_format_lacks_are_refused(name: str):
    target = FORMATS[name]
    tiny = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": 3}
    with pytest.raises(UserError, match="spatial_mlp.*Swin-MLP"):
        from_original(SwinMLP(**tiny).state_dict(), target)
    for ablation in ("none", "bias_only"):
        with pytest.raises(UserError, match="ablation"):
            from_original(SwinTransformer(**tiny, relative=ablation).state_dict(), target)
    unknown = {**small().state_dict(), "neck.weight": torch.zeros(2)}
    with pytest.raises(UserError, match="neck.weight"):
        from_original(unknown, target)


def test_torchvision_requires_the_window_of_v2():
    original = case_of("timm", 2).ours().state_dict()
    with pytest.raises(UserError, match="--window-size"):
        from_original(original, FORMATS["torchvision"])
    with pytest.raises(UserError, match="absolute_pos_embed"):
        from_original(small(ape=True).state_dict(), FORMATS["torchvision"])
