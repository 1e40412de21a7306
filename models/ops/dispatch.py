"""Window attention as one operation with several implementations behind one signature.

`reference.py` defines what is right; every other implementation is tested against it, values and gradients.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows of an image, `M` side of a window, `N` tokens in a
window, `nH` heads, `d` head width.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from models.ops import native_attention, reference, sdpa, triton_check
from models.ops.spec import AttentionSpec
from models.ops.window import ShiftedWindows

log = logging.getLogger(__name__)

CHOICES = ("auto", "reference", "sdpa", "triton", "native")
UNSUPPORTED_REASON = {
    "triton": triton_check.unsupported_reason,
    "native": native_attention.unsupported_reason,
}  # of those that cannot do every case


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    windows: ShiftedWindows,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """SoftMax(q kᵀ · scale + bias + mask) v in every window (Swin Transformer, section 3.2, equation 4).

    Cutting the map into windows, shifting it, masking and putting it together again are part of the operation, so that
    an implementation may do without moving anything for them.

    Args:
        qkv: (B, H, W, 3, nH, d), queries, keys and values of the map's tokens as the projection lays them out. Places
            that are added to fill a window are no tokens: what is written there is not seen by any.
        bias: (nH, N, N), the relative position bias, one for all windows.
        windows: how the map is cut; the mask adds 0 where a query may see a key and -100 where it may not.
        scale: the factor of the products q kᵀ; or (nH,), one for each head, of the cosines of the angles between
            queries and keys (Swin Transformer V2, section 3.3, equation 2).
        dropout_p: the share of attention weights set to zero; 0 outside of training.
        impl: "auto", the fastest on this device, or the name of an implementation, one of CHOICES.

    Returns:
        (B, H, W, C) in the type of qkv, C = nH · d. Norms and softmax are computed in float32, or float64 where the
        input is.

    Raises:
        ValueError: no implementation of that name.
    """
    needs_gradients = torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)
    chosen = choose(
        impl,
        qkv.device.type,
        qkv.dtype,
        windows.window,
        qkv.shape[-1],
        cosine=isinstance(scale, Tensor),
        gradients=needs_gradients,
        dropout=dropout_p > 0,
        cyclic=windows.cyclic,
    )
    return implementation(chosen)(qkv, bias, windows, scale, dropout_p)


def implementation(name: str) -> Callable[[Tensor, Tensor, ShiftedWindows, float | Tensor, float], Tensor]:
    """The function of the implementation `name`: `window_attention` without the choice."""
    if name == "triton":
        from models.ops import triton_attention  # Triton takes its time, and exists on Linux only

        return triton_attention.window_attention
    return {"reference": reference, "sdpa": sdpa, "native": native_attention}[name].window_attention


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing, so that its log line is not lost
def choose(
    impl: str,
    device: str,
    dtype: torch.dtype,
    window: int,
    width: int,
    cosine: bool,
    gradients: bool,
    dropout: bool,
    cyclic: bool,
) -> str:
    """The name of the implementation that `impl` means for a `Case`. Each answer is logged once.

    `auto` is the Triton kernels on CUDA in half precision, chosen by the bytes that each path moves (docs/reports/STEP.md), and
    the native code on the CPU; where these cannot do the case, or fail their own test, SDPA, or the reference where
    gradients are needed on the CPU: PyTorch's fused kernel has none for the bias there and takes a slower path. On the
    meta device, where operations are counted, the reference shows each product.

    Raises:
        ValueError: `impl` is not one of CHOICES.
    """
    if impl not in CHOICES:
        raise ValueError(f"unknown attention implementation {impl!r}; choose from {', '.join(CHOICES)}")
    case = AttentionSpec(device, dtype, window, width, cosine, gradients, dropout, cyclic)
    if device == "meta":
        return "sdpa" if impl == "sdpa" else "reference"
    plain = "reference" if device == "cpu" and gradients else "sdpa"  # can do every case
    best = {"cuda": "triton", "cpu": "native"}.get(device, plain)
    if impl == "auto" and (best != "triton" or dtype in (torch.bfloat16, torch.float16)):
        chosen = best
    else:
        chosen = plain if impl == "auto" else impl
    reason = UNSUPPORTED_REASON[chosen](case) if chosen in UNSUPPORTED_REASON else ""
    if reason:
        reason, chosen = f"{chosen} cannot: {reason}", plain
        if impl != "auto":
            _log_once(logging.WARNING, f"MODEL.ATTN {reason}. Window attention is computed by {plain} instead.")
    purpose = "training" if gradients else "inference"
    asked = f"asked for: {impl}; {reason}" if reason else f"asked for: {impl}"
    _log_once(logging.INFO, f"Window attention for {purpose} on {device}: {chosen} ({asked})")
    return chosen


@functools.cache
def _log_once(level: int, message: str) -> None:
    log.log(level, message)
