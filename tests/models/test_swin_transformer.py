"""Swin V1 as a whole: against timm in values and gradients, against the paper in size; and `build_model`."""

import itertools

import pytest
import torch

from config import get_config
from models.attention import WindowAttention
from models.build import build_model
from models.count import count_macs, count_parameters
from models.swin_transformer import SwinTransformer, SwinTransformerBlock
from tests._swin import (
    architecture,
    assert_same_gradients,
    from_timm,
    logits_and_gradients,
    name_here,
    released_names,
    small,
    spread,
    timm_swin,
)
from utils.errors import UserError

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
REDUCED = [  # every width and number of heads of the paper, on smaller maps
    ("tiny", 224, 7, None),
    ("small", 96, 3, (1, 2, 3, 2)),
    ("base", 96, 3, (1, 2, 2, 1)),
    ("large", 64, 2, (1, 2, 2, 1)),
    ("base", 96, 12, (2, 1, 1, 1)),
    ("large", 96, 12, (2, 1, 1, 1)),
]
FULL = [("small", 224, 7, None), ("base", 224, 7, None), ("large", 224, 7, None), ("base", 384, 12, None)]
FULL += [("large", 384, 12, None)]


@pytest.mark.parametrize(
    ("size", "img_size", "window", "depths"),
    [*REDUCED, *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL)],
)
def test_equal_to_timm(size: str, img_size: int, window: int, depths: tuple[int, ...] | None):
    """Logits and every gradient in train mode, for several implementations, with and without checkpointing."""
    arguments = architecture(size, img_size, window, depths)
    timm_model = timm_swin(**arguments).train()
    images = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    expected, timm_gradients = logits_and_gradients(timm_model, images)
    expected_gradients = {name_here(name): gradient for name, gradient in timm_gradients.items()}
    model = SwinTransformer(num_classes=10, drop_path_rate=0.0, **arguments).train()
    model.load_state_dict(from_timm(timm_model), strict=True)
    for attn, use_checkpoint in (("reference", False), ("sdpa", True), ("native", False)):
        for stage in model.layers:
            stage.use_checkpoint = use_checkpoint
            for block in stage.blocks:
                block.attn.impl = attn
        logits, gradients = logits_and_gradients(model, images)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize(
    ("attn", "use_checkpoint"), list(itertools.product(("auto", "reference", "sdpa"), (False, True)))
)
def test_implementations_and_checkpointing_agree(attn: str, use_checkpoint: bool):
    """With shift, padding and absolute embedding; in inference too."""
    arguments = {"img_size": 40, "ape": True, "window_size": 3}
    plain = spread(small(attn="reference", **arguments))
    model = small(attn=attn, use_checkpoint=use_checkpoint, **arguments)
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 37, 50)
    expected, expected_gradients = logits_and_gradients(plain, images)
    logits, gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), expected, atol=1e-5, rtol=0)


def test_checkpointing_recomputes_blocks(monkeypatch):
    calls = []
    forward = WindowAttention.forward
    monkeypatch.setattr(WindowAttention, "forward", lambda self, x: calls.append(1) or forward(self, x))
    for use_checkpoint, expected in ((False, 4), (True, 8)):
        calls.clear()
        small(use_checkpoint=use_checkpoint)(IMAGE).sum().backward()
        assert len(calls) == expected


