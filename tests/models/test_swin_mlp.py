"""Swin-MLP against a network computed token by token, without windows, and against the published sizes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from models.swin_mlp import SpatialMlp, SwinMLP
from optimizer import parameter_groups
from tests._swin import SMALL, logits_and_gradients, released_names, spread

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small_mlp(**changes) -> SwinMLP:
    return SwinMLP(**{**SMALL, **changes})


PUBLISHED = [  # embed_dim, depths, heads, image, window; M parameters and G MACs of the released models' table; counted
    (96, (2, 2, 6, 2), (4, 8, 16, 32), 256, 8, 20, 4.0, 20_386_632, 4_026_906_624),  # C24: 24 channels in each head
    (96, (2, 2, 6, 2), (8, 16, 32, 64), 256, 8, 21, 4.0, 21_152_072, 4_026_906_624),  # C12
    (96, (2, 2, 6, 2), (16, 32, 64, 128), 256, 8, 23, 4.0, 22_682_952, 4_026_906_624),  # C6
    (128, (2, 2, 18, 2), (4, 8, 16, 32), 224, 7, 61, 10.4, 60_659_416, 10_412_086_144),
]


@pytest.mark.parametrize(
    ("dim", "depths", "heads", "img_size", "window", "m_params", "g_macs", "params", "macs"), PUBLISHED
)
def test_published_sizes(dim, depths, heads, img_size, window, m_params, g_macs, params, macs):
    with torch.device("meta"):
        model = SwinMLP(img_size=img_size, embed_dim=dim, depths=depths, num_heads=heads, window_size=window)
    assert (count_parameters(model), count_macs(model, img_size)) == (params, macs)
    assert (round(params / 1e6), round(macs / 1e9, 1)) == (m_params, g_macs)


def mix_by_token(layer: SpatialMlp, x: Tensor, window: int, shift: int) -> Tensor:
    """Computes each token of (H, W, C) as its bias plus the weighted sum of the tokens of its window, without padding.

    On an axis longer than a window, windows begin at shift - window: the first one contains `shift` tokens.
    """
    height, width, dim = x.shape
    weight = layer.weight[:, :, 0].unflatten(0, (layer.num_heads, -1))  # (nH, N, N)
    bias = layer.bias.unflatten(0, (layer.num_heads, -1))  # (nH, N)
    first_row = shift - window if shift and height > window else 0
    first_column = shift - window if shift and width > window else 0
    out = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            top = i - (i - first_row) % window
            left = j - (j - first_column) % window
            own = (i - top) * window + j - left
            for h, part in enumerate(torch.arange(dim).chunk(layer.num_heads)):
                total = bias[h, own].expand(len(part)).clone()
                for other in range(window**2):
                    a, b = top + other // window, left + other % window
                    if 0 <= a < height and 0 <= b < width:
                        total += weight[h, own, other] * x[a, b, part]
                out[i, j, part] = total
    return out


@pytest.mark.parametrize(
    ("map_size", "window", "size"),
    [
        ((8, 8), 4, (8, 8)),
        ((6, 6), 3, (5, 7)),  # not a multiple of the window
        ((6, 6), 3, (2, 7)),  # a single window along one axis: no shift along it
        ((3, 3), 5, (3, 3)),  # the window shrinks to the map
        ((3, 3), 5, (6, 4)),  # and stays small on a larger map
        ((4, 4), 1, (3, 2)),  # every token alone
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_spatial_mlp_by_token(map_size, window, size, shifted):
    layer = spread(SpatialMlp(2, map_size, window, shifted)).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    window = min(window, *map_size)
    expected = torch.stack([mix_by_token(layer, image, window, window // 2 if shifted else 0) for image in x])
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_network_by_token():
    """Blocks, patch merging and classifier, computed from the weights; the shift alternates."""
    model = spread(small_mlp())
    weights = dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    patches = IMAGE[0].permute(1, 2, 0).unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    x = norm(x, "patch_embed.norm")
    for i in range(2):
        for j in range(2):
            name = f"layers.{i}.blocks.{j}"
            shift = 2 if i == 0 and j == 1 else 0  # the second stage's map is one window
            x = x + mix_by_token(model.layers[i].blocks[j].spatial_mlp, norm(x, f"{name}.norm1"), 4, shift)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if i == 0:
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], dim=-1)
            x = linear(norm(x, "layers.0.downsample.norm"), "layers.0.downsample.reduction")
    expected = linear(norm(x, "norm").flatten(0, 1).mean(0), "head")
    torch.testing.assert_close(model(IMAGE)[0], expected, atol=1e-5, rtol=0)


BLOCK = ["norm1.weight", "norm1.bias", "spatial_mlp.weight", "spatial_mlp.bias", "norm2.weight", "norm2.bias"]
BLOCK += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def test_names_and_order_of_the_parameters():
    with torch.device("meta"):
        model = SwinMLP(ape=True)
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == released_names(BLOCK)
    assert model.layers[2].blocks[0].spatial_mlp.weight.shape == (16 * 64, 64, 1)


def test_initial_values():
    torch.manual_seed(0)
    for name, value in small_mlp().named_parameters():
        if name.endswith("bias") and not name.startswith("patch_embed.proj"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif not name.startswith("patch_embed"):
            assert 0.012 < value.std() < 0.028, name


def test_weight_decay():
    model = small_mlp(ape=True)
    exempt = [name for group in parameter_groups(model, 0.05) if not group["weight_decay"] for name in group["names"]]
    assert {name.rpartition(".")[2] for name in exempt} == {"absolute_pos_embed", "weight", "bias"}
    assert not any("spatial_mlp.weight" in name or "fc" in name and "weight" in name for name in exempt)
    assert model.get_layer_id("layers.1.blocks.0.spatial_mlp.weight") == 3 and model.num_layer_ids == 6


def test_checkpointing_and_compiling_change_nothing():
    model = spread(small_mlp(img_size=40, window_size=3))
    expected, expected_gradients = logits_and_gradients(model, IMAGE)
    checkpointed = small_mlp(img_size=40, window_size=3, use_checkpoint=True)
    checkpointed.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for other in (checkpointed, compiled):
        logits, gradients = logits_and_gradients(other, IMAGE)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
        for name, gradient in gradients.items():
            expected_gradient = expected_gradients[name.removeprefix("_orig_mod.")]
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_build_reads_every_key():
    opts = (
        "MODEL.TYPE swin_mlp DATA.IMG_SIZE 48 MODEL.DROP_RATE 0.1 MODEL.DROP_PATH_RATE 0.3 TRAIN.USE_CHECKPOINT true "
    )
    opts += "MODEL.SWIN_MLP.PATCH_SIZE 2 MODEL.SWIN_MLP.IN_CHANS 1 THROUGHPUT_MODE true MODEL.SWIN_MLP.EMBED_DIM 16 "
    opts += "MODEL.SWIN_MLP.DEPTHS [1,2] MODEL.SWIN_MLP.NUM_HEADS [2,4] MODEL.SWIN_MLP.WINDOW_SIZE 5 "
    opts += "MODEL.SWIN_MLP.MLP_RATIO 3 MODEL.SWIN_MLP.APE true MODEL.SWIN_MLP.PATCH_NORM false"
    model = build_model(get_config(None, opts.split()), num_classes=7)
    expected = SwinMLP(
        img_size=48,
        patch_size=2,
        in_chans=1,
        num_classes=7,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 4),
        window_size=5,
        mlp_ratio=3.0,
        drop_rate=0.1,
        drop_path_rate=0.3,
        ape=True,
        patch_norm=False,
        use_checkpoint=True,
    )
    assert repr(model) == repr(expected) and model.layers[0].use_checkpoint
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    assert shapes == [(name, value.shape) for name, value in expected.named_parameters()]


def test_attention_keys_have_no_effect_and_warn(caplog):
    get_config(None, ["MODEL.TYPE", "swin_mlp", "MODEL.NUM_CLASSES", 10, "MODEL.ATTN", "sdpa"])
    assert len(caplog.messages) == 1 and "MODEL.ATTN has no effect here: Swin-MLP has no attention" in caplog.text
