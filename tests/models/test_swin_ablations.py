"""The ablations of the paper's Table 4, switches of V1: each against the plain model with weights that mean it."""

import pytest
import torch

from config import get_config
from models.attention import WindowAttention
from models.build import build_model
from models.count import count_macs, count_parameters
from models.ops.window import window_partition
from models.swin_transformer import SwinTransformer
from tests._swin import assert_same_gradients, logits_and_gradients, small, spread
from utils.errors import UserError

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def attentions(model: SwinTransformer) -> list[WindowAttention]:
    return [module for module in model.modules() if isinstance(module, WindowAttention)]


def test_without_shift_windows_do_not_see_each_other():
    model, shifted = spread(small(depths=(2,), num_heads=(2,), shift=False)).eval(), small(depths=(2,), num_heads=(2,))
    shifted.load_state_dict(model.state_dict())
    assert all(module.windows.shift == 0 and module.windows.attn_mask is None for module in attentions(model))
    changed = IMAGE.clone()
    changed[..., :16, :16] += 1  # the first window's pixels
    with torch.no_grad():
        for network, spreads in ((model, False), (shifted, True)):
            windows = window_partition((network.forward_features(changed) - network.forward_features(IMAGE)).abs(), 4)
            touched = windows.amax(dim=(0, 2, 3)) > 0  # (nW,)
            assert touched[0] and touched[1:].any().item() == spreads


@pytest.mark.parametrize("attn", ["reference", "sdpa"])
def test_without_relative_positions_is_a_table_of_zeros(attn: str):
    model = spread(small(relative="none", attn=attn))
    assert not any("relative" in name for name in model.state_dict())
    zeros = small(attn=attn)
    missing = zeros.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert len(missing) == 4 and all(name.endswith("relative_position_bias_table") for name in missing)
    with torch.no_grad():
        for attention in attentions(zeros):
            attention.relative_position_bias_table.zero_()
    logits, gradients = logits_and_gradients(model, IMAGE)
    expected, expected_gradients = logits_and_gradients(zeros, IMAGE)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    assert_same_gradients(gradients, {name: expected_gradients[name] for name in gradients})


@pytest.mark.parametrize("size", [(32, 32), (29, 45)])
def test_positions_alone_are_attention_with_queries_of_zero(size: tuple[int, int]):
    """The scaled products vanish; the shift's mask and the padding's stay."""
    model = spread(small(relative="bias_only"))
    full = spread(small(), seed=1)
    values = model.state_dict()
    for i, (alone, plain) in enumerate(zip(attentions(model), attentions(full), strict=True)):
        prefix, dim = f"layers.{i // 2}.blocks.{i % 2}.attn.qkv.", alone.qkv.in_features
        assert alone.qkv.weight.shape == (dim, dim)
        weight, bias = plain.qkv.weight.detach().clone(), plain.qkv.bias.detach().clone()
        weight[:dim], bias[:dim] = 0, 0
        weight[2 * dim :], bias[2 * dim :] = alone.qkv.weight.detach(), alone.qkv.bias.detach()
        values[prefix + "weight"], values[prefix + "bias"] = weight, bias
    full.load_state_dict(values)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    logits, gradients = logits_and_gradients(model, images)
    expected, expected_gradients = logits_and_gradients(full, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        right = expected_gradients[name]
        if "qkv" in name:
            right = right[-len(gradient) :]  # the values' part
        torch.testing.assert_close(gradient, right, atol=1e-4, rtol=1e-4)


def test_positions_alone_drop_attention_in_training_only():
    model, plain = spread(small(relative="bias_only", attn_drop_rate=0.5)), spread(small(relative="bias_only"))
    assert not torch.equal(model(IMAGE), model(IMAGE))
    assert torch.equal(model.eval()(IMAGE), plain.eval()(IMAGE))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGE)
    torch.testing.assert_close(logits.float(), model(IMAGE), atol=0.1, rtol=0.05)


def test_unknown_treatment_of_positions():
    with pytest.raises(ValueError, match="relative is 'learnt', not one of bias, none, bias_only"):
        WindowAttention(8, 2, (4, 4), 2, shifted=False, relative="learnt")


PLAIN = 28_288_354  # Swin-T
TABLES = 169 * (2 * 3 + 2 * 6 + 6 * 12 + 2 * 24)
EMBEDDING = 56 * 56 * 96
QUERIES_AND_KEYS = sum(depth * 2 * (dim**2 + dim) for depth, dim in ((2, 96), (2, 192), (6, 384), (2, 768)))


@pytest.mark.parametrize(
    ("opts", "params", "ape", "relative"),
    [
        ("", PLAIN, False, "bias"),
        ("MODEL.SWIN.SHIFT false", PLAIN, False, "bias"),
        ("MODEL.SWIN.POSITION none", PLAIN - TABLES, False, "none"),
        ("MODEL.SWIN.POSITION abs", PLAIN - TABLES + EMBEDDING, True, "none"),
        ("MODEL.SWIN.POSITION abs+rel", PLAIN + EMBEDDING, True, "bias"),
        ("MODEL.SWIN.APE true", PLAIN + EMBEDDING, True, "bias"),
        ("MODEL.SWIN.APE true MODEL.SWIN.POSITION abs", PLAIN - TABLES + EMBEDDING, True, "none"),
        ("MODEL.SWIN.POSITION rel_no_app", PLAIN - QUERIES_AND_KEYS, False, "bias_only"),
        ("MODEL.SWIN.POSITION rel", PLAIN, False, "bias"),
    ],
)
def test_rows_of_table_4(opts: str, params: int, ape: bool, relative: str):
    with torch.device("meta"):
        model = build_model(get_config(None, opts.split()))
    assert count_parameters(model) == params
    assert (model.absolute_pos_embed is not None, {a.relative for a in attentions(model)}) == (ape, {relative})
    assert [a.windows.shift for a in attentions(model)] == [0, 0 if "SHIFT" in opts else 3] * 6
    if relative == "bias_only":
        assert count_macs(model, 224) < 0.85 * 4_490_566_656
    else:
        assert count_macs(model, 224) == 4_490_566_656


@pytest.mark.parametrize("position", ["none", "rel_no_app"])
def test_an_absolute_embedding_contradicts_being_without(position: str):
    with pytest.raises(UserError, match=f"MODEL.SWIN.APE True .*without.*POSITION|MODEL.SWIN.POSITION '{position}'"):
        get_config(None, ["MODEL.SWIN.APE", True, "MODEL.SWIN.POSITION", position])
