"""The attention operation against its definition, every implementation alike; and the geometry of shifted windows."""

import itertools
import logging

import pytest
import torch
from torch import Tensor

from models import ops
from models.window import ShiftedWindows, attention_mask, cyclic_shift, partition, relative_position_index, reverse

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
IMPLEMENTATIONS = sorted(ops.IMPLEMENTATIONS)
# Largest error allowed beside float64, for values of order 1: some units in the last place of each type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2}


def inputs(dtype: torch.dtype, masked: bool, device: str, shape=(2, 4, 3, 9, 8)) -> dict:
    """q, k, v as an unsplit projection lays them out, a bias, a mask that leaves every token itself, a gradient."""
    B, nW, nH, N, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(B, nW, N, 3, nH, d, generator=generator).permute(3, 0, 1, 4, 2, 5)
    bias = torch.randn(nH, N, N, generator=generator)
    apart = (torch.rand(nW, N, N, generator=generator) < 0.5) & ~torch.eye(N, dtype=torch.bool)
    mask = torch.zeros(nW, N, N).masked_fill(apart, -100.0) if masked else None
    gradient = torch.randn(B, nW, nH, N, d, generator=generator)
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "gradient": gradient}
    # Rounded to bfloat16 first, so that every type starts from the same numbers.
    return {n: t if t is None else t.bfloat16().to(device, dtype) for n, t in tensors.items()}


def spelled_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Equation 4 in another spelling than `reference.py`'s: by einsum, unseen keys left out of the sums."""
    weights = (torch.einsum("bwhnd,bwhmd->bwhnm", q, k) * scale + bias).exp()
    if mask is not None:
        weights = weights * (mask == 0).unsqueeze(1)
    return torch.einsum("bwhnm,bwhmd->bwhnd", weights, v) / weights.sum(-1, keepdim=True)