def test_checkpointing_repeats_the_same_dropout():
    arguments = {"drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.5}
    plain, checkpointed = spread(small(**arguments)), spread(small(use_checkpoint=True, **arguments))
    torch.manual_seed(3)
    expected, expected_gradients = logits_and_gradients(plain, IMAGE)
    torch.manual_seed(3)
    logits, gradients = logits_and_gradients(checkpointed, IMAGE)
    assert torch.equal(logits, expected)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


PAPER = [  # size, image, window; parameters (M) and MACs (G) as printed in tables 1 and 7; exact counts
    ("tiny", 224, 7, 29, 4.5, 28_288_354, 4_490_566_656),
    ("small", 224, 7, 50, 8.7, 49_606_258, 8_740_875_264),
    ("base", 224, 7, 88, 15.4, 87_768_224, 15_430_946_816),
    ("large", 224, 7, 197, 34.5, 196_532_476, 34_475_759_616),
    ("base", 384, 12, 88, 47.0, 87_903_584, 47_083_134_976),
    ("large", 384, 12, 197, 103.9, 196_735_516, 103_919_087_616),
]


def expected_macs(dim: int, depths: tuple[int, ...], img_size: int, window: int) -> int:
    """Computes section 3.2, equation 2 (with an MLP of ratio 4), and the products outside of the blocks."""
    side = img_size // 4
    total = side**2 * dim * 3 * 4 * 4
    for stage, depth in enumerate(depths):
        tokens = side**2
        total += depth * tokens * (4 * dim**2 + 2 * window**2 * dim + 8 * dim**2)
        if stage < len(depths) - 1:
            side, dim = side // 2, 2 * dim
            total += side**2 * (2 * dim) * dim
    return total + dim * 1000


@pytest.mark.parametrize("attn", ["reference", "sdpa"])
@pytest.mark.parametrize(("size", "img_size", "window", "m_params", "g_macs", "params", "macs"), PAPER)
def test_sizes_of_the_paper(size, img_size, window, m_params, g_macs, params, macs, attn):
    """Exact counts. The paper prints 29 for 28.3 M (tiny) and 47.0 for 47.08 G (base, 384)."""
    arguments = architecture(size, img_size, window)
    with torch.device("meta"):
        model = SwinTransformer(attn=attn, **arguments)
    assert count_parameters(model) == params
    assert count_macs(model, img_size) == macs
    assert macs == expected_macs(arguments["embed_dim"], arguments["depths"], img_size, window)
    assert params / 1e6 == pytest.approx(m_params, abs=0.75)
    assert macs / 1e9 == pytest.approx(g_macs, abs=0.09)


def test_random_numbers_of_the_tests_do_not_depend_on_the_default_device():
    """On a GPU, a test may build its tensors under `torch.device("cuda")`; a generator of the CPU cannot draw there."""
    model = spread(small())
    logits, gradients = logits_and_gradients(model, IMAGE)
    with torch.device("meta"):
        other_logits, other_gradients = logits_and_gradients(spread(model), IMAGE)
    assert torch.equal(other_logits, logits)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in other_gradients.items())


def test_counting_does_not_change_the_model():
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model, 32) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model(IMAGE).device.type == "cpu"


BLOCK = ["norm1.weight", "norm1.bias", "attn.relative_position_bias_table", "attn.qkv.weight", "attn.qkv.bias"]
BLOCK += ["attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"]
BLOCK += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def test_names_and_order_of_the_parameters():
    """They equal those of the released checkpoints. Optimizer states use this order too."""
    with torch.device("meta"):
        model = SwinTransformer(ape=True)
    assert [name for name, _ in model.named_parameters()] == released_names(BLOCK)
    assert list(model.state_dict()) == released_names(BLOCK)  # derived buffers are not saved
    assert model.absolute_pos_embed.shape == (1, 56 * 56, 96)
    assert model.layers[2].blocks[0].attn.relative_position_bias_table.shape == (169, 12)


def test_pyramid_equal_to_timm():
    arguments = architecture("tiny", 64, 4, (2, 2, 2, 1))
    timm_model = timm_swin(**arguments).eval()
    model = SwinTransformer(num_classes=10, **arguments).eval()
    model.load_state_dict(from_timm(timm_model))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_features(images, out_indices=(0, 1, 2, 3))
        expected = timm_model.forward_intermediates(images, intermediates_only=True)
        last = model.forward_features(images)
    assert [tuple(x.shape) for x in maps] == [(2, 96, 16, 16), (2, 192, 8, 8), (2, 384, 4, 4), (2, 768, 2, 2)]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, timm_model.forward_features(images), atol=1e-5, rtol=1e-5)


