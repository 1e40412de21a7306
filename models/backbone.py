"""The network that every Swin is: patch embedding, stages of blocks, norm, pooling, classifier. What a block is, and
where the patch merging has its norm, is all that the variants differ in.

The names and the order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels. Token maps are (B, H, W, C).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.layers import PatchEmbed, PatchMerging, Stage, init_linear, resize_grid

# (stage from 0, its C, (H, W) of its map, whether this block's windows are shifted, its DropPath) to a block that maps
# (B, H, W, C) to (B, H, W, C).
MakeBlock = Callable[[int, int, tuple[int, int], bool, float], nn.Module]


class Backbone(nn.Module):
    """A Swin of any kind (Swin Transformer, section 3.1, figure 3).

    Args:
        make_block: makes one block, see `MakeBlock`; every second block of a stage is asked to be shifted.
        img_size: side of the images to expect, in pixels; others are padded as needed.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for none, the network then gives pooled features.
        embed_dim: C of the first stage; each further stage doubles it.
        depths: blocks of each stage.
        drop_rate: dropout after the embedding.
        drop_path_rate: share of samples for which the last block is skipped; rises linearly from 0 at the first.
        ape: whether a learnt absolute position embedding is added to the patches.
        patch_norm: whether a LayerNorm follows the patch embedding.
        use_checkpoint: compute the blocks' branches again in the backward pass instead of keeping what they computed.
        merging_norm_last: whether patch merging normalises what it gives (V2) or what it gets.
    """

    def __init__(
        self,
        make_block: MakeBlock,
        img_size: int,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        drop_rate: float,
        drop_path_rate: float,
        ape: bool,
        patch_norm: bool,
        use_checkpoint: bool,
        merging_norm_last: bool = False,
    ):
        super().__init__()
        self.depths = tuple(depths)
        side = -(-img_size // patch_size)  # of the token map, rounded up as the embedding pads
        self.map_size = (side, side)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, side * side, embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        else:
            self.absolute_pos_embed = None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        last_block = max(sum(depths) - 1, 1)
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            rates = [drop_path_rate * (sum(depths[:i]) + j) / last_block for j in range(depth)]
            blocks = [make_block(i, dim, (side, side), j % 2 == 1, rate) for j, rate in enumerate(rates)]
            downsample = PatchMerging(dim, merging_norm_last) if i < len(depths) - 1 else None
            self.layers.append(Stage(blocks, downsample, use_checkpoint))
            side = -(-side // 2)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to the first token map (B, H, W, C), with positions if they are learnt.

        Position embeddings learnt on another map are resampled bicubically.
        """
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            size = tuple(x.shape[1:3])
            x = x + resize_grid(self.absolute_pos_embed[0], self.map_size, size).unflatten(0, size)
        return self.pos_drop(x)

    def forward_features(self, x: Tensor, out_indices: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """What the stages make of images (B, in_chans, height, width).

        Args:
            out_indices: the stages wanted, counted from 0, as a pyramid for dense prediction; None for the last
                stage alone, normalised, as the classifier takes it.

        Returns:
            The last map (B, H, W, C); or, with `out_indices`, for each of them the map (B, C, H, W) before its patch
            merging and without a norm, of stride 4, 8, 16, 32 for stages 0 to 3 and patches of 4.

        Raises:
            ValueError: no such stage.
        """
        if out_indices is not None and not all(0 <= i < len(self.layers) for i in out_indices):
            raise ValueError(f"out_indices {tuple(out_indices)}: stages are counted from 0 to {len(self.layers) - 1}")
        x = self.embed(x)
        if out_indices is None:
            for layer in self.layers:
                _, x = layer(x)
            return self.norm(x)
        stages = []
        for layer in self.layers[: max(out_indices, default=-1) + 1]:
            features, x = layer(x)
            stages.append(features.permute(0, 3, 1, 2))
        return [stages[i] for i in out_indices]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, num_classes), or pooled features (B, C) without a head."""
        return self.head(self.forward_features(x).mean(dim=(1, 2)))

    def no_weight_decay(self) -> set[str]:
        """Parts of the names of the matrices that are exempt from weight decay."""
        return {"absolute_pos_embed"}

    @property
    def num_layer_ids(self) -> int:
        """How many different values `get_layer_id` has: the embedding, each block, and what follows the last."""
        return sum(self.depths) + 2

    def get_layer_id(self, name: str) -> int:
        """How deep the parameter `name` lies, from 0, for learning rates that fall towards the input."""
        parts = name.split(".")
        if parts[0] in ("absolute_pos_embed", "patch_embed"):
            return 0
        if parts[0] != "layers":
            return self.num_layer_ids - 1
        stage = int(parts[1])
        if parts[2] == "downsample":
            return sum(self.depths[: stage + 1])
        return sum(self.depths[:stage]) + int(parts[3]) + 1
