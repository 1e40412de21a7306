"""Swin V2: against timm's in values and gradients, the published sizes, and token by token on any image size."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from models.swin_transformer_v2 import CosineWindowAttention, SwinTransformerV2, log_spaced_offsets
from optimizer import parameter_groups
from tests._swin import architecture, assert_same_gradients, from_timm, logits_and_gradients, name_here, released_names
from tests._swin_v2 import small_v2, spread_v2, timm_swin_v2
from utils.errors import UserError

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FROM_12 = (12, 12, 12, 6)  # the windows of pre-training at 192 pixels
CUTS = [  # every width and number of heads that was released, on maps that take less time
    ("tiny", 64, 8, (2, 2, 2, 1), ()),
    ("small", 64, 4, (2, 2, 3, 1), ()),
    ("base", 64, 8, (1, 2, 2, 1), ()),
    ("base", 96, 6, (1, 2, 1, 1), (4, 4, 4, 2)),
    ("large", 64, 4, (1, 1, 1, 1), (3, 3, 3, 2)),
]
FULL = [
    *((size, 256, window, None, ()) for size in ("tiny", "small", "base") for window in (8, 16)),
    *((size, 192, 12, None, ()) for size in ("base", "large")),
    *(
        (size, img_size, window, None, FROM_12)
        for size in ("base", "large")
        for img_size, window in ((256, 16), (384, 24))
    ),
]


def both(size: str, img_size: int, window: int, depths: tuple | None, pretrained: tuple) -> tuple:
    """timm's model and this project's with the same weights, and an image."""
    arguments = architecture(size, img_size, window, depths)
    theirs = timm_swin_v2(**arguments, pretrained_window_sizes=pretrained or (0, 0, 0, 0)).train()
    ours = SwinTransformerV2(num_classes=10, drop_path_rate=0.0, pretrained_window_sizes=pretrained, **arguments)
    ours.load_state_dict(from_timm(theirs), strict=True)
    return theirs, ours.train(), torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))


def set_path(model: SwinTransformerV2, attn: str, use_checkpoint: bool) -> None:
    for stage in model.layers:
        stage.use_checkpoint = use_checkpoint
        for block in stage.blocks:
            block.attn.impl = attn


def named_here(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name_here(name): gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize(("size", "img_size", "window", "depths", "pretrained"), CUTS)
def test_equal_to_timm(size: str, img_size: int, window: int, depths: tuple, pretrained: tuple):
    """Train mode, all ways of attention, with and without checkpointing: logits, and every gradient."""
    theirs, ours, images = both(size, img_size, window, depths, pretrained)
    expected, expected_gradients = logits_and_gradients(theirs, images)
    for attn, use_checkpoint in (("reference", False), ("sdpa", True), ("native", False)):
        set_path(ours, attn, use_checkpoint)
        logits, gradients = logits_and_gradients(ours, images)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        # That of logit_scale is a sum that cancels: what it keeps of float32 depends on the order of the additions.
        tolerance = 2e-5 if attn == "native" else 1e-5
        assert_same_gradients(gradients, named_here(expected_gradients), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "img_size", "window", "depths", "pretrained"), FULL)
def test_released_sizes_equal_to_timm(size: str, img_size: int, window: int, depths: None, pretrained: tuple):
    """Logits in float32; gradients in float64, in which nothing but another function could make a difference.

    In float32 the gradients of logit scales and query biases are sums that all but cancel: at these depths, rounding
    alone moves them by up to 2e-5.
    """
    theirs, ours, images = both(size, img_size, window, depths, pretrained)
    with torch.no_grad():
        expected = theirs(images)
        for attn in ("reference", "sdpa"):
            set_path(ours, attn, use_checkpoint=False)
            torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)
    set_path(ours, "reference", use_checkpoint=True)
    expected, expected_gradients = logits_and_gradients(theirs.double(), images.double())
    logits, gradients = logits_and_gradients(ours.double(), images.double())
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert_same_gradients(gradients, named_here(expected_gradients), tolerance=1e-11)


PUBLISHED = [  # size, image, window; parameters in M and MACs in G as released models' table prints them; both counted
    ("tiny", 256, 8, 28, 5.9, 28_347_154, 5_921_028_096),
    ("tiny", 256, 16, 28, 6.6, 28_347_154, 6_600_505_344),
    ("small", 256, 8, 50, 11.5, 49_728_418, 11_507_841_024),
    ("small", 256, 16, 50, 12.6, 49_728_418, 12_640_303_104),
    ("base", 256, 8, 88, 20.3, 87_918_816, 20_276_289_536),
    ("base", 256, 16, 88, 21.8, 87_918_816, 21_786_238_976),
    ("base", 384, 24, 88, 54.7, 87_918_816, 54_727_254_016),
    ("large", 256, 16, 197, 47.5, 196_739_932, 47_476_862_976),
    ("large", 384, 24, 197, 115.4, 196_739_932, 115_385_266_176),
]


@pytest.mark.parametrize(("size", "img_size", "window", "m_params", "g_macs", "params", "macs"), PUBLISHED)
def test_published_sizes(size, img_size, window, m_params, g_macs, params, macs):
    with torch.device("meta"):
        model = SwinTransformerV2(**architecture(size, img_size, window))
    assert (count_parameters(model), count_macs(model, img_size)) == (params, macs)
    assert (round(params / 1e6), round(macs / 1e9, 1)) == (m_params, g_macs)


BLOCK = ["norm1.weight", "norm1.bias", "attn.logit_scale", "attn.q_bias", "attn.v_bias", "attn.cpb_mlp.0.weight"]
BLOCK += ["attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
BLOCK += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def test_names_and_order_of_the_parameters():
    """Those of the released checkpoints: optimizer states, too, go by this order."""
    with torch.device("meta"):
        model = SwinTransformerV2(ape=True)
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == released_names(BLOCK)
    attention = model.layers[2].blocks[0].attn
    assert attention.logit_scale.shape == (12, 1, 1) and attention.cpb_mlp[2].weight.shape == (12, 512)
    assert model.layers[0].downsample.norm.weight.shape == (192,)


def attend_by_hand(attention: CosineWindowAttention, x: Tensor, shift: int, pretrained: int) -> Tensor:
    """Token by token, in float64, over the tokens that share its window; no window formed. x is (H, W, C)."""
    weights = {name: value.double() for name, value in attention.named_parameters()}
    window, heads = attention.windows.window, attention.num_heads
    height, width, dim = x.shape
    q, k, v = F.linear(x, weights["qkv.weight"]).split(dim, dim=-1)
    q, v = q + weights["q_bias"], v + weights["v_bias"]
    unit = max((pretrained or window) - 1, 1)

    def bias(down: int, right: int) -> Tensor:
        offset = torch.tensor([8 * down / unit, 8 * right / unit], dtype=torch.float64)
        offset = offset.sign() * torch.log2(1 + offset.abs()) / 3
        hidden = F.relu(weights["cpb_mlp.0.weight"] @ offset + weights["cpb_mlp.0.bias"])
        return 16 / (1 + torch.exp(-weights["cpb_mlp.2.weight"] @ hidden))

    def cell(place: int, length: int) -> int:
        return (place - (shift if length > window else 0)) // window

    out = torch.empty_like(x)
    places = [(i, j) for i in range(height) for j in range(width)]
    for i, j in places:
        seen = [(a, b) for a, b in places if cell(a, height) == cell(i, height) and cell(b, width) == cell(j, width)]
        biases = torch.stack([bias(i - a, j - b) for a, b in seen])  # (tokens, heads)
        for h, part in enumerate(torch.arange(dim).chunk(heads)):
            cosines = torch.stack([torch.cosine_similarity(q[i, j, part], k[a, b, part], dim=0) for a, b in seen])
            scale = weights["logit_scale"][h, 0, 0].exp().clamp(max=100)
            probabilities = (cosines * scale + biases[:, h]).softmax(0)
            out[i, j, part] = probabilities @ torch.stack([v[a, b, part] for a, b in seen])
    return F.linear(out, weights["proj.weight"], weights["proj.bias"])


@pytest.mark.parametrize("attn", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("map_size", "window", "size", "pretrained"),
    [
        ((4, 4), 2, (4, 4), 0),
        ((6, 6), 3, (5, 7), 0),  # no multiple of the window
        ((6, 6), 3, (2, 7), 2),  # a single window along one axis; another window before
        ((3, 3), 5, (3, 3), 8),  # the window shrinks to the map
        ((4, 4), 1, (3, 4), 0),  # every token alone
    ],
)
def test_attention_on_any_size_by_hand(map_size, window, size, pretrained, attn):
    attention = CosineWindowAttention(8, 2, map_size, window, shifted=True, impl=attn, pretrained_window=pretrained)
    # Not past the limit: there -100, the original's mask, is no longer far below what a score can be.
    spread_v2(attention, past_limit=2.0)
    x = torch.randn(1, *size, 8, generator=torch.Generator().manual_seed(4))
    expected = attend_by_hand(attention, x[0].double(), attention.windows.window // 2, pretrained)
    torch.testing.assert_close(attention(x)[0], expected.float(), atol=1e-5, rtol=0)


def test_logit_scale_is_limited():
    beyond = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    at_limit = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False), past_limit=math.log(100))
    below = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False), past_limit=4.0)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(beyond(x), at_limit(x)) and not torch.allclose(beyond(x), below(x), atol=1e-3)
    beyond(x).sum().backward()
    assert beyond.logit_scale.grad[0] == 0 and beyond.logit_scale.grad[1] != 0


def test_window_of_one_token():
    model = spread_v2(small_v2(window_size=1, pretrained_window_sizes=(1, 1)))
    model(IMAGE).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(log_spaced_offsets(1, 0), torch.zeros(1, 2))


def test_offsets_extend_those_of_the_first_window():
    """Rows go down, then right; 1 is at seven eighths of the largest offset; a larger window goes on from there."""
    eight = log_spaced_offsets(8, 0).unflatten(0, (15, 15))
    assert eight[0, 14].tolist() == pytest.approx([-math.log2(9) / 3, math.log2(9) / 3])
    assert eight[7, 8].tolist() == pytest.approx([0, math.log2(1 + 8 / 7) / 3])
    sixteen = log_spaced_offsets(16, 8).unflatten(0, (31, 31))
    assert torch.equal(sixteen[8:23, 8:23], eight)
    assert sixteen[15, 30].tolist() == pytest.approx([0, math.log2(1 + 8 * 15 / 7) / 3])
    assert torch.equal(log_spaced_offsets(16, 16), log_spaced_offsets(16, 0))


def test_fresh_branches_begin_at_nothing():
    """A new network is its embedding, its patch mergings and its classifier: the blocks pass their input on."""
    torch.manual_seed(0)
    model = small_v2()
    x = model.embed(IMAGE)
    assert torch.equal(model.forward_features(IMAGE), model.norm(model.layers[0].downsample(x)))
    for name, value in model.named_parameters():
        if "norm1" in name or "norm2" in name or name.endswith("bias") and "patch_embed.proj" not in name:
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("logit_scale"):
            torch.testing.assert_close(value, torch.full_like(value, math.log(10)))
        elif not name.startswith("patch_embed"):
            assert 0.012 < value.std() < 0.028, name


@pytest.mark.parametrize(("dtype", "alike"), [(torch.bfloat16, 0.97), (torch.float16, 0.999)])
@pytest.mark.parametrize("attn", ["reference", "sdpa"])
def test_autocast_stays_near_float32(dtype: torch.dtype, alike: float, attn: str):
    """`alike`: the least cosine between the gradient of a matrix and that in float32."""
    model = spread_v2(small_v2(attn=attn), past_limit=2.0)
    expected, expected_gradients = logits_and_gradients(model, IMAGE)
    with torch.autocast("cpu", dtype):
        logits, gradients = logits_and_gradients(model, IMAGE)
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.02)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        if gradient.numel() > 100:  # the gradient of a logit scale is a sum that all but cancels
            assert F.cosine_similarity(gradient.flatten(), expected_gradients[name].flatten(), dim=0) > alike, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_whose_squares_overflow_float16_attend_as_in_float32(dtype: torch.dtype):
    attention = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    x = torch.randn(1, 4, 4, 8)
    expected = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:16] *= 3000
        attention.q_bias *= 3000
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(attention(x).float(), expected, atol=0.05, rtol=0.05)


def test_position_bias_is_as_sharp_under_autocast():
    attention = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    expected = attention.relative_position_bias()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.relative_position_bias(), expected)
    assert attention.bfloat16().relative_position_bias().dtype == torch.float32
    assert attention(torch.randn(1, 4, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropouts_act_in_training_only(which: str):
    model, plain = spread_v2(small_v2(**{which: 0.5})), spread_v2(small_v2())
    assert not torch.equal(model(IMAGE), model(IMAGE))
    assert torch.equal(model.eval()(IMAGE), plain.eval()(IMAGE))


def test_what_does_not_decay():
    model = small_v2(ape=True)
    kept = {
        name for group in parameter_groups(model, 0.05, 0.9) if not group["weight_decay"] for name in group["names"]
    }
    assert {name for name, _ in model.named_parameters()} - kept == {
        "patch_embed.proj.weight",
        *(f"layers.{i}.blocks.{j}.{name}.weight" for i in (0, 1) for j in (0, 1)
          for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "layers.0.downsample.reduction.weight",
        "head.weight",
    }  # fmt: skip


def test_no_bias_in_the_projections():
    model = small_v2(qkv_bias=False)
    assert not any("q_bias" in name or "v_bias" in name for name in model.state_dict())
    with_zeros = small_v2()
    with_zeros.load_state_dict(spread_v2(model).state_dict(), strict=False)
    torch.testing.assert_close(model(IMAGE), with_zeros(IMAGE), atol=1e-6, rtol=0)


def test_compiles_without_a_break():
    model = spread_v2(small_v2())
    expected, expected_gradients = logits_and_gradients(model, IMAGE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    logits, gradients = logits_and_gradients(compiled, IMAGE)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients({name.removeprefix("_orig_mod."): g for name, g in gradients.items()}, expected_gradients)


OPTS = "MODEL.TYPE swinv2 DATA.IMG_SIZE 48 MODEL.NUM_CLASSES 0 MODEL.DROP_RATE 0.1 MODEL.ATTN_DROP_RATE 0.2 "
OPTS += "MODEL.DROP_PATH_RATE 0.3 MODEL.ATTN reference TRAIN.USE_CHECKPOINT true MODEL.SWINV2.PATCH_SIZE 2 "
OPTS += "MODEL.SWINV2.IN_CHANS 1 THROUGHPUT_MODE true "
OPTS += "MODEL.SWINV2.EMBED_DIM 16 MODEL.SWINV2.DEPTHS [1,2] MODEL.SWINV2.NUM_HEADS [2,2] "
OPTS += "MODEL.SWINV2.WINDOW_SIZE 5 MODEL.SWINV2.MLP_RATIO 3 MODEL.SWINV2.QKV_BIAS false MODEL.SWINV2.APE true "
OPTS += "MODEL.SWINV2.PATCH_NORM false MODEL.SWINV2.PRETRAINED_WINDOW_SIZES [4,3]"


def test_build_reads_every_key():
    model = build_model(get_config(None, OPTS.split()), num_classes=7)
    expected = SwinTransformerV2(
        48, 2, 1, 7, 16, (1, 2), (2, 2), 5, 3.0, False, 0.1, 0.2, 0.3, True, False, True, (4, 3), "reference"
    )
    assert repr(model) == repr(expected)
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    assert shapes == [(name, value.shape) for name, value in expected.named_parameters()]
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), expected.buffers(), strict=True))  # offsets, too
    attention = model.layers[0].blocks[0].attn
    assert (attention.attn_drop, attention.impl, model.layers[0].use_checkpoint) == (0.2, "reference", True)


def test_first_windows_must_be_one_for_each_stage():
    with pytest.raises(UserError, match=r"PRETRAINED_WINDOW_SIZES \[12, 12\].*DEPTHS.*equally long"):
        get_config(None, ["MODEL.TYPE", "swinv2", "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", [12, 12]])
    opts = ["MODEL.TYPE", "swinv2", "MODEL.SWINV2.DEPTHS", [1, 1], "MODEL.SWINV2.NUM_HEADS", [3, 3]]
    build_model(get_config(None, opts))  # zeros for four stages mean the same for two
