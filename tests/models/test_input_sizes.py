"""Swin V1 on images of any size, against a network computed token by token, without windows."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.swin_transformer import SwinTransformer
from tests._swin import small, spread


def axis_cells(length: int, window: int, shift: int) -> Tensor:
    """Returns for each position of an axis the index of its window, if the axis is cut at shift, shift + window, …"""
    shift = shift if length > window else 0
    return torch.div(torch.arange(length) - shift, window, rounding_mode="floor")


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Appends zeros to the first two axes."""
    padded = x.new_zeros(-(-x.shape[0] // multiple) * multiple, -(-x.shape[1] // multiple) * multiple, x.shape[2])
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def attend_by_token(model: SwinTransformer, prefix: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """Computes attention of (H, W, C), for each token over the tokens in its window, including padding."""
    weights = dict(model.named_parameters())
    size = x.shape[:2]
    x = pad_to_multiple(x, window)
    height, width, dim = x.shape
    q, k, v = F.linear(x, weights[prefix + "qkv.weight"], weights[prefix + "qkv.bias"]).split(dim, dim=-1)
    table = weights[prefix + "relative_position_bias_table"]
    rows, columns = axis_cells(height, window, shift), axis_cells(width, window, shift)
    out = torch.empty_like(x)
    for i, j in itertools.product(range(height), range(width)):
        in_rows, in_columns = (rows == rows[i]).nonzero()[:, 0], (columns == columns[j]).nonzero()[:, 0]
        visible = in_rows.repeat_interleave(len(in_columns)), in_columns.repeat(len(in_rows))
        offsets = (i - visible[0] + window - 1) * (2 * window - 1) + (j - visible[1] + window - 1)
        bias = table[offsets]  # (tokens, heads)
        for h, part in enumerate(torch.arange(dim).chunk(heads)):
            scores = k[visible][:, part] @ q[i, j, part] / len(part) ** 0.5 + bias[:, h]
            out[i, j, part] = scores.softmax(0) @ v[visible][:, part]
    out = out[: size[0], : size[1]]
    return F.linear(out, weights[prefix + "proj.weight"], weights[prefix + "proj.bias"])


def network_by_token(
    model: SwinTransformer,
    image: Tensor,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    windows: tuple[int, ...],
) -> Tensor:
    """Computes the logits of an image (3, height, width) without windows and mask. `windows` is per stage."""
    weights = dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    pixels = pad_to_multiple(image.permute(1, 2, 0), 4)
    patches = pixels.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)  # (H, W, 3·4·4)
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    x = norm(x, "patch_embed.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            block, shift = f"layers.{i}.blocks.{j}.", j % 2 * (windows[i] // 2)
            attended = norm(x, block + "norm1")
            x = x + attend_by_token(model, block + "attn.", attended, num_heads[i], windows[i], shift)
            hidden = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
            x = x + linear(hidden, block + "mlp.fc2")
        if i < len(depths) - 1:
            x = pad_to_multiple(x, 2)
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], dim=-1)
            x = linear(norm(x, f"layers.{i}.downsample.norm"), f"layers.{i}.downsample.reduction")
    return linear(norm(x, "norm").flatten(0, 1).mean(0), "head")


@pytest.mark.parametrize("attn", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("img_size", "window", "windows", "size"),
    [
        (32, 4, (4, 4), (32, 32)),  # nothing to pad
        (32, 4, (4, 4), (32, 64)),  # not square, nothing to pad
        (32, 3, (3, 3), (32, 32)),  # the map of the expected size is not a multiple of the window
        (32, 4, (4, 4), (29, 45)),  # not a multiple of patch, merging or window
        (32, 4, (4, 4), (11, 50)),  # a single window along one axis
        (32, 4, (4, 4), (3, 5)),  # smaller than a window
        (30, 4, (4, 4), (30, 30)),  # the expected image is not a multiple of the patch
        (32, 7, (7, 4), (32, 32)),  # the window shrinks in the second stage
        (32, 7, (7, 4), (64, 40)),  # and stays small on a larger map
        (32, 1, (1, 1), (20, 16)),  # every token alone
    ],
)
def test_any_size_by_token(img_size: int, window: int, windows: tuple, size: tuple[int, int], attn: str):
    model = spread(small(img_size=img_size, window_size=window, attn=attn)).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = torch.stack([network_by_token(model, image, (2, 2), (2, 4), windows) for image in images])
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_result_does_not_depend_on_the_expected_size():
    """A mask computed at run time equals the buffer."""
    expected_64, expected_32 = spread(small(img_size=64)).eval(), spread(small(img_size=32)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(expected_32(images), expected_64(images))


def test_absolute_embedding_on_its_own_map_and_others():
    model, without = spread(small(ape=True)), small()
    without.load_state_dict({n: v for n, v in model.state_dict().items() if n != "absolute_pos_embed"})
    image = torch.randn(2, 3, 32, 32)
    added = model.embed(image) - without.embed(image)
    torch.testing.assert_close(added[0].flatten(0, 1), model.absolute_pos_embed[0], atol=1e-5, rtol=0)
    wide_image = torch.randn(1, 3, 32, 64)
    added = (model.embed(wide_image) - without.embed(wide_image))[0].permute(2, 0, 1)
    grid = model.absolute_pos_embed.reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 16), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)
