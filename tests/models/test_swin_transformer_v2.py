"""Swin V2 against timm in values and gradients, against the published sizes, and token by token on any image size."""

import math

import pytest
import torch
from torch import Tensor, nn
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
FROM_12 = (12, 12, 12, 6)  # window sizes of the pre-training at 192 pixels
REDUCED = [  # every width and number of heads that was released, on smaller maps
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


def timm_and_own_model(
    size: str, img_size: int, window: int, depths: tuple | None, pretrained: tuple
) -> tuple[nn.Module, SwinTransformerV2, Tensor]:
    """Returns timm's model and this project's with the same weights, and an image."""
    arguments = architecture(size, img_size, window, depths)
    theirs = timm_swin_v2(**arguments, pretrained_window_sizes=pretrained or (0, 0, 0, 0)).train()
    ours = SwinTransformerV2(num_classes=10, drop_path_rate=0.0, pretrained_window_sizes=pretrained, **arguments)
    ours.load_state_dict(from_timm(theirs), strict=True)
    return theirs, ours.train(), torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))


def set_implementation(model: SwinTransformerV2, attn: str, use_checkpoint: bool) -> None:
    for stage in model.layers:
        stage.use_checkpoint = use_checkpoint
    for block in model.blocks():
        block.attn.impl = attn


def rename_from_timm(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name_here(name): gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize(("size", "img_size", "window", "depths", "pretrained"), REDUCED)
def test_equal_to_timm(size: str, img_size: int, window: int, depths: tuple, pretrained: tuple):
    """Logits and every gradient in train mode, for several implementations, with and without checkpointing."""
    theirs, ours, images = timm_and_own_model(size, img_size, window, depths, pretrained)
    expected, expected_gradients = logits_and_gradients(theirs, images)
    for attn, use_checkpoint in (("reference", False), ("sdpa", True), ("native", False)):
        set_implementation(ours, attn, use_checkpoint)
        logits, gradients = logits_and_gradients(ours, images)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        # The gradient of logit_scale is a sum that cancels: its rounding depends on the order of the additions.
        tolerance = 2e-5 if attn == "native" else 1e-5
        assert_same_gradients(gradients, rename_from_timm(expected_gradients), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "img_size", "window", "depths", "pretrained"), FULL)
def test_released_sizes_equal_to_timm(size: str, img_size: int, window: int, depths: None, pretrained: tuple):
    """Logits in float32; gradients in float64, where rounding cannot hide a difference.

    In float32, the gradients of logit scales and query biases are sums that almost cancel: at these depths, rounding
    changes them by up to 2e-5.
    """
    theirs, ours, images = timm_and_own_model(size, img_size, window, depths, pretrained)
    with torch.no_grad():
        expected = theirs(images)
        for attn in ("reference", "sdpa"):
            set_implementation(ours, attn, use_checkpoint=False)
            torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)
    set_implementation(ours, "reference", use_checkpoint=True)
    expected, expected_gradients = logits_and_gradients(theirs.double(), images.double())
    logits, gradients = logits_and_gradients(ours.double(), images.double())
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert_same_gradients(gradients, rename_from_timm(expected_gradients), tolerance=1e-11)


