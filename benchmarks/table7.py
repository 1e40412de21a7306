"""Table 7: the architecture of Swin-T, S, B and L, read from the modules of the built models."""

import math

import torch
from torch import nn

from benchmarks.attention_variants import attention_of, build_swin
from benchmarks.paper import TABLE7, TABLE7_STAGES
from config import get_config
from models.layers import PatchEmbed, PatchMerging
from utils.paths import REPO_ROOT
from utils.table import Column, Table


def make_table() -> Table:
    columns = [Column("stage"), Column("rate (map)"), *(Column(name) for name in TABLE7), Column("as in the paper")]
    table = Table("table7", "Table 7: architecture", columns)
    built = {name: stages_of_model(recipe) for name, (recipe, _) in TABLE7.items()}
    for stage, (rate, side) in enumerate(TABLE7_STAGES):
        paper = {name: describe_stage(rate, side, 7, *rows[stage]) for name, (_, rows) in TABLE7.items()}
        here = {name: stages[stage] for name, stages in built.items()}
        rates = {rate_and_map for rate_and_map, _ in here.values()}
        same = "yes" if here == paper else "NO"
        table.rows.append([stage + 1, " ".join(sorted(rates)), *(blocks for _, blocks in here.values()), same])
    return table


def describe_stage(
    rate: int, side: int, window: int, concat: int, dim: int, blocks: int, heads: int
) -> tuple[str, str]:
    """The table's two cells for a stage: its downsampling rate and map, and its blocks."""
    cell = f"concat {concat}x{concat}, {dim}-d, LN; [win. sz. {window}x{window}, dim {dim}, head {heads}] x {blocks}"
    return f"{rate}x ({side}x{side})", cell


def stages_of_model(recipe: str) -> list[tuple[str, str]]:
    """`describe_stage` of each stage of the recipe's model, from the shapes of its modules alone."""
    config = get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")
    with torch.device("meta"):
        model = build_swin(config)
    stages, rate, width = [], 1, config.MODEL.SWIN.IN_CHANS
    embeddings: list[nn.Module | None] = [model.patch_embed, *(stage.downsample for stage in model.layers[:-1])]
    for embedding, stage in zip(embeddings, model.layers, strict=True):
        if isinstance(embedding, PatchEmbed):
            concat, dim = embedding.proj.kernel_size[0], embedding.proj.out_channels
        elif isinstance(embedding, PatchMerging):
            concat, dim = math.isqrt(embedding.reduction.in_features // width), embedding.reduction.out_features
        else:
            raise TypeError(f"{recipe}: a stage begins with {embedding}")
        attentions = [attention_of(block) for block in stage.blocks]
        if not isinstance(embedding.norm, nn.LayerNorm) or any(each.proj.in_features != dim for each in attentions):
            raise ValueError(f"{recipe}: a stage of {dim} channels is not built as the table describes stages")
        attention = attentions[0]
        rate, width = rate * concat, dim
        side, window = attention.windows.map_size[0], attention.windows.window
        stages.append(describe_stage(rate, side, window, concat, dim, len(stage.blocks), attention.num_heads))
    return stages
