"""The native window attention on the CPU: tests beyond those of every implementation in `test_dispatch.py`."""

import functools
import logging
import subprocess
import sys

import pytest
import torch

from engine.setup import compile_in_place
from models.ops import dispatch as ops
from models.ops import native_attention
from models.ops.spec import AttentionSpec
from tests._attention import AttentionCase, assert_matches_definition, output_and_gradients
from tests._swin import assert_same_gradients, logits_and_gradients, small, spread
from tests._swin_v2 import small_v2, spread_v2
from utils import compile_native as building
from utils.paths import REPO_ROOT

SPEC = AttentionSpec("cpu", torch.float32, 7, 32, cosine=False, gradients=True, dropout=False, cyclic=True)
pytestmark = pytest.mark.skipif(
    bool(native_attention.unsupported_reason(SPEC)), reason=native_attention.unsupported_reason(SPEC)
)
attend = functools.partial(ops.window_attention, impl="native")

CASES = [  # head_dim 32 and 64 use pairs of bfloat16 on processors that have them; 48 and 16 use floats
    AttentionCase(7, (14, 7), False, head_dim=32),
    AttentionCase(7, (14, 21), True, head_dim=32, num_heads=3),
    AttentionCase(7, (7, 14), True, head_dim=64, cosine=True, num_heads=1),
    AttentionCase(8, (8, 16), True, head_dim=32, cosine=True),
    AttentionCase(12, (12, 24), True, head_dim=48, num_heads=1, batch_size=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, case: AttentionCase):
    assert_matches_definition(attend, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_for_any_number_of_threads(dtype: torch.dtype):
    case, results = AttentionCase(7, (28, 21), True, cosine=True, head_dim=32), []
    threads = torch.get_num_threads()
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            results.append(output_and_gradients(attend, case, dtype))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(value, result[name]) for name, value in results[0].items())


@pytest.mark.parametrize("cosine", [False, True])
def test_passes_opcheck(cosine: bool):
    qkv, bias = torch.randn(1, 6, 3, 3, 2, 16, requires_grad=True), torch.randn(2, 9, 9, requires_grad=True)
    scales = torch.rand(2, requires_grad=True) if cosine else None
    torch.library.opcheck(torch.ops.swin.native_attention.default, (qkv, bias, scales, 0.3, 3, 1, 0))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qkv": torch.zeros(1, 6, 6, 3, 2, 24)}, "qkv is torch.float32"),
        ({"qkv": torch.zeros(1, 6, 6, 2, 2, 16)}, "qkv is torch.float32"),
        ({"qkv": torch.zeros(1, 6, 6, 3, 2, 16, dtype=torch.float64)}, "qkv is torch.float64"),
        ({"bias": torch.zeros(1, 9, 9)}, r"bias is torch.float32 \(1, 9, 9\)"),
        ({"bias": torch.zeros(2, 9, 4)}, r"bias is torch.float32 \(2, 9, 4\)"),
        ({"bias": torch.zeros(2, 9, 9, dtype=torch.float64)}, "bias is torch.float64"),
        ({"head_scales": torch.zeros(3)}, r"head_scales is torch.float32 \(3,\)"),
        ({"window": 0}, "windows of 0"),
        ({"window": 33}, "windows of 33"),
        ({"shift_w": -1}, "shifted by 0 and -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, problem: str):
    """The C++ code trusts shapes: it would read or write past the end of a tensor."""
    arguments = {
        "qkv": torch.zeros(1, 6, 6, 3, 2, 16), "bias": torch.zeros(2, 9, 9), "head_scales": None, "scale": 1.0,
        "window": 3, "shift_h": 0, "shift_w": 0,
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=problem):
        native_attention.attend(**arguments)
    with pytest.raises(ValueError, match=problem):
        native_attention.attend_backward(grad_out=torch.zeros(1, 6, 6, 32), **arguments)


def test_a_gradient_that_does_not_fit_is_refused():
    qkv, bias = torch.zeros(1, 6, 6, 3, 2, 16), torch.zeros(2, 9, 9)
    for grad_out in (torch.zeros(1, 6, 6, 16), torch.zeros(1, 6, 6, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="grad_out is"):
            native_attention.attend_backward(grad_out, qkv, bias, None, 1.0, 3, 0, 0)


WITHOUT_MEMORY = """
import resource
import torch
from models.ops import native_attention

def arguments(window, head_dim):
    qkv, bias = torch.zeros(1, window, window, 3, 1, head_dim), torch.zeros(1, window**2, window**2)
    return qkv, bias, None, 1.0, window, 0, 0

torch.set_num_threads(1)
native_attention.attend(*arguments(4, 16))  # loads everything
large = arguments(32, 2048)  # 75 MB for the thread; bias and result have 12 MB
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (40 << 20), resource.RLIM_INFINITY))
native_attention.attend(*large)
"""


def test_without_memory_for_a_thread_it_raises():
    """In a new process: one that has run other tests may have freed enough memory."""
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    ran = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "MemoryError: not enough memory for the buffers of a thread" in ran.stderr


def test_large_scores():
    """The softmax subtracts the maximum: scores of thousands neither overflow nor vanish."""
    case = AttentionCase(4, (4, 8), False, head_dim=32)
    inputs = case.inputs(torch.float32)
    windows = case.windows()
    actual = attend(inputs["qkv"], inputs["bias"] * 2000, windows, 0.3)
    expected = attend(inputs["qkv"].double(), inputs["bias"].double() * 2000, windows, 0.3, impl="reference")
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_propagate(bad: float, dtype: torch.dtype):
    """A query that is not finite makes its own output NaN, and no other."""
    inputs = AttentionCase(4, (4, 8), False, head_dim=32, batch_size=1).inputs(dtype)
    inputs["qkv"][0, 1, 2, 0, 1] = bad
    out = attend(inputs["qkv"], inputs["bias"], AttentionCase(4, (4, 8), False).windows(), 0.3)
    assert out[0, 1, 2, 32:].isnan().all()
    assert out.isnan().sum() == 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"dtype": torch.float64}, "no torch.float64"),
        ({"window": 33}, "1089 tokens, more than 1024"),
        ({"head_dim": 24}, "head dimension is 24, not a multiple of 16"),
        ({"dropout": True}, "MODEL.ATTN_DROP_RATE"),
        ({"cyclic": False}, "cyclic shift"),
    ],
)
def test_unsupported_reason(change: dict, reason: str):
    assert reason in native_attention.unsupported_reason(SPEC._replace(**change))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Empties the cache folder and forgets the library of this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = building._load, native_attention.unsupported_reason
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("compiler", "reason"), [("false", "false fails")])
def test_without_a_compiler_falls_back_with_a_warning(compiler: str, reason: str, empty_cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    assert reason in native_attention.unsupported_reason(SPEC)
    assert not any(empty_cache.rglob("*.so"))
    ops._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert_matches_definition(attend, AttentionCase(3, (6, 9), True, head_dim=16), torch.float32)
    assert reason in caplog.text and "MODEL.ATTN native is not supported" in caplog.text


def models(version: int):
    """Returns two models with the same weights: the reference in float64, the native code in float32."""
    pair = []
    for attn in ("reference", "native"):
        arguments = {"window_size": 4, "embed_dim": 32, "depths": (2,), "num_heads": (1,), "attn": attn}
        pair.append(spread(small(**arguments)) if version == 1 else spread_v2(small_v2(**arguments), past_limit=2.0))
    return pair[0].double(), pair[1]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (28, 36)], ids=["whole", "padded"])
