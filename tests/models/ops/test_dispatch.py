"""Every implementation of window attention against the definition, and the geometry of shifted windows."""

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
    cyclic_shift,
    make_attn_mask,
    window_partition,
    window_reverse,
)
from tests._attention import TOLERANCE, AttentionCase, assert_matches_definition, attention_by_token
from tests._swin import small

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SPEC = AttentionSpec(
    "cpu", torch.float32, window=3, head_dim=16, cosine=False, gradients=True, dropout=False, cyclic=True
)
NO_NATIVE = native_attention.unsupported_reason(SPEC)
NATIVE = pytest.param("native", "cpu", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE))
IMPLEMENTATIONS = [  # implementation, device; the Triton kernels are in `test_triton_attention.py`
    *(("reference", "cpu"), ("sdpa", "cpu"), NATIVE),
    *(pytest.param(impl, "cuda", marks=GPU) for impl in ("reference", "sdpa")),
]
CASES = [
    AttentionCase(3, (6, 9), False),
    AttentionCase(3, (6, 9), True),
    AttentionCase(4, (8, 12), True, num_heads=3),
    AttentionCase(4, (4, 12), True),  # a single window along one axis
    AttentionCase(3, (9, 6), True, cosine=True),
]


def attend(impl: str):
    return functools.partial(ops.window_attention, impl=impl)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_values_and_gradients(impl: str, dtype: torch.dtype, case: AttentionCase, device: str):
    if impl == "native" and dtype == torch.float64:
        pytest.skip("the native code has no float64")
    assert_matches_definition(attend(impl), case, dtype, device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_inference(impl: str, case: AttentionCase, device: str):
    """Without gradients, PyTorch may use another kernel."""
    inputs = case.inputs(torch.float32, device)
    arguments = inputs["qkv"], inputs["bias"], case.windows(device), inputs.get("scale", 0.3)
    with torch.no_grad():
        actual = attend(impl)(*arguments)
    torch.testing.assert_close(actual, attention_by_token(*arguments), atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_dropout_drops_attention_weights(impl: str):
    """With equal keys and values of one, an output is the kept fraction of the weights over its expectation."""
    qkv = torch.zeros(8, 8, 8, 3, 2, 4)
    qkv[:, :, :, 2] = 1
    torch.manual_seed(0)
    out = ops.window_attention(qkv, torch.zeros(2, 16, 16), ShiftedWindows((8, 8), 4, False), 1.0, 0.25, impl)
    kept = out[..., ::4] * 0.75 * 16  # the number of kept weights for each of 1,024 queries
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    assert kept.unique().numel() > 3
    assert abs(kept.mean() / 16 - 0.75) < 0.015  # 4.4 standard deviations of 16,384 draws


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_softmax_and_bias_are_in_float32(impl: str, device: str, gradients: bool):
    """All products are 64, where bfloat16 has steps of 0.25 to 0.5: added in bfloat16, the bias would be lost."""
    case = AttentionCase(3, (6, 6), False)
    inputs = case.inputs(torch.bfloat16, device)
    qkv, bias = inputs["qkv"], inputs["bias"] / 8
    qkv[:, :, :, :2] = 4.0  # head_dim is 16, and 16 · 4 · 4 · 0.25 = 64
    without_products = qkv.double() * torch.tensor([0.0, 0, 1], device=device).view(3, 1, 1)
    # A constant added to all scores changes nothing.
    expected = attention_by_token(without_products, bias.double(), case.windows(device), 1.0)
    out = ops.window_attention(qkv.requires_grad_(gradients), bias, case.windows(device), 0.25, impl=impl)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=0)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "gradients", "supported", "expected"),
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
def test_selected_implementation(monkeypatch, caplog, impl, device, dtype, gradients, supported, expected):
    for name in ops.UNSUPPORTED_REASON:
        monkeypatch.setitem(ops.UNSUPPORTED_REASON, name, lambda spec: "" if supported else "it is a Tuesday")
    ops._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    spec = SPEC._replace(device=device, dtype=dtype, gradients=gradients)
    for _ in range(3):
        assert ops.select_implementation(impl, spec) == expected
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    infos = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    if device == "meta":
        assert not caplog.records
    else:
        purpose = "training" if gradients else "inference"
        start = f"Window attention for {purpose} on {device}: {expected} (requested: {impl}"
        assert len(infos) == 1 and infos[0].startswith(start)
        assert ("it is a Tuesday" in infos[0]) == (not supported)
    request_not_met = not supported and impl != "auto"
    assert len(warnings) == request_not_met
    if request_not_met:
        assert warnings[0] == (
            f"MODEL.ATTN {impl} is not supported: it is a Tuesday. Window attention is computed by {expected} instead."
        )


