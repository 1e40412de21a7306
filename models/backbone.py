"""The network that all Swins share: patch embedding, stages of blocks, norm, pooling, classifier.

The variants differ in their blocks and in where patch merging has its norm. Names and order of the parameters are those
of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels, `nH` heads. Token maps are (B, H, W, C).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast, overload

import torch
from torch import Tensor, nn

from models.layers import PatchEmbed, PatchMerging, Stage, init_linear, resize_grid
from models.trainable import TrainableModel


@dataclass(frozen=True)
class BlockSpec:
    """The place of a block in the network, and its sizes.

    Attributes:
        stage: index of its stage, from 0.
        dim: C.
        num_heads: nH.
        map_size: (H, W) of its token map, for images of the expected size.
        window_size: side of a window, in tokens.
        shifted: whether its windows are shifted: in every second block of a stage.
        mlp_ratio: width of the MLP over C.
        drop_rate: dropout of the MLP and of the attention's output.
        drop_path_rate: stochastic depth of this block.
        drop_path_skip: see `models.layers.DropPath`.
    """

    stage: int
    dim: int
    num_heads: int
    map_size: tuple[int, int]
    window_size: int
    shifted: bool
    mlp_ratio: float
    drop_rate: float
    drop_path_rate: float
    drop_path_skip: bool


class Backbone(TrainableModel):
    """A Swin of any kind (Swin Transformer, section 3.1, figure 3).

    Args:
        make_block: builds a block that maps (B, H, W, C) to (B, H, W, C).
        img_size: expected side of the images, in pixels; images of other sizes are padded as needed.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for no classifier: the network then returns pooled features.
        embed_dim: C of the first stage; each further stage doubles it.
        depths: number of blocks, per stage.
        num_heads: number of heads, per stage.
        window_size: side of a window, in tokens.
        mlp_ratio: width of the MLP over C.
        drop_rate: dropout after the embedding, of the attention's output and in the MLP.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 at the first.
        drop_path_skip: see `models.layers.DropPath`.
        ape: whether a learnt absolute position embedding is added to the patches.
        patch_norm: whether a LayerNorm follows the patch embedding.
        use_checkpoint: recompute the branches of the blocks in the backward pass instead of keeping their activations.
        merging_norm_last: whether patch merging normalizes its output (V2) or its input.
    """

    def __init__(
        self,
        make_block: Callable[[BlockSpec], nn.Module],
        *,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_skip: bool = False,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        merging_norm_last: bool = False,
    ):
        super().__init__()
        self.depths = tuple(depths)
        self.num_layer_ids = sum(depths) + 2  # the embedding, each block, and the layers after the last block
        side = -(-img_size // patch_size)  # of the token map; rounded up, because the embedding pads
        self.map_size = (side, side)
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, side * side, embed_dim)) if ape else None
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        stages = []
        last_block = max(sum(depths) - 1, 1)
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                make_block(
                    BlockSpec(
                        stage=i,
                        dim=dim,
                        num_heads=num_heads[i],
                        map_size=(side, side),
                        window_size=window_size,
                        shifted=j % 2 == 1,
                        mlp_ratio=mlp_ratio,
                        drop_rate=drop_rate,
                        drop_path_rate=drop_path_rate * (sum(depths[:i]) + j) / last_block,
                        drop_path_skip=drop_path_skip,
                    )
                )
                for j in range(depth)
            ]
            downsample = PatchMerging(dim, merging_norm_last) if i < len(depths) - 1 else None
            stages.append(Stage(blocks, downsample, use_checkpoint))
            side = -(-side // 2)
        self.layers = cast(Sequence[Stage], nn.ModuleList(stages))  # whose own type is one of any modules
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def blocks(self) -> Iterator[nn.Module]:
        """Iterates over the blocks of all stages, from the input to the output."""
        for stage in self.layers:
            yield from stage.blocks

    def embed(self, x: Tensor) -> Tensor:
        """Maps images (B, in_chans, height, width) to the first token map (B, H, W, C), absolute positions included.

        The position embedding is resampled bicubically for a map of another size.
        """
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + resize_grid(self.absolute_pos_embed[0], self.map_size, size).unflatten(0, size)
        return self.pos_drop(x)

    @overload
    def forward_features(self, x: Tensor, out_indices: None = None) -> Tensor: ...

    @overload
    def forward_features(self, x: Tensor, out_indices: Sequence[int]) -> list[Tensor]: ...

    def forward_features(self, x: Tensor, out_indices: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """Computes the feature maps of images (B, in_chans, height, width).

        Args:
            out_indices: the stages to return, from 0, as a pyramid for dense prediction; None for the normalized map
                of the last stage, the input of the pooling and the classifier.

        Returns:
            The last map (B, H, W, C); or, for each of `out_indices`, the map (B, C, H, W) before patch merging and
            without a norm, of stride 4, 8, 16, 32 for stages 0 to 3 and patches of 4.

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
        """Maps images (B, in_chans, height, width) to logits (B, num_classes), without a head to features (B, C)."""
        return self.head(self.forward_features(x).mean(dim=(1, 2)))

    def no_weight_decay(self) -> set[str]:
        """Returns parts of the names of the matrices that are exempt from weight decay."""
        return {"absolute_pos_embed"}

    def get_layer_id(self, name: str) -> int:
        """Returns the depth of the parameter `name`, from 0, for layer-wise learning-rate decay."""
        parts = name.split(".")
        if parts[0] in ("absolute_pos_embed", "patch_embed"):
            return 0
        if parts[0] != "layers":
            return self.num_layer_ids - 1
        stage = int(parts[1])
        if parts[2] == "downsample":
            return sum(self.depths[: stage + 1])
        return sum(self.depths[:stage]) + int(parts[3]) + 1
