"""Table 7: the architecture of Swin-T, S, B and L, read off the built models."""

import math

import torch
from torch import nn

from benchmarks.paper import TABLE7, TABLE7_STAGES
from config import get_config
from models.build import build_model
from utils.paths import REPO_ROOT
from utils.table import Column, Table


def make() -> Table:
    columns = [Column("stage"), Column("rate (map)"), *(Column(name) for name in TABLE7), Column("as in the paper")]
    table = Table("table7", "Table 7: architecture", columns)
    built = {name: read_off(recipe) for name, (recipe, _) in TABLE7.items()}
    for stage, (rate, side) in enumerate(TABLE7_STAGES):
        published = {name: say(rate, side, 7, *rows[stage]) for name, (_, rows) in TABLE7.items()}
        here = {name: rows[stage] for name, rows in built.items()}
        cells = [description for _, description in here.values()]
        places = {place for place, _ in here.values()}
        same = all(" ".join(here[name]) == " ".join(published[name]) for name in TABLE7)
        table.rows.append([stage + 1, " ".join(sorted(places)), *cells, "yes" if same else "NO"])
    return table


def say(rate: int, side: int, window: int, concat: int, dim: int, blocks: int, heads: int) -> tuple[str, str]:
    """The rate of downsampling with the map, and what the stage is made of, in the words of the table."""
    made_of = f"concat {concat}x{concat}, {dim}-d, LN; [win. sz. {window}x{window}, dim {dim}, head {heads}] x {blocks}"
    return f"{rate}x ({side}x{side})", made_of


def read_off(recipe: str) -> list[tuple[str, str]]:
    """What `say` says of each stage of the model that the recipe builds, from the shapes of its modules alone."""
    config = get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    stages, rate, width = [], 1, config.MODEL.SWIN.IN_CHANS
    steps = [model.patch_embed, *(stage.downsample for stage in model.layers[:-1])]
    for step, stage in zip(steps, model.layers, strict=True):
        if step is model.patch_embed:
            concat, dim = step.proj.kernel_size[0], step.proj.out_channels
        else:
            concat, dim = math.isqrt(step.reduction.in_features // width), step.reduction.out_features
        attention = stage.blocks[0].attn
        if not isinstance(step.norm, nn.LayerNorm) or any(block.attn.proj.in_features != dim for block in stage.blocks):
            raise ValueError(f"{recipe}: a stage of {dim} channels is not built as the table describes stages")
        rate, width = rate * concat, dim
        side, window = attention.windows.map_size[0], attention.windows.window
        stages.append(say(rate, side, window, concat, dim, len(stage.blocks), attention.num_heads))
    return stages
