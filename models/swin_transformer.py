"""Swin Transformer V1 (Liu et al., 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows").

Names and order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels. Token maps are (B, H, W, C).
"""

from typing import Any

from torch import Tensor, nn

from models.attention import ShiftedWindowAttention, WindowAttention
from models.backbone import Backbone, BlockSpec
from models.layers import DropPath, Mlp


class SwinTransformerBlock(nn.Module):
    """Window attention, then an MLP, each after a LayerNorm and with a shortcut (section 3.2, equation 3)."""

    def __init__(self, spec: BlockSpec, attention: ShiftedWindowAttention):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim)
        self.attn = attention
        self.drop_path = DropPath(spec.drop_path_rate, spec.drop_path_skip)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, int(spec.dim * spec.mlp_ratio), spec.drop_rate)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.attn(self.norm1(x)), recompute)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x), recompute), recompute)


class SwinTransformer(Backbone):
    """V1 and the ablations of its Table 4 (section 3, figure 3, table 7).

    Args:
        qkv_bias, qk_scale, relative: see `models.attention.WindowAttention`.
        attn_drop_rate: dropout of the attention weights.
        attn: implementation of attention, see `models.ops.dispatch.window_attention`.
        shift: whether every second block shifts its windows.
        **backbone: see `models.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        attn: str = "auto",
        shift: bool = True,
        relative: str = "bias",
        **backbone: Any,
    ):
        def make_block(spec: BlockSpec) -> SwinTransformerBlock:
            attention = WindowAttention(
                spec.dim,
                spec.num_heads,
                spec.map_size,
                spec.window_size,
                shifted=spec.shifted and shift,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                proj_drop=spec.drop_rate,
                impl=attn,
                relative=relative,
            )
            return SwinTransformerBlock(spec, attention)

        super().__init__(make_block, **backbone)

    def no_weight_decay(self) -> set[str]:
        """Returns parts of the names of the matrices that are exempt from weight decay."""
        return super().no_weight_decay() | {"relative_position_bias_table"}