PUBLISHED = [  # size, image, window; parameters (M) and MACs (G) as in the table of released models; exact counts
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
    """They equal those of the released checkpoints. Optimizer states use this order too."""
    with torch.device("meta"):
        model = SwinTransformerV2(ape=True)
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == released_names(BLOCK)
    attention = model.layers[2].blocks[0].attn
    assert attention.logit_scale.shape == (12, 1, 1) and attention.cpb_mlp[2].weight.shape == (12, 512)
    assert model.layers[0].downsample.norm.weight.shape == (192,)


def attend_by_token(attention: CosineWindowAttention, x: Tensor, shift: int, pretrained: int) -> Tensor:
    """Computes attention of (H, W, C) in float64, for each token over the tokens of its window, including padding."""
    weights = {name: value.double() for name, value in attention.named_parameters()}
    window, heads, size = attention.windows.window, attention.num_heads, x.shape[:2]
    x = F.pad(x, (0, 0, 0, -size[1] % window, 0, -size[0] % window))
    height, width, dim = x.shape
    q, k, v = F.linear(x, weights["qkv.weight"]).split(dim, dim=-1)
    q, v = q + weights["q_bias"], v + weights["v_bias"]
    largest = max((pretrained or window) - 1, 1)

    def bias(rows: int, columns: int) -> Tensor:
        offset = torch.tensor([8 * rows / largest, 8 * columns / largest], dtype=torch.float64)
        offset = offset.sign() * torch.log2(1 + offset.abs()) / 3
        hidden = F.relu(weights["cpb_mlp.0.weight"] @ offset + weights["cpb_mlp.0.bias"])
        return 16 / (1 + torch.exp(-weights["cpb_mlp.2.weight"] @ hidden))

    def cell(position: int, length: int) -> int:
        return (position - (shift if length > window else 0)) // window

    out = torch.empty_like(x)
    positions = [(i, j) for i in range(height) for j in range(width)]
    for i, j in positions:
        visible = [
            (a, b) for a, b in positions if cell(a, height) == cell(i, height) and cell(b, width) == cell(j, width)
        ]
        biases = torch.stack([bias(i - a, j - b) for a, b in visible])  # (tokens, heads)
        for h, part in enumerate(torch.arange(dim).chunk(heads)):
            cosines = torch.stack([torch.cosine_similarity(q[i, j, part], k[a, b, part], dim=0) for a, b in visible])
            scale = weights["logit_scale"][h, 0, 0].exp().clamp(max=100)
            probabilities = (cosines * scale + biases[:, h]).softmax(0)
            out[i, j, part] = probabilities @ torch.stack([v[a, b, part] for a, b in visible])
    return F.linear(out[: size[0], : size[1]], weights["proj.weight"], weights["proj.bias"])


@pytest.mark.parametrize("attn", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("map_size", "window", "size", "pretrained"),
    [
        ((4, 4), 2, (4, 4), 0),
        ((6, 6), 3, (5, 7), 0),  # not a multiple of the window
        ((6, 6), 3, (2, 7), 2),  # a single window along one axis; another window size in the pre-training
        ((3, 3), 5, (3, 3), 8),  # the window shrinks to the map
        ((4, 4), 1, (3, 4), 0),  # every token alone
    ],
)
def test_attention_on_any_size_by_token(map_size, window, size, pretrained, attn):
    attention = CosineWindowAttention(8, 2, map_size, window, shifted=True, impl=attn, pretrained_window=pretrained)
    # Below the limit of the scale: at the limit, the original's mask of -100 is no longer far below the scores.
    spread_v2(attention, past_limit=2.0)
    x = torch.randn(1, *size, 8, generator=torch.Generator().manual_seed(4))
    expected = attend_by_token(attention, x[0].double(), attention.windows.window // 2, pretrained)
    torch.testing.assert_close(attention(x)[0], expected.float(), atol=1e-5, rtol=0)


def test_logit_scale_is_limited():
    above_limit = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    at_limit = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False), past_limit=math.log(100))
    below = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False), past_limit=4.0)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(above_limit(x), at_limit(x)) and not torch.allclose(above_limit(x), below(x), atol=1e-3)
    above_limit(x).sum().backward()
    assert above_limit.logit_scale.grad[0] == 0 and above_limit.logit_scale.grad[1] != 0


def test_window_of_one_token():
    model = spread_v2(small_v2(window_size=1, pretrained_window_sizes=(1, 1)))
    model(IMAGE).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(log_spaced_offsets(1, 0), torch.zeros(1, 2))


def test_offsets_extend_those_of_the_pretrained_window():
    """Row offsets vary slowest. A seventh of the largest offset is log2(1 + 8/7) / 3; a larger window extends it."""
    eight = log_spaced_offsets(8, 0).unflatten(0, (15, 15))
    assert eight[0, 14].tolist() == pytest.approx([-math.log2(9) / 3, math.log2(9) / 3])
    assert eight[7, 8].tolist() == pytest.approx([0, math.log2(1 + 8 / 7) / 3])
    sixteen = log_spaced_offsets(16, 8).unflatten(0, (31, 31))
    assert torch.equal(sixteen[8:23, 8:23], eight)
    assert sixteen[15, 30].tolist() == pytest.approx([0, math.log2(1 + 8 * 15 / 7) / 3])
    assert torch.equal(log_spaced_offsets(16, 16), log_spaced_offsets(16, 0))


def test_initial_values():
    """Norm weights start at zero, so each residual branch starts at zero and the blocks are the identity."""
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