def test_selection_depends_on_gradients(monkeypatch):
    case = AttentionCase(3, (6, 6), True, head_dim=8)
    inputs = case.inputs(torch.float64)
    called = []
    monkeypatch.setattr(ops, "get_implementation", lambda name: lambda *_: called.append(name))
    ops.window_attention(inputs["qkv"], inputs["bias"], case.windows(), 1.0)
    inputs["bias"].requires_grad_()
    ops.window_attention(inputs["qkv"], inputs["bias"], case.windows(), 1.0)
    with torch.no_grad():
        ops.window_attention(inputs["qkv"], inputs["bias"], case.windows(), 1.0)
    assert called == ["sdpa", "reference", "sdpa"]


@pytest.mark.parametrize(("impl", "strict"), [("auto", False), ("auto", True), ("sdpa", False)])
def test_export_takes_the_reference(impl: str, strict: bool):
    """The exported graph contains no operator of this project and no fused attention."""
    model = small(attn=impl, window_size=3, depths=(2,), num_heads=(1,)).eval()  # shifted and padded
    images = torch.randn(1, 3, 16, 16)
    exported = torch.export.export(model, (images,), strict=strict)
    operators = {str(node.target) for node in exported.graph.nodes}
    assert not [name for name in operators if name.startswith("swin") or "scaled_dot_product" in name]
    torch.testing.assert_close(exported.module()(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", ["auto", "native", "sdpa"])
def test_export_to_onnx_by_tracing_takes_the_reference(impl: str, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert ops.select_implementation(impl, SPEC) != "reference" or NO_NATIVE  # not before something is traced
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert ops.select_implementation(impl, SPEC) == "reference"
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: False)
    assert ops.select_implementation(impl, SPEC) != "reference" or NO_NATIVE


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'flash'.*auto, reference, sdpa, triton, native"):
        ops.select_implementation("flash", SPEC)


def test_window_partition_is_row_by_row_and_reversible():
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


def axis_cells(length: int, window: int, shift: int) -> list[list[int]]:
    """Groups the positions of an axis by window, if the axis is cut at shift, shift + window, … and never wrapped."""
    cells: dict[int, list[int]] = {}
    for position in range(length):
        cells.setdefault((position - shift) // window, []).append(position)
    return list(cells.values())


@pytest.mark.parametrize(
    ("height", "width", "window", "shifts"),
    [(8, 8, 4, (2, 2)), (6, 9, 3, (1, 1)), (12, 8, 4, (2, 2)), (8, 4, 4, (2, 0)), (5, 10, 5, (0, 2))],
)
def test_mask_against_pairs(height: int, width: int, window: int, shifts: tuple[int, int]):
    """For every pair of tokens of a window: masked exactly if they were in different cells before the shift."""
    position = torch.arange(height * width).view(1, height, width, 1)
    tokens = window_partition(cyclic_shift(position, shifts), window)[0, :, :, 0]  # (nW, N)
    row_cells, column_cells = axis_cells(height, window, shifts[0]), axis_cells(width, window, shifts[1])
    visible_pairs = {
        (i * width + j, y * width + x)
        for rows, columns in itertools.product(row_cells, column_cells)
        for i, y in itertools.product(rows, repeat=2)
        for j, x in itertools.product(columns, repeat=2)
    }
    mask = make_attn_mask(height, width, window, shifts)
    assert mask.shape == (tokens.shape[0], window**2, window**2)
    num_visible = 0
    for w, n, m in itertools.product(*map(range, mask.shape)):
        first, second = tokens[w, n].item(), tokens[w, m].item()
        assert mask[w, n, m] == (0 if (first, second) in visible_pairs else -100)
        num_visible += (first, second) in visible_pairs
    assert num_visible == len(visible_pairs)


def test_no_mask_where_none_is_needed():
    assert make_attn_mask(8, 4, 4, (0, 0)) is None


@pytest.mark.parametrize("map_size", [(8, 8), (12, 8), (4, 12)])
@pytest.mark.parametrize("shifted", [False, True])
def test_join_undoes_split(map_size: tuple[int, int], shifted: bool):
    windows = ShiftedWindows((8, 8), 4, shifted)
    for channels in ((3,), (3, 2, 5)):
        x = torch.randn(2, *map_size, *channels)
        grid, mask = windows.split(x)
        assert grid.shape[3:] == (4, 4, *channels)
        assert mask is None or mask.shape == (grid.shape[1] * grid.shape[2], 16, 16)
        assert torch.equal(windows.join(grid, *map_size), x)


def test_padding_is_zeros_at_the_bottom_and_on_the_right():
    windows, x = ShiftedWindows((9, 9), 4, shifted=True), torch.randn(2, 5, 8, 3)
    padded = windows.pad(x)
    assert padded.shape == (2, 8, 8, 3) and torch.equal(padded[:, :5], x) and (padded[:, 5:] == 0).all()
    assert windows.pad(padded) is padded
    assert windows.attn_mask.shape == (9, 16, 16)  # of the expected map, padded


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_a_map_has_to_consist_of_whole_windows(impl: str, device: str):
    inputs = AttentionCase(3, (6, 7), True).inputs(torch.float32, device)
    with pytest.raises(ValueError, match="6 × 7 tokens does not consist of whole windows of 3"):
        attend(impl)(inputs["qkv"], inputs["bias"], AttentionCase(3, (6, 7), True).windows(device), 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
def test_keys_of_zero_have_finite_gradients(impl: str, device: str, dtype: torch.dtype):
    """A padded token has no key bias in V2: its cosines are 0. A gradient of 1e12 would overflow in float16."""
    case = AttentionCase(3, (3, 6), True, cosine=True)
    inputs = case.inputs(dtype, device)
    inputs["qkv"][:, 2, :, 1] = 0
    leaves = [inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_(), inputs["scale"].requires_grad_()]
    out = attend(impl)(leaves[0], leaves[1], case.windows(device), leaves[2])
    grad_qkv, *others = torch.autograd.grad(out, leaves, inputs["grad_out"])
    assert out.isfinite().all() and grad_qkv.isfinite().all() and all(g.isfinite().all() for g in others)
    assert (grad_qkv[:, 2, :, 1] == 0).all() and (grad_qkv[:, :2, :, 1] != 0).any()


def test_window_shrinks_to_a_small_map():
    for side, expected in ((5, 5), (7, 7)):
        windows = ShiftedWindows((side, side), 7, shifted=True)
        assert (windows.window, windows.shifts(side, side), windows.attn_mask) == (expected, (0, 0), None)
    assert ShiftedWindows((8, 8), 7, shifted=True).shifts(8, 8) == (3, 3)


def test_no_shift_along_an_axis_of_one_window():
    windows = ShiftedWindows((14, 14), 7, shifted=True)
    assert windows.shifts(14, 7) == (3, 0)
    assert windows.shifts(5, 8) == (0, 3)