def output_and_gradients(function, given: dict, *arguments) -> list[Tensor]:
    leaves = [given[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "bias")]
    out = function(*leaves, given["mask"], *arguments)
    return [out, *torch.autograd.grad(out, leaves, given["gradient"])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_and_gradients(impl: str, dtype: torch.dtype, masked: bool, device: str):
    scale = 8**-0.5
    expected = output_and_gradients(spelled_out, inputs(torch.float64, masked, device), scale)
    found = output_and_gradients(ops.window_attention, inputs(dtype, masked, device), scale, 0.0, impl)
    for name, right, value in zip(("output", "q", "k", "v", "bias"), expected, found, strict=True):
        assert value.dtype == dtype
        size = right.abs().max().clamp(min=1)  # gradients of the bias are sums over all windows
        error = ((value - right).abs().max() / size).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inference_takes_views_as_they_lie(impl: str, masked: bool, device: str):
    """Without gradients another kernel may be at work; it must read the strided views of a projection all the same."""
    given = inputs(torch.float32, masked, device)
    assert not given["q"].is_contiguous()
    arguments = [given[name] for name in ("q", "k", "v", "bias", "mask")]
    with torch.no_grad():
        found = ops.window_attention(*arguments, 0.3, impl=impl)
    torch.testing.assert_close(found, spelled_out(*arguments, 0.3), atol=5e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_is_of_the_weights(impl: str):
    """With keys all alike and values of ones, an output is the share of weights kept, over the share expected."""
    q = torch.zeros(8, 4, 2, 16, 4)
    torch.manual_seed(0)
    out = ops.window_attention(q, q, q + 1, torch.zeros(2, 16, 16), None, 1.0, 0.25, impl)
    kept = out[..., 0] * 0.75 * 16  # a number of weights for each of 1,024 queries
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    assert kept.unique().numel() > 3
    assert abs(kept.mean() / 16 - 0.75) < 0.015  # 4.4 standard deviations of 16,384 draws


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scores_are_added_and_normalised_in_float32(impl: str, gradients: bool):
    """All products are 64, where bfloat16 counts in steps of 0.25 to 0.5: added in bfloat16, the bias would be lost."""
    given = inputs(torch.bfloat16, False, "cpu")
    q = torch.full_like(given["q"], 8**0.5).requires_grad_(gradients)
    q64 = torch.zeros_like(q, dtype=torch.float64)  # a constant added to all scores changes nothing
    bias = given["bias"] / 8
    out = ops.window_attention(q, q, given["v"], bias, None, 8.0, impl=impl)
    expected = spelled_out(q64, q64, given["v"].double(), bias.double(), None, 1.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("impl", "device", "gradients", "chosen"),
    [
        ("auto", "cpu", False, "sdpa"),
        ("auto", "cpu", True, "reference"),
        ("auto", "cuda", True, "sdpa"),
        ("auto", "cuda", False, "sdpa"),
        ("auto", "meta", False, "reference"),
        ("reference", "cuda", True, "reference"),
        ("sdpa", "cpu", True, "sdpa"),
    ],
)
def test_choice(impl: str, device: str, gradients: bool, chosen: str):
    assert ops.choose(impl, device, gradients) == chosen


def test_choice_follows_the_need_for_gradients(monkeypatch):
    given = inputs(torch.float32, False, "cpu")
    arguments = [given[name] for name in ("q", "k", "v", "bias", "mask")]
    called = []
    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(ops.IMPLEMENTATIONS, name, lambda *_, name=name: called.append(name))
    ops.window_attention(*arguments, 1.0)
    given["bias"].requires_grad_()
    ops.window_attention(*arguments, 1.0)
    with torch.no_grad():
        ops.window_attention(*arguments, 1.0)
    assert called == ["sdpa", "reference", "sdpa"]


def test_choice_is_logged_once(caplog):
    ops._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    for _ in range(3):
        ops.choose("auto", "cpu", True)
    assert [record.getMessage() for record in caplog.records] == [
        "Window attention for training on cpu: reference (asked for: auto)"
    ]


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'triton'.*auto, reference, sdpa"):
        ops.choose("triton", "cpu", True)


def test_partition_is_row_by_row_and_reversible():
    x = torch.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    windows = partition(x, 3)
    assert windows.shape == (2, 6, 9, 2)
    for i, j in itertools.product(range(2), range(3)):
        square = x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].flatten(1, 2)
        assert torch.equal(windows[:, 3 * i + j], square)
    assert torch.equal(reverse(windows, 3, 6, 9), x)


def test_cyclic_shift_moves_up_and_left():
    x = torch.arange(4 * 5).reshape(1, 4, 5, 1)
    shifted = cyclic_shift(x, (1, 2))
    for i, j in itertools.product(range(4), range(5)):
        assert shifted[0, i, j] == x[0, (i + 1) % 4, (j + 2) % 5]


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_relative_position_index(window: int):
    index = relative_position_index(window)
    places = list(itertools.product(range(window), repeat=2))
    for (n, (i, j)), (m, (y, x)) in itertools.product(enumerate(places), repeat=2):
        assert index[n, m] == (i - y + window - 1) * (2 * window - 1) + (j - x + window - 1)


def neighbours(length: int, window: int, shift: int) -> list[list[int]]:
    """Groups of places on an axis that share a window: the axis is cut at shift, shift + window, … and never joined."""
    groups: dict[int, list[int]] = {}
    for place in range(length):
        groups.setdefault((place - shift) // window, []).append(place)
    return list(groups.values())


@pytest.mark.parametrize(
    ("height", "width", "window", "shifts"),
    [(8, 8, 4, (2, 2)), (6, 9, 3, (1, 1)), (10, 7, 4, (2, 2)), (7, 3, 4, (2, 0)), (3, 3, 4, (0, 0)), (5, 8, 5, (0, 2))],
)
def test_mask_against_pairs(height: int, width: int, window: int, shifts: tuple[int, int]):
    """For every pair of tokens that meet in a window: -100 exactly where they were no neighbours before the shift."""
    padded = [-(-length // window) * window for length in (height, width)]
    place = torch.full((1, *padded, 1), -1)
    place[0, :height, :width, 0] = torch.arange(height * width).reshape(height, width)
    meeting = partition(cyclic_shift(place, shifts), window)[0, :, :, 0]  # (nW, N): which token, -1 for padding
    down, right = neighbours(height, window, shifts[0]), neighbours(width, window, shifts[1])
    together = {
        (i * width + j, y * width + x)
        for rows, columns in itertools.product(down, right)
        for i, y in itertools.product(rows, repeat=2)
        for j, x in itertools.product(columns, repeat=2)
    }
    mask = attention_mask(height, width, window, shifts)
    assert mask.shape == (meeting.shape[0], window**2, window**2)
    pairs_seen = 0
    for w, n, m in itertools.product(*map(range, mask.shape)):
        one, other = meeting[w, n].item(), meeting[w, m].item()
        if one >= 0 and other >= 0:
            assert mask[w, n, m] == (0 if (one, other) in together else -100)
            pairs_seen += (one, other) in together
        elif one >= 0 or other >= 0:
            assert mask[w, n, m] == -100  # padding and image never meet
    assert pairs_seen == len(together)


def test_no_mask_where_none_is_needed():
    assert attention_mask(8, 4, 4, (0, 0)) is None


def test_every_row_of_the_mask_sees_something():
    assert (attention_mask(5, 3, 4, (2, 0)) == 0).any(-1).all()


@pytest.mark.parametrize("map_size", [(8, 8), (9, 5), (3, 12), (1, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_split_and_join_undo_each_other(map_size: tuple[int, int], shifted: bool):
    windows = ShiftedWindows((8, 8), 4, shifted)
    x = torch.randn(2, *map_size, 3)
    cut, mask = windows.split(x)
    assert cut.shape[2] == 16
    assert mask is None or mask.shape == (cut.shape[1], 16, 16)
    assert torch.equal(windows.join(cut, *map_size), x)


def test_window_shrinks_to_a_small_map():
    for side, expected in ((5, 5), (7, 7)):
        windows = ShiftedWindows((side, side), 7, shifted=True)
        assert (windows.window, windows.shifts(side, side), windows.attn_mask) == (expected, (0, 0), None)
    assert ShiftedWindows((8, 8), 7, shifted=True).shifts(8, 8) == (3, 3)


def test_no_shift_along_an_axis_of_one_window():
    windows = ShiftedWindows((14, 14), 7, shifted=True)
    assert windows.shifts(14, 7) == (3, 0)
    assert windows.shifts(5, 8) == (0, 3)