@pytest.mark.parametrize(("dtype", "min_cosine"), [(torch.bfloat16, 0.97), (torch.float16, 0.999)])
@pytest.mark.parametrize("attn", ["reference", "sdpa"])
def test_autocast_stays_near_float32(dtype: torch.dtype, min_cosine: float, attn: str):
    """`min_cosine`: lower bound of the cosine between the gradient of a matrix and its gradient in float32."""
    model = spread_v2(small_v2(attn=attn), past_limit=2.0)
    expected, expected_gradients = logits_and_gradients(model, IMAGE)
    with torch.autocast("cpu", dtype):
        logits, gradients = logits_and_gradients(model, IMAGE)
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.02)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        if gradient.numel() > 100:  # the gradient of a logit scale is a sum that almost cancels
            assert F.cosine_similarity(gradient.flatten(), expected_gradients[name].flatten(), dim=0) > min_cosine, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_whose_squares_overflow_float16(dtype: torch.dtype):
    attention = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    x = torch.randn(1, 4, 4, 8)
    expected = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:16] *= 3000
        attention.q_bias *= 3000
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(attention(x).float(), expected, atol=0.05, rtol=0.05)


def test_position_bias_is_float32_under_autocast():
    attention = spread_v2(CosineWindowAttention(8, 2, (4, 4), 4, shifted=False))
    expected = attention.relative_position_bias()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.relative_position_bias(), expected)
    assert attention.bfloat16().relative_position_bias().dtype == torch.float32
    assert attention(torch.randn(1, 4, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_is_active_in_training_only(rate: str):
    model, plain = spread_v2(small_v2(**{rate: 0.5})), spread_v2(small_v2())
    assert not torch.equal(model(IMAGE), model(IMAGE))
    assert torch.equal(model.eval()(IMAGE), plain.eval()(IMAGE))


def test_weight_decay():
    model = small_v2(ape=True)
    exempt = {
        name for group in parameter_groups(model, 0.05, 0.9) if not group["weight_decay"] for name in group["names"]
    }
    assert {name for name, _ in model.named_parameters()} - exempt == {
        "patch_embed.proj.weight",
        *(f"layers.{i}.blocks.{j}.{name}.weight" for i in (0, 1) for j in (0, 1)
          for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "layers.0.downsample.reduction.weight",
        "head.weight",
    }  # fmt: skip


def test_without_qkv_bias():
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


ALL_KEYS = "MODEL.TYPE swinv2 DATA.IMG_SIZE 48 MODEL.NUM_CLASSES 0 MODEL.DROP_RATE 0.1 MODEL.ATTN_DROP_RATE 0.2 "
ALL_KEYS += "MODEL.DROP_PATH_RATE 0.3 MODEL.ATTN reference TRAIN.USE_CHECKPOINT true MODEL.SWINV2.PATCH_SIZE 2 "
ALL_KEYS += "MODEL.SWINV2.IN_CHANS 1 THROUGHPUT_MODE true "
ALL_KEYS += "MODEL.SWINV2.EMBED_DIM 16 MODEL.SWINV2.DEPTHS [1,2] MODEL.SWINV2.NUM_HEADS [2,2] "
ALL_KEYS += "MODEL.SWINV2.WINDOW_SIZE 5 MODEL.SWINV2.MLP_RATIO 3 MODEL.SWINV2.QKV_BIAS false MODEL.SWINV2.APE true "
ALL_KEYS += "MODEL.SWINV2.PATCH_NORM false MODEL.SWINV2.PRETRAINED_WINDOW_SIZES [4,3]"


def test_build_reads_every_key():
    model = build_model(get_config(None, ALL_KEYS.split()), num_classes=7)
    expected = SwinTransformerV2(
        img_size=48,
        patch_size=2,
        in_chans=1,
        num_classes=7,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 2),
        window_size=5,
        mlp_ratio=3.0,
        qkv_bias=False,
        drop_rate=0.1,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
        ape=True,
        patch_norm=False,
        use_checkpoint=True,
        pretrained_window_sizes=(4, 3),
        attn="reference",
    )
    assert repr(model) == repr(expected)
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    assert shapes == [(name, value.shape) for name, value in expected.named_parameters()]
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), expected.buffers(), strict=True))  # the offsets too
    attention = model.layers[0].blocks[0].attn
    assert (attention.attn_drop, attention.impl, model.layers[0].use_checkpoint) == (0.2, "reference", True)


def test_pretrained_window_sizes_need_one_value_per_stage():
    with pytest.raises(UserError, match=r"PRETRAINED_WINDOW_SIZES \[12, 12\].*DEPTHS.*equally long"):
        get_config(None, ["MODEL.TYPE", "swinv2", "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", [12, 12]])
    opts = ["MODEL.TYPE", "swinv2", "MODEL.SWINV2.DEPTHS", [1, 1], "MODEL.SWINV2.NUM_HEADS", [3, 3]]
    build_model(get_config(None, opts))  # zeros for four stages mean the same for two
