"""Window attention as one operation with several implementations behind one signature.

`reference.py` is the definition; tests compare every other implementation with it, values and gradients.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows of an image, `M` side of a window, `N` tokens in a
window, `nH` heads, `d` head dimension.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.ops import native_attention, reference, sdpa, triton_check
from models.ops.spec import AttentionSpec
from models.ops.window import ShiftedWindows
from utils.config.rules import CHOICES

log = logging.getLogger(__name__)

IMPLEMENTATIONS = CHOICES["MODEL.ATTN"]
UNSUPPORTED_REASON: dict[str, Callable[[AttentionSpec], str]] = {  # only of those that do not support every spec
    "triton": triton_check.unsupported_reason,
    "native": native_attention.unsupported_reason,
}


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    windows: ShiftedWindows,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """SoftMax(q kᵀ · scale + bias + mask) v in every window (Swin Transformer, section 3.2, equation 4).

    The operation includes the cyclic shift, the partition into windows, the mask and the merge back into a map, so
    that an implementation can do these by index arithmetic, without copying.

    Args:
        qkv: (B, H, W, 3, nH, d), queries, keys and values in the layout of the projection. H and W are multiples of
            the window (`ShiftedWindows.pad`).
        bias: (nH, N, N), the relative position bias, one for all windows.
        windows: how the map is cut. The mask adds 0 where a query may see a key and -100 where it may not.
        scale: factor of the products q kᵀ; or (nH,), one factor per head of the cosines between queries and keys
            (Swin Transformer V2, section 3.3, equation 2).
        dropout_p: fraction of attention weights set to zero; 0 outside of training.
        impl: one of IMPLEMENTATIONS; "auto" for the fastest on this device.

    Returns:
        (B, H, W, C) in the dtype of qkv, C = nH · d. Norms and softmax are computed in float32, or in float64 for
        float64 inputs.

    Raises:
        ValueError: no implementation of that name; or H or W is not a multiple of the window.
    """
    height, width = qkv.shape[1:3]
    if height % windows.window or width % windows.window:
        raise ValueError(f"a map of {height} × {width} tokens does not consist of whole windows of {windows.window}")
    selected = _select(
        impl,
        device=qkv.device.type,
        dtype=qkv.dtype,
        window=windows.window,
        head_dim=qkv.shape[-1],
        cosine=isinstance(scale, Tensor),
        gradients=torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad),
        dropout=dropout_p > 0,
        cyclic=windows.cyclic,
    )
    return get_implementation(selected)(qkv, bias, windows, scale, dropout_p)


def get_implementation(name: str) -> Callable[[Tensor, Tensor, ShiftedWindows, float | Tensor, float], Tensor]:
    """Returns the function of an implementation: `window_attention` without `impl`."""
    if name == "triton":
        from models.ops import triton_attention  # Triton is slow to import, and exists on Linux only

        return triton_attention.window_attention
    return {"reference": reference, "sdpa": sdpa, "native": native_attention}[name].window_attention


def select_implementation(impl: str, spec: AttentionSpec) -> str:
    """Returns the name of the implementation to use. Each choice is logged once.

    `auto` is the Triton kernels on CUDA in half precision, chosen by the bytes that each path moves
    (docs/reports/STEP.md), and the native code on the CPU. Where these do not support `spec`, or fail their self-test,
    SDPA is used; on the CPU with gradients, the reference, because PyTorch's fused kernel has no gradient for the bias
    there and takes a slower path. On the meta device, where operations are counted, the reference shows each product.
    An export takes the reference whatever `impl` is, because other programs do not know the custom operators.

    Raises:
        ValueError: `impl` is not one of IMPLEMENTATIONS.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {impl!r}; choose from {', '.join(IMPLEMENTATIONS)}")
    device = spec.device
    if device == "meta":
        return "sdpa" if impl == "sdpa" else "reference"
    if is_exporting():
        _log_once(logging.INFO, f"Window attention for export: reference (requested: {impl})")
        return "reference"
    fallback = "reference" if device == "cpu" and spec.gradients else "sdpa"  # these support every spec
    fastest = {"cuda": "triton", "cpu": "native"}.get(device, fallback)
    if fastest == "triton" and spec.dtype not in (torch.bfloat16, torch.float16):
        fastest = fallback
    selected = fastest if impl == "auto" else impl
    request = f"requested: {impl}"
    reason = UNSUPPORTED_REASON[selected](spec) if selected in UNSUPPORTED_REASON else ""
    if reason:
        request = f"{request}; {selected} is not supported: {reason}"
        if impl != "auto":
            _log_once(
                logging.WARNING,
                f"MODEL.ATTN {impl} is not supported: {reason}. Window attention is computed by {fallback} instead.",
            )
        selected = fallback
    purpose = "training" if spec.gradients else "inference"
    _log_once(logging.INFO, f"Window attention for {purpose} on {device}: {selected} ({request})")
    return selected


def is_exporting() -> bool:
    """Returns whether the model is being traced by `torch.export` or `torch.onnx.export`."""
    # Without tracing, torch.onnx is not asked: its first answer imports the exporter.
    return torch.compiler.is_exporting() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing, so that its log line is not lost
def _select(impl: str, **fields: Any) -> str:
    """Calls `select_implementation` with an AttentionSpec of `fields`, which Dynamo cannot build while tracing."""
    return select_implementation(impl, AttentionSpec(**fields))


@functools.cache
def _log_once(level: int, message: str) -> None:
    log.log(level, message)
