"""benchmarks/attention_variants.py: each variant computes what it claims to."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from benchmarks import paper
from benchmarks.attention_variants import (
    VARIANTS,
    PaddedWindows,
    PerformerAttention,
    SlidingWindowAttention,
    orthogonal_directions,
    replace_attention,
)
from models.attention import WindowAttention
from models.ops.window import ShiftedWindows
from tests._swin import small, spread


@pytest.mark.parametrize("size", [(48, 48), (44, 60), (16, 48), (31, 50)])
@pytest.mark.parametrize("window", [4, 5])
def test_padding_is_the_same_function_as_the_cyclic_shift(size: tuple[int, int], window: int):
    model = spread(small(img_size=48, window_size=window)).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = replace_attention(copy.deepcopy(model), "shifted window (cyclic)")(images)
        assert torch.equal(expected, model(images))
        found = replace_attention(copy.deepcopy(model), "shifted window (padding)")(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_padding_costs_a_window_more_along_each_axis():
    x = torch.randn(1, 56, 56, 2)
    cyclic, padded = ShiftedWindows((56, 56), 7, shifted=True), PaddedWindows((56, 56), 7, shifted=True)
    assert (cyclic.split(x)[0].shape[1:3], padded.split(x)[0].shape[1:3]) == ((8, 8), (9, 9))
    assert (cyclic.columns(56), padded.columns(56)) == (8, 9)
    assert torch.equal(padded.join(padded.split(x)[0], 56, 56), x)
    assert padded.margins(56, 56) == ((4, 3), (4, 3))
    unshifted = PaddedWindows((56, 56), 7, shifted=False)
    assert unshifted.split(x)[1] is None and unshifted.split(x)[0].shape[1:3] == (8, 8)


def test_disable_shift_is_the_ablation_without_shifting():
    model, ablation = spread(small()).eval(), small(shift=False).eval()
    ablation.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(replace_attention(model, "window (w/o shifting)")(images), ablation(images))


def sliding_window_by_hand(attention: WindowAttention, x: Tensor) -> Tensor:
    """(H, W, C) to (H, W, C), token by token: each attends to tokens at most half a window away."""
    height, width, dim = x.shape
    window = attention.windows.window
    q, k, v = attention.qkv(x).split(dim, dim=-1)
    out = torch.empty_like(x)
    reach = range(-(window // 2), window - window // 2)
    for i, j in itertools.product(range(height), range(width)):
        around = [(i + a, j + b) for a in reach for b in reach if 0 <= i + a < height and 0 <= j + b < width]
        rows, columns = torch.tensor(around).unbind(1)
        places = (i - rows + window - 1) * (2 * window - 1) + (j - columns + window - 1)
        for h, part in enumerate(torch.arange(dim).chunk(attention.num_heads)):
            scores = k[rows, columns][:, part] @ q[i, j, part] / math.sqrt(len(part))
            scores = scores + attention.relative_position_bias_table[places, h]
            out[i, j, part] = scores.softmax(0) @ v[rows, columns][:, part]
    return attention.proj(out)


@pytest.mark.parametrize("window", [3, 4, 7])
def test_sliding_window_attention_token_by_token(window: int):
    attention = spread(WindowAttention(8, 2, (9, 8), window, shifted=True))
    x = torch.randn(2, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack([sliding_window_by_hand(attention, one) for one in x])
        torch.testing.assert_close(SlidingWindowAttention(attention)(x), expected, atol=1e-5, rtol=0)


def test_performer_approaches_softmax_attention_over_the_whole_map():
    attention = spread(WindowAttention(16, 2, (6, 6), 3, shifted=True))
    x = 0.5 * torch.randn(2, 6, 6, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        q, k, v = attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        exact = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1) @ v
        exact = attention.proj(exact.transpose(1, 2).flatten(2).unflatten(1, (6, 6)))
        errors = [
            ((PerformerAttention(attention, features)(x) - exact).norm() / exact.norm()).item()
            for features in (8, 512, 32768)
        ]
    assert errors[2] < 0.015 < errors[1] < 0.1 < 0.2 < errors[0]  # attention alike to all tokens would be 0.24 off


def test_performer_features_are_as_many_as_stated_and_orthogonal():
    assert PerformerAttention(WindowAttention(96, 3, (14, 14), 7, False)).directions.shape == (110, 32)
    directions = orthogonal_directions(16 * 400, 16)
    block = directions[16:32]
    assert torch.allclose(block @ block.T, torch.diag(block.square().sum(1)), atol=1e-4)
    # No direction is preferred: the mean of 6,400 standard normal vectors, four standard errors.
    assert directions.mean(0).abs().max() < 4 / 80 and abs(directions.square().mean() - 1) < 0.02


def test_variants_are_the_rows_of_table_5_and_keep_the_parameters():
    assert set(VARIANTS) == set(paper.TABLE5) - {"sliding window (kernel)"}
    for variant in VARIANTS:
        model = small()
        names = {name: id(parameter) for name, parameter in model.named_parameters()}
        kept = {name: id(parameter) for name, parameter in replace_attention(model, variant).named_parameters()}
        lost = {name for name in names if "relative_position_bias_table" in name} if variant == "Performer" else set()
        assert kept == {name: names[name] for name in names if name not in lost}
