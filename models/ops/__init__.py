"""Window attention as one operation with several implementations behind one signature.

`reference.py` defines what is right; every other implementation is tested against it, values and gradients.
Shapes: `B` batch, `nW` windows of an image, `nH` heads, `N` tokens in a window, `d` head width.
"""

import functools
import logging

import torch
from torch import Tensor

from models.ops import reference, sdpa

log = logging.getLogger(__name__)

IMPLEMENTATIONS = {"reference": reference.window_attention, "sdpa": sdpa.window_attention}
CHOICES = ("auto", *IMPLEMENTATIONS)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """SoftMax(q kᵀ · scale + bias + mask) v in every window (Swin Transformer, section 3.2, equation 4).

    Args:
        q, k, v: (B, nW, nH, N, d), in any memory layout; the views of an unsplit projection are read as they lie.
        bias: (nH, N, N), the relative position bias, one for all windows.
        mask: (nW, N, N) or None, added like the bias: 0 where a query may see a key, -100 where it may not.
        scale: the factor of the products q kᵀ.
        dropout_p: the share of attention weights set to zero; 0 outside of training.
        impl: "auto", the fastest on this device, or the name of one of IMPLEMENTATIONS.

    Returns:
        (B, nW, nH, N, d) in the type of v; the softmax is computed in float32, or float64 where the input is.

    Raises:
        ValueError: no implementation of that name.
    """
    needs_gradients = torch.is_grad_enabled() and (q.requires_grad or bias.requires_grad)
    chosen = choose(impl, q.device.type, needs_gradients)
    return IMPLEMENTATIONS[chosen](q, k, v, bias, mask, scale, dropout_p)


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing, so that its log line is not lost
def choose(impl: str, device_type: str, needs_gradients: bool) -> str:
    """The name of the implementation that `impl` means on this device. Each answer is logged once.

    On the CPU the fused kernel has no gradient for the bias: PyTorch then takes a slower path than the reference.
    On the meta device, where operations are counted, the reference shows each product.
    """
    if impl not in CHOICES:
        raise ValueError(f"unknown attention implementation {impl!r}; choose from {', '.join(CHOICES)}")
    chosen = impl
    if impl == "auto":
        chosen = "reference" if device_type == "meta" or (device_type == "cpu" and needs_gradients) else "sdpa"
    if device_type != "meta":
        _log_once(impl, chosen, device_type, "training" if needs_gradients else "inference")
    return chosen


@functools.cache
def _log_once(impl: str, chosen: str, device_type: str, purpose: str) -> None:
    log.info("Window attention for %s on %s: %s (asked for: %s)", purpose, device_type, chosen, impl)