def test_pyramid_of_chosen_stages():
    model = small(depths=(1, 1, 1), num_heads=(2, 4, 8)).eval()
    all_maps = model.forward_features(IMAGE, out_indices=(0, 1, 2))
    for out_indices in ((1,), (2, 0), ()):
        maps = model.forward_features(IMAGE, out_indices=out_indices)
        assert all(torch.equal(x, all_maps[i]) for x, i in zip(maps, out_indices, strict=True))
    for invalid in ((3,), (-1,)):
        with pytest.raises(ValueError, match="from 0 to 2"):
            model.forward_features(IMAGE, out_indices=invalid)


def test_without_classifier_gives_pooled_features():
    model = small(num_classes=0)
    torch.testing.assert_close(model(IMAGE), model.forward_features(IMAGE).flatten(1, 2).mean(1))


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_is_active_in_training_only(rate: str):
    model, plain = spread(small(**{rate: 0.5})), spread(small())
    assert not torch.equal(model(IMAGE), model(IMAGE))
    assert torch.equal(model.eval()(IMAGE), plain.eval()(IMAGE))


def test_drop_path_rises_linearly():
    with torch.device("meta"):
        model = SwinTransformer(drop_path_rate=0.2)
    rates = [block.drop_path.rate for block in model.blocks()]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert small(depths=(1,), num_heads=(2,), drop_path_rate=0.2)(IMAGE).shape == (2, 5)  # no division by zero


def test_blocks_are_all_blocks_in_order():
    model = small(depths=(1, 2), num_heads=(2, 4))
    assert list(model.blocks()) == [m for m in model.modules() if isinstance(m, SwinTransformerBlock)]
    assert len(list(model.blocks())) == 3


def test_every_second_block_is_shifted_unless_one_window_covers_the_map():
    with torch.device("meta"):
        windows = [block.attn.windows for block in SwinTransformer().blocks()]
    shifts = [w.shifts(*w.map_size) for w in windows]
    assert shifts == [(0, 0), (3, 3)] * 5 + [(0, 0)] * 2


def test_options_of_the_projections():
    model = small(qkv_bias=False, patch_norm=False, qk_scale=0.7, mlp_ratio=2.0)
    names = dict(model.named_parameters())
    assert not any("qkv.bias" in name or "patch_embed.norm" in name for name in names)
    assert names["layers.0.blocks.0.mlp.fc1.weight"].shape == (32, 16)
    default = small(qkv_bias=False, patch_norm=False, mlp_ratio=2.0)
    default.load_state_dict(spread(model).state_dict())
    for block, other in zip(model.blocks(), default.blocks(), strict=True):
        d = other.attn.qkv.in_features // other.attn.num_heads
        with torch.no_grad():
            other.attn.qkv.weight[: other.attn.qkv.in_features] *= 0.7 * d**0.5
        assert block.attn.scale == 0.7
    torch.testing.assert_close(model(IMAGE), default(IMAGE), atol=1e-5, rtol=0)


def test_initial_values():
    torch.manual_seed(0)
    for name, value in small(ape=True).named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias") and not name.startswith("patch_embed.proj"):
            assert (value == 0).all(), name
        elif not name.startswith("patch_embed.proj"):
            assert 0.013 < value.std() < 0.027, name


def test_layer_ids():
    with torch.device("meta"):
        model = SwinTransformer()
    assert model.num_layer_ids == 14
    layer_ids = {name: model.get_layer_id(name) for name, _ in model.named_parameters()}
    assert layer_ids["patch_embed.norm.weight"] == model.get_layer_id("absolute_pos_embed") == 0
    assert layer_ids["layers.0.blocks.0.norm1.weight"] == 1
    assert layer_ids["layers.0.blocks.1.mlp.fc2.bias"] == layer_ids["layers.0.downsample.reduction.weight"] == 2
    assert (
        layer_ids["layers.2.blocks.5.attn.relative_position_bias_table"]
        == layer_ids["layers.2.downsample.norm.bias"]
        == 10
    )
    assert layer_ids["layers.3.blocks.1.attn.qkv.weight"] == 12
    assert layer_ids["norm.weight"] == layer_ids["head.bias"] == 13


