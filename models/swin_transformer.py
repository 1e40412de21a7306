"""Swin Transformer V1 (Liu et al., 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows").

The names and the order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels. Token maps are (B, H, W, C).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention import WindowAttention
from models.backbone import Backbone
from models.layers import DropPath, Mlp


class SwinTransformerBlock(nn.Module):
    """Window attention, then an MLP, each after a LayerNorm and around a shortcut (section 3.2, equation 3)."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.attn(self.norm1(x)), recompute)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x), recompute), recompute)


class SwinTransformer(Backbone):
    """V1 and the ablations of its Table 4 (section 3, figure 3, table 7).

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depths, drop_path_rate, ape, patch_norm,
            use_checkpoint: see `Backbone`.
        num_heads: heads of each stage.
        window_size: side of a window, in tokens.
        mlp_ratio: width of the MLP over C.
        qkv_bias, qk_scale, relative: see `WindowAttention`.
        drop_rate: dropout after the embedding, the attention's output and in the MLP.
        attn_drop_rate: dropout of the attention weights.
        attn: how attention is computed, see `models.ops.dispatch.window_attention`.
        shift: whether every second block shifts its windows.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        attn: str = "auto",
        shift: bool = True,
        relative: str = "added",
    ):
        def make_block(
            stage: int, dim: int, map_size: tuple[int, int], shifted: bool, drop_path: float
        ) -> SwinTransformerBlock:
            attention = WindowAttention(
                dim,
                num_heads[stage],
                map_size,
                window_size,
                shifted=shifted and shift,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                impl=attn,
                relative=relative,
            )
            return SwinTransformerBlock(dim, attention, mlp_ratio, drop_rate, drop_path)

        super().__init__(
            make_block, img_size, patch_size, in_chans, num_classes, embed_dim, depths, drop_rate, drop_path_rate, ape,
            patch_norm, use_checkpoint,
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        """Parts of the names of the matrices that are exempt from weight decay."""
        return super().no_weight_decay() | {"relative_position_bias_table"}
