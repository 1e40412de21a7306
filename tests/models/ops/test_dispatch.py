"""The attention operation against its definition, every implementation alike; and the geometry of shifted windows."""

import functools
import itertools
import logging

import pytest
import torch

from models.ops import dispatch as ops
from models.ops import native_attention
from models.ops.spec import AttentionSpec
from models.ops.window import (
    ShiftedWindows,
    attention_mask,
    cyclic_shift,
    relative_position_index,
    window_partition,
    window_reverse,
)
from tests._attention import TOLERANCE, Use, assert_right, spelled_out

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NO_NATIVE = native_attention.unsupported_reason(AttentionSpec("cpu", torch.float32, 3, 16, False, True, False, True))
NATIVE = pytest.param("native", "cpu", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE))
PLACES = [  # implementation, device; `test_triton.py` has the Triton kernels
    *(("reference", "cpu"), ("sdpa", "cpu"), NATIVE),
    *(pytest.param(impl, "cuda", marks=GPU) for impl in ("reference", "sdpa")),
]
USES = [
    Use(3, (6, 9), False),
    Use(3, (6, 9), True),
    Use(4, (7, 10), True, heads=3),  # padded
    Use(4, (3, 9), True),  # a single window along one axis, padded
    Use(3, (7, 6), True, cosine=True),
]


def attend(impl: str):
    return functools.partial(ops.window_attention, impl=impl)


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_values_and_gradients(impl: str, dtype: torch.dtype, use: Use, device: str):
    if impl == "native" and dtype == torch.float64:
        pytest.skip("the native code has no float64")
    assert_right(attend(impl), use, dtype, device)


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_inference(impl: str, use: Use, device: str):
    """Without gradients another kernel may be at work."""
    given = use.inputs(torch.float32, device)
    arguments = given["qkv"], given["bias"], use.windows(device), given.get("scale", 0.3)
    with torch.no_grad():
        found = attend(impl)(*arguments)
    torch.testing.assert_close(found, spelled_out(*arguments), atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_dropout_is_of_the_weights(impl: str):
    """With keys all alike and values of ones, an output is the share of weights kept, over the share expected."""
    qkv = torch.zeros(8, 8, 8, 3, 2, 4)
    qkv[:, :, :, 2] = 1
    torch.manual_seed(0)
    out = ops.window_attention(qkv, torch.zeros(2, 16, 16), ShiftedWindows((8, 8), 4, False), 1.0, 0.25, impl)
    kept = out[..., ::4] * 0.75 * 16  # a number of weights for each of 1,024 queries
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    assert kept.unique().numel() > 3
    assert abs(kept.mean() / 16 - 0.75) < 0.015  # 4.4 standard deviations of 16,384 draws


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_scores_are_added_and_normalised_in_float32(impl: str, device: str, gradients: bool):
    """All products are 64, where bfloat16 counts in steps of 0.25 to 0.5: added in bfloat16, the bias would be lost."""
    use = Use(3, (6, 6), False)
    given = use.inputs(torch.bfloat16, device)
    qkv, bias = given["qkv"], given["bias"] / 8
    qkv[:, :, :, :2] = 4.0  # 16 of them
    expected = spelled_out(qkv.double() * torch.tensor([0.0, 0, 1], device=device).view(3, 1, 1), bias.double(),
                           use.windows(device), 1.0)  # fmt: skip # a constant added to all scores changes nothing
    out = ops.window_attention(qkv.requires_grad_(gradients), bias, use.windows(device), 0.25, impl=impl)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=0)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "gradients", "able", "chosen"),
    [
        ("auto", "cpu", SINGLE, False, True, "native"),
        ("auto", "cpu", SINGLE, False, False, "sdpa"),
        ("auto", "cpu", HALF, True, False, "reference"),
        ("auto", "cuda", HALF, True, True, "triton"),
        ("auto", "cuda", HALF, True, False, "sdpa"),
        ("auto", "cuda", SINGLE, False, True, "sdpa"),
        ("auto", "meta", SINGLE, False, True, "reference"),
        ("triton", "meta", SINGLE, False, True, "reference"),
        ("triton", "cuda", SINGLE, False, True, "triton"),
        ("triton", "cpu", SINGLE, True, False, "reference"),
        ("native", "cpu", SINGLE, True, True, "native"),
        ("native", "cuda", SINGLE, True, False, "sdpa"),
        ("reference", "cuda", HALF, True, True, "reference"),
        ("sdpa", "cpu", DOUBLE, True, True, "sdpa"),
    ],
)
def test_choice(monkeypatch, caplog, impl, device, dtype, gradients, able, chosen):
    for name in ops.UNSUPPORTED_REASON:
        monkeypatch.setitem(ops.UNSUPPORTED_REASON, name, lambda case: "" if able else "it is a Tuesday")
    ops._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert ops.choose(impl, device, dtype, 7, 32, False, gradients, False, True) == chosen
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    if device == "meta":
        assert not caplog.records
    else:
        purpose = "training" if gradients else "inference"
        assert len(told) == 1 and told[0].startswith(f"Window attention for {purpose} on {device}: {chosen} (asked")
        assert ("it is a Tuesday" in told[0]) == (not able)
    asked_in_vain = not able and impl != "auto"
    assert len(warned) == asked_in_vain
    if asked_in_vain:
        assert warned[0] == (
            f"MODEL.ATTN {impl} cannot: it is a Tuesday. Window attention is computed by {chosen} instead."
        )


def test_choice_follows_the_need_for_gradients(monkeypatch):
    use = Use(3, (6, 6), True, width=8)
    given = use.inputs(torch.float64)
    called = []
    monkeypatch.setattr(ops, "implementation", lambda name: lambda *_: called.append(name))
    ops.window_attention(given["qkv"], given["bias"], use.windows(), 1.0)
    given["bias"].requires_grad_()
    ops.window_attention(given["qkv"], given["bias"], use.windows(), 1.0)
    with torch.no_grad():
        ops.window_attention(given["qkv"], given["bias"], use.windows(), 1.0)
    assert called == ["sdpa", "reference", "sdpa"]


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'flash'.*auto, reference, sdpa, triton, native"):
        ops.choose("flash", "cpu", SINGLE, 7, 32, False, True, False, True)


def test_partition_is_row_by_row_and_reversible():
    x = torch.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    windows = window_partition(x, 3)
    assert windows.shape == (2, 6, 9, 2)
    for i, j in itertools.product(range(2), range(3)):
        square = x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].flatten(1, 2)
        assert torch.equal(windows[:, 3 * i + j], square)
    assert torch.equal(window_reverse(windows, 3, 6, 9), x)


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
    meeting = window_partition(cyclic_shift(place, shifts), window)[0, :, :, 0]  # (nW, N): which token, -1 for padding
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
    for further in ((3,), (3, 2, 5)):
        x = torch.randn(2, *map_size, *further)
        cut, mask = windows.split(x)
        assert cut.shape[3:] == (4, 4, *further)
        assert mask is None or mask.shape == (cut.shape[1] * cut.shape[2], 16, 16)
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