def test_names_exempt_from_weight_decay():
    matrices = [name for name, value in small(ape=True).named_parameters() if value.ndim > 1]
    exempt = [name for name in matrices if any(part in name for part in small().no_weight_decay())]
    assert set(matrices) - set(exempt) == {name for name in matrices if name.endswith("weight")}
    assert len(exempt) == 5


def test_autocast():
    model = spread(small())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGE)
        logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), model(IMAGE), atol=0.1, rtol=0.05)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attn", ["auto", "sdpa"])
def test_compiles_without_a_break(backend: str, attn: str):
    model = spread(small(attn=attn))
    expected, expected_gradients = logits_and_gradients(model, IMAGE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    logits, gradients = logits_and_gradients(compiled, IMAGE)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients({name.removeprefix("_orig_mod."): g for name, g in gradients.items()}, expected_gradients)


def test_build_from_the_defaults():
    with torch.device("meta"):
        model = build_model(get_config(None))
    assert count_parameters(model) == 28_288_354
    assert list(model.blocks())[-1].drop_path.rate == pytest.approx(0.1)


ALL_KEYS = "DATA.IMG_SIZE 48 MODEL.NUM_CLASSES 0 MODEL.DROP_RATE 0.1 MODEL.ATTN_DROP_RATE 0.2 THROUGHPUT_MODE true "
ALL_KEYS += "MODEL.DROP_PATH_RATE 0.3 MODEL.ATTN reference TRAIN.USE_CHECKPOINT true MODEL.SWIN.PATCH_SIZE 2 "
ALL_KEYS += "MODEL.SWIN.IN_CHANS 1 MODEL.SWIN.EMBED_DIM 16 MODEL.SWIN.DEPTHS [1,2] MODEL.SWIN.NUM_HEADS [2,2] "
ALL_KEYS += "MODEL.SWIN.WINDOW_SIZE 5 MODEL.SWIN.MLP_RATIO 3.0 MODEL.SWIN.QKV_BIAS false MODEL.SWIN.QK_SCALE 0.5 "
ALL_KEYS += "MODEL.SWIN.APE true MODEL.SWIN.PATCH_NORM false"


def test_build_reads_every_key():
    config = get_config(None, ALL_KEYS.split())
    model = build_model(config, num_classes=7)
    expected = SwinTransformer(
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
        qk_scale=0.5,
        drop_rate=0.1,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
        ape=True,
        patch_norm=False,
        use_checkpoint=True,
        attn="reference",
    )
    assert repr(model) == repr(expected)
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    assert shapes == [(name, value.shape) for name, value in expected.named_parameters()]
    attention = next(model.blocks()).attn
    assert (attention.scale, attention.attn_drop, attention.impl) == (0.5, 0.2, "reference")
    assert model.layers[0].use_checkpoint and model.pos_drop.p == 0.1
    assert isinstance(build_model(config).head, torch.nn.Identity)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.TYPE", "resnet"], "MODEL.TYPE is 'resnet'.*swin, swinv2, swin_mlp, timm"),
        (
            ["MODEL.TYPE", "swinv2", "MODEL.SWINV2.DEPTHS", [2, 2]],
            "MODEL.SWINV2.DEPTHS.*MODEL.SWINV2.NUM_HEADS.*equally long",
        ),
        (["MODEL.ATTN", "flash"], "MODEL.ATTN is 'flash'.*auto, reference, sdpa"),
        (["MODEL.SWIN.DEPTHS", [2, 2]], "MODEL.SWIN.DEPTHS.*MODEL.SWIN.NUM_HEADS.*equally long"),
        (["MODEL.SWIN.EMBED_DIM", 100], "100 channels of stage 0.*3 heads.*MODEL.SWIN.EMBED_DIM"),
        (["MODEL.SWIN.NUM_HEADS", [3, 6, 7, 24]], "MODEL.SWIN.NUM_HEADS.*384 channels of stage 2.*7 heads"),
    ],
)
def test_impossible_architectures(opts: list, message: str):
    """`build_model` relies on these checks of the configuration."""
    with pytest.raises(UserError, match=message):
        get_config(None, opts)
