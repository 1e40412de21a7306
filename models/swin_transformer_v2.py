"""Swin Transformer V2 (Liu et al., 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution").

The differences from V1: norms after attention and MLP, cosine attention, and a position bias that an MLP computes from
the offset. Names and order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels, `M` side of a window, `N` tokens in a window, `nH` heads, `d` head
dimension.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import ShiftedWindowAttention
from models.backbone import Backbone, BlockSpec
from models.ops.dispatch import window_attention
from models.ops.reference import accumulate_dtype
from models.swin_transformer import SwinTransformerBlock

MAX_LOGIT_SCALE = 100.0  # the temperature does not fall below 0.01
CPB_HIDDEN_DIM = 512  # hidden width of the MLP that computes the position bias


def log_spaced_offsets(window: int, pretrained_window: int) -> Tensor:
    """Returns ((2·M-1)², 2): every offset (rows, columns) within a window, on the log scale of section 3.3, equation 4.

    Offsets are divided by the largest offset of `pretrained_window`, the window size of the pre-training (0: `window`),
    and multiplied by 8. A larger window then extends the learnt function instead of stretching it.
    """
    largest = max((pretrained_window or window) - 1, 1)  # a window of 1 has no offset but 0: avoids 0/0
    axis = torch.arange(1 - window, window, dtype=torch.float32) / largest * 8
    axis = axis.sign() * torch.log2(axis.abs() + 1) / math.log2(8)
    return torch.cartesian_prod(axis, axis)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Disables autocast; does nothing on the meta device, which has no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class CosineWindowAttention(ShiftedWindowAttention):
    """Window attention by cosines of queries and keys, with a continuous position bias (sections 3.2 and 3.3).

    Norms, temperature and softmax are computed in float32, under autocast too.

    Args:
        dim: C.
        num_heads: nH, a divisor of C.
        map_size, window, shifted, attn_drop, impl: see `ShiftedWindowAttention`.
        qkv_bias: whether the projections to queries and values have a bias; keys have none.
        proj_drop: dropout of the output.
        pretrained_window: see `log_spaced_offsets`.
    """

    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        window: int,
        shifted: bool,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        impl: str = "auto",
        pretrained_window: int = 0,
    ):
        super().__init__(num_heads, map_size, window, shifted, attn_drop, impl)
        window = self.windows.window  # may have shrunk to the map
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.register_buffer("relative_coords_table", log_spaced_offsets(window, pretrained_window), persistent=False)
        self.register_offsets()
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_HIDDEN_DIM), nn.ReLU(), nn.Linear(CPB_HIDDEN_DIM, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def relative_position_bias(self) -> Tensor:
        """Returns (nH, N, N), between 0 and 16: the MLP's output for the offset of each pair of tokens."""
        # Without autocast: these are few values, computed once a batch, and half precision would blur them.
        with _without_autocast(self.relative_coords_table.device.type):
            table = self.cpb_mlp(self.relative_coords_table)  # ((2·window-1)², nH)
        return 16 * self.gather_relative_bias(table.to(accumulate_dtype(table.dtype))).sigmoid()

    def attend(self, x: Tensor, dropout_p: float) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.unflatten_heads(F.linear(x, self.qkv.weight, bias))
        log_scale = self.logit_scale.to(accumulate_dtype(self.logit_scale.dtype))
        scale = log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp().flatten()  # (nH,)
        return window_attention(qkv, self.relative_position_bias(), self.windows, scale, dropout_p, self.impl)


class SwinTransformerV2Block(SwinTransformerBlock):
    """V1's block with each LayerNorm at the end of its branch, so that activations do not grow with depth (section 3.2,
    figure 1). Their weights start at zero, so each residual branch starts at zero.
    """

    def __init__(self, spec: BlockSpec, attention: ShiftedWindowAttention):
        super().__init__(spec, attention)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.norm1(self.attn(x)), recompute)
        return self.drop_path(x, lambda x: self.norm2(self.mlp(x, recompute)), recompute)


class SwinTransformerV2(Backbone):
    """V2, a network of `SwinTransformerV2Block`.

    Args:
        img_size, window_size: see `models.backbone.Backbone`.
        qkv_bias: whether the projections to queries and values have a bias.
        attn_drop_rate: dropout of the attention weights.
        attn: implementation of attention, see `models.ops.dispatch.window_attention`.
        pretrained_window_sizes: window size of the pre-training, per stage, in tokens; 0 for `window_size`. Empty for 0
            in all stages.
        **backbone: see `models.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        img_size: int = 256,
        window_size: int = 8,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        attn: str = "auto",
        pretrained_window_sizes: Sequence[int] = (),
        **backbone: Any,
    ):
        def make_block(spec: BlockSpec) -> SwinTransformerV2Block:
            attention = CosineWindowAttention(
                spec.dim,
                spec.num_heads,
                spec.map_size,
                spec.window_size,
                shifted=spec.shifted,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=spec.drop_rate,
                impl=attn,
                pretrained_window=pretrained_window_sizes[spec.stage] if pretrained_window_sizes else 0,
            )
            return SwinTransformerV2Block(spec, attention)

        super().__init__(make_block, img_size=img_size, window_size=window_size, merging_norm_last=True, **backbone)

    def no_weight_decay(self) -> set[str]:
        """Returns parts of the names of the matrices that are exempt from weight decay."""
        return super().no_weight_decay() | {"cpb_mlp", "logit_scale"}