def test_whole_model(version: int, size: tuple[int, int]):
    """Logits and every gradient, with shifted blocks and padded maps."""
    reference_model, model = models(version)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(reference_model, images.double())
    logits, gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients, tolerance=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_whole_model_in_bfloat16(version: int):
    """Under autocast, errors against float64 are at most 1.2 times those of the reference, which rounds elsewhere."""
    reference_model, model = models(version)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(reference_model, images.double())
    errors = []
    for attn in ("native", "reference"):
        for block in model.blocks():
            block.attn.impl = attn
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = logits_and_gradients(model, images)
        name = (
            "layers.0.blocks.1.attn.relative_position_bias_table"
            if version == 1
            else "layers.0.blocks.1.attn.qkv.weight"
        )
        pairs = [(logits, expected), (gradients[name], expected_gradients[name])]
        errors.append([((actual - right).norm() / right.norm()).item() for actual, right in pairs])
    for native_error, reference_error in zip(*errors, strict=True):
        assert native_error < 1.2 * reference_error


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_compiled_with_fixed_weights(amp: bool):
    """Packed weights give the output of the plain model; after a change, compiling again packs the new ones."""
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
    assert torch.equal(infer(), packed)  # packed before the change, so it has no effect


@pytest.mark.slow
def test_compiled_training():
    """One graph that contains the operator: outputs and gradients equal those of the plain model."""
    _, model = models(1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(model, images)
    torch.compiler.reset()
    assert compile_in_place(model, torch.device("cpu"))
    logits, gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients, tolerance=2e-5)
