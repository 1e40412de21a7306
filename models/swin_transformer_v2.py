"""Swin Transformer V2 (Liu et al., 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution"): what differs from
V1. Norms after attention and MLP, cosine attention, and a position bias that is a function of the offset.

The names and the order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `C` channels, `nW` windows, `N` tokens in a window, `nH` heads, `d` head width.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import ShiftedWindowAttention
from models.backbone import Backbone
from models.ops.dispatch import window_attention
from models.ops.window import relative_position_index
from models.swin_transformer import SwinTransformerBlock

MAX_LOGIT_SCALE = 100.0  # the temperature does not fall below 0.01
HIDDEN = 512  # width of the MLP that gives the position bias


def log_spaced_offsets(window: int, pretrained_window: int) -> Tensor:
    """((2·window-1)², 2): every offset (down, right) within a window, on the log scale of section 3.3, equation 4.

    Offsets are measured in units of an eighth of the largest one of `pretrained_window`, the window that the weights
    were first trained with (0: this one), so that a larger window extends what was learnt instead of stretching it.
    """
    largest = max((pretrained_window or window) - 1, 1)  # a window of 1 has no offset but 0: no 0/0
    along = torch.arange(1 - window, window, dtype=torch.float32) / largest * 8
    along = along.sign() * torch.log2(along.abs() + 1) / math.log2(8)
    return torch.cartesian_prod(along, along)


def _full_precision(device_type: str) -> AbstractContextManager:
    """No autocast within; on the meta device, where operations are counted, there is none to begin with."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class CosineWindowAttention(ShiftedWindowAttention):
    """Window attention by the angle between queries and keys, with a continuous position bias (sections 3.2 and 3.3).

    Norms, temperature and softmax are computed in float32 also under autocast.

    Args:
        dim: C.
        num_heads: nH, a divisor of C.
        map_size, window, shifted, attn_drop, impl: see `ShiftedWindowAttention`.
        qkv_bias: whether the projections to queries and values have a bias; keys have none.
        proj_drop: dropout of the output.
        pretrained_window: see `log_spaced_offsets`.
    """

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
        window = self.windows.window  # downscale, perhaps
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.register_buffer("relative_coords_table", log_spaced_offsets(window, pretrained_window), persistent=False)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.cpb_mlp = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def relative_position_bias(self) -> Tensor:
        """(nH, N, N), between 0 and 16: the MLP's answer for each pair's offset."""
        # Few values, once a batch, and as sharp as they are learnt: not in the half precision of autocast.
        with _full_precision(self.relative_coords_table.device.type):
            table = self.cpb_mlp(self.relative_coords_table)  # ((2·window-1)², nH)
        return 16 * self.gather_relative_bias(table.to(torch.promote_types(table.dtype, torch.float32))).sigmoid()

    def attend(self, x: Tensor, dropout_p: float) -> Tensor:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.heads(F.linear(x, self.qkv.weight, bias))
        accumulate_dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        logit_scale = (
            self.logit_scale.to(accumulate_dtype).clamp(max=math.log(MAX_LOGIT_SCALE)).exp().flatten()
        )  # (nH,)
        return window_attention(qkv, self.relative_position_bias(), self.windows, logit_scale, dropout_p, self.impl)


class SwinTransformerV2Block(SwinTransformerBlock):
    """V1's block with each LayerNorm at the end of its branch (section 3.2, figure 1): amplitudes do not pile up."""

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.norm1(self.attn(x)), recompute)
        return self.drop_path(x, lambda x: self.norm2(self.mlp(x, recompute)), recompute)


class SwinTransformerV2(Backbone):
    """V2. A fresh one's branches begin at nothing: the norms that end them are zero.

    Args:
        pretrained_window_sizes: for each stage the window that the weights were first trained with, in tokens; 0 where
            it is the present one. Empty for 0 everywhere.
        All others: see `models.swin_transformer.SwinTransformer`.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        pretrained_window_sizes: Sequence[int] = (),
        attn: str = "auto",
    ):
        def make_block(
            stage: int, dim: int, map_size: tuple[int, int], shifted: bool, drop_path: float
        ) -> SwinTransformerV2Block:
            attention = CosineWindowAttention(
                dim,
                num_heads[stage],
                map_size,
                window_size,
                shifted,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                impl=attn,
                pretrained_window=pretrained_window_sizes[stage] if pretrained_window_sizes else 0,
            )
            return SwinTransformerV2Block(dim, attention, mlp_ratio, drop_rate, drop_path)

        super().__init__(
            make_block, img_size, patch_size, in_chans, num_classes, embed_dim, depths, drop_rate, drop_path_rate, ape,
            patch_norm, use_checkpoint, merging_norm_last=True,
        )  # fmt: skip
        for block in self.modules():
            if isinstance(block, SwinTransformerV2Block):
                nn.init.zeros_(block.norm1.weight)
                nn.init.zeros_(block.norm2.weight)

    def no_weight_decay(self) -> set[str]:
        """Parts of the names of the matrices that are exempt from weight decay."""
        return super().no_weight_decay() | {"cpb_mlp", "logit_scale"}
