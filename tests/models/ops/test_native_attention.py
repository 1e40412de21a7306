"""The native code of window attention on the CPU: what `test_ops.py` does not ask of every implementation."""

import functools
import logging

import pytest
import torch

from engine.setup import compile_in_place
from models.ops import dispatch as ops
from models.ops import native_attention
from models.ops.spec import AttentionSpec
from tests._attention import Use, assert_right, results
from tests._swin import assert_same_gradients, logits_and_gradients, small, spread
from tests._swin_v2 import small_v2, spread_v2
from utils import compile_native as building

CASE = AttentionSpec("cpu", torch.float32, 7, 32, cosine=False, gradients=True, dropout=False, cyclic=True)
pytestmark = pytest.mark.skipif(
    bool(native_attention.unsupported_reason(CASE)), reason=native_attention.unsupported_reason(CASE)
)
attend = functools.partial(ops.window_attention, impl="native")

WIDE = [  # 32 and 64 wide, pairs of bfloat16 are multiplied where the processor can; 48 and 16 wide, floats
    Use(7, (14, 7), False, width=32),
    Use(7, (13, 9), True, width=32, heads=3),  # padded; an odd number of tokens, none of them a whole vector
    Use(7, (7, 14), True, width=64, cosine=True, heads=1),
    Use(8, (8, 16), True, width=32, cosine=True),
    Use(12, (12, 13), True, width=48, heads=1, images=1),
]


@pytest.mark.parametrize("use", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, use: Use):
    assert_right(attend, use, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(dtype: torch.dtype):
    use, found, threads = Use(7, (28, 21), True, cosine=True, width=32), [], torch.get_num_threads()
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(attend, use, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("cosine", [False, True])
def test_is_a_proper_operator(cosine: bool):
    qkv, bias = torch.randn(1, 6, 5, 3, 2, 16, requires_grad=True), torch.randn(2, 9, 9, requires_grad=True)
    scales = torch.rand(2, requires_grad=True) if cosine else None
    torch.library.opcheck(torch.ops.swin.native_attention.default, (qkv, bias, scales, 0.3, 3, 1, 1))


def test_scores_of_any_size():
    """The softmax is of differences: scores of thousands neither overflow nor vanish."""
    use = Use(4, (4, 8), False, width=32)
    given = use.inputs(torch.float32)
    windows = use.windows()
    found = attend(given["qkv"], given["bias"] * 2000, windows, 0.3)
    right = attend(given["qkv"].double(), given["bias"].double() * 2000, windows, 0.3, impl="reference")
    torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float, dtype: torch.dtype):
    """A query that is not finite spoils what it reads, and no other query's."""
    given = Use(4, (4, 8), False, width=32, images=1).inputs(dtype)
    given["qkv"][0, 1, 2, 0, 1] = bad
    out = attend(given["qkv"], given["bias"], Use(4, (4, 8), False).windows(), 0.3)
    assert out[0, 1, 2, 32:].isnan().all()
    assert out.isnan().sum() == 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"dtype": torch.float64}, "no torch.float64"),
        ({"window": 33}, "1089 tokens, more than 1024"),
        ({"width": 24}, "24 wide, not a multiple of 16"),
        ({"dropout": True}, "MODEL.ATTN_DROP_RATE"),
        ({"cyclic": False}, "cyclic shift"),
    ],
)
def test_says_what_it_cannot(change: dict, reason: str):
    assert reason in native_attention.unsupported_reason(CASE._replace(**change))


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """As if this process had no library yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = building._load, native_attention.unsupported_reason
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("compiler", "reason"), [("false", "false fails")])
def test_without_a_compiler_something_else_computes_and_says_so(
    compiler: str, reason: str, nothing_built, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    assert reason in native_attention.unsupported_reason(CASE)
    assert not any(nothing_built.rglob("*.so"))
    ops._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert_right(attend, Use(3, (6, 9), True, width=16), torch.float32)
    assert reason in caplog.text and "MODEL.ATTN native cannot" in caplog.text


def models(version: int):
    """Two with the same weights: by the reference in float64, by the native code in float32. One block is shifted."""
    pair = []
    for attn in ("reference", "native"):
        arguments = {"window_size": 4, "embed_dim": 32, "depths": (2,), "num_heads": (1,), "attn": attn}
        pair.append(spread(small(**arguments)) if version == 1 else spread_v2(small_v2(**arguments), past_limit=2.0))
    return pair[0].double(), pair[1]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (28, 36)], ids=["whole", "padded"])
def test_whole_model(version: int, size: tuple[int, int]):
    """Logits and every gradient, shifted blocks and maps that are padded included."""
    right, model = models(version)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(right, images.double())
    logits, gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients, tolerance=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_whole_model_in_bfloat16(version: int):
    """Under autocast it is no further from float64 than the reference is, but for a fifth: both round, elsewhere."""
    right, model = models(version)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(right, images.double())
    errors = []
    for attn in ("native", "reference"):
        for block in model.layers[0].blocks:
            block.attn.impl = attn
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = logits_and_gradients(model, images)
        table = (
            "layers.0.blocks.1.attn.relative_position_bias_table"
            if version == 1
            else "layers.0.blocks.1.attn.qkv.weight"
        )
        pairs = [(logits, expected), (gradients[table], expected_gradients[table])]
        errors.append([((found - wanted).norm() / wanted.norm()).item() for found, wanted in pairs])
    for native_error, reference_error in zip(*errors, strict=True):
        assert native_error < 1.2 * reference_error


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_compiled_with_fixed_weights(amp: bool):
    """Inference of packed weights is that of the plain model; compiled again after a change, it knows the new ones."""
    _, model = models(1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tolerance = 5e-2 if amp else 1e-4

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return model(images).float()

    model.eval()
    for seed in (0, 1):
        spread(model, seed)
        model._compiled_call_impl = None
        plain = infer()
        assert compile_in_place(model, torch.device("cpu"), fixed_weights=True)
        packed = infer()
        torch.testing.assert_close(packed, plain, atol=tolerance, rtol=0)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    assert torch.equal(infer(), packed)  # they were packed: what has become of them since counts for nothing


@pytest.mark.slow
def test_compiled_training():
    """One graph with the operator in it: outputs and gradients are those of the plain model."""
    _, model = models(1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(model, images)
    torch.compiler.reset()
    assert compile_in_place(model, torch.device("cpu"))
    logits, gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients, tolerance=2e-5)
