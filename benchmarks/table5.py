"""Table 5: the speed of attention variants, of each stage's attention and of whole models."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from benchmarks.attention_variants import VARIANTS, build_swin, replace_attention
from benchmarks.paper import TABLE5
from benchmarks.timing import InferenceTimer, Step, device_slug
from config import get_config
from models.swin_transformer import SwinTransformer
from utils.paths import REPO_ROOT
from utils.table import Column, Table

RECIPES = {"T": "swin_tiny", "S": "swin_small", "B": "swin_base"}
STAGES = (1, 2, 3, 4)


class StageAttention(nn.Module):
    """The attention modules of one stage, one after the other, on a map of the stage's size."""

    def __init__(self, model: SwinTransformer, stage: int):
        super().__init__()
        self.attentions = nn.ModuleList(block.get_submodule("attn") for block in model.layers[stage - 1].blocks)
        side = model.map_size[0] // 2 ** (stage - 1)
        self.shape = (side, side, model.patch_embed.proj.out_channels * 2 ** (stage - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        for attention in self.attentions:
            x = attention(x)
        return x


def make_table(only: Sequence[str], models: Sequence[str], timer: InferenceTimer) -> Table:
    """The rows named in `only`, all if it is empty; whole models of the sizes in `models`."""
    rows = [name for name in TABLE5 if not only or name in only]
    parts = [*map(str, STAGES), *models]
    rates = timer.compare({
        f"{part} {variant}": step_builder(timer, variant, part)
        for part in parts for variant in rows if variant in VARIANTS
    })  # fmt: skip

    columns = [Column("attention"), *(Column(f"S{stage} (paper)", "g") for stage in STAGES)]
    columns += [Column(f"S{stage}, ms per {timer.batch_size} images", ".2f") for stage in STAGES]
    columns += [Column(f"Swin-{size}, images/s{source}", fmt) for size in "TSB"
                for source, fmt in ((" (paper)", "g"), (" here", ".2f"))]  # fmt: skip
    table = Table(f"table5_{device_slug(timer.device)}", "Table 5: speed of attention", columns, notes=[timer.note])
    for variant in rows:
        *paper_stages, paper_t, paper_s, paper_b = TABLE5[variant]
        stage_rates = [rates.get(f"{stage} {variant}") for stage in STAGES]
        row = [variant, *paper_stages, *(rate and 1000 * timer.batch_size / rate for rate in stage_rates)]
        for size, paper_rate in zip("TSB", (paper_t, paper_s, paper_b), strict=True):
            row += [paper_rate, rates.get(f"{size} {variant}")]
        table.rows.append(row)
    table.notes += [
        "Stages: the attention of all blocks of one stage of Swin-T at 224 x 224, with its projections, without MLPs.",
        "The paper's numbers are from a V100, its batch size is not stated; its kernel for sliding windows was not "
        "released with the models and is not here.",
    ]
    return table


def step_builder(timer: InferenceTimer, variant: str, part: str) -> Callable[[], Step]:
    """Builds the attention of stage `part` of Swin-T, or the whole model of size `part`."""

    def build() -> Step:
        config = get_config(REPO_ROOT / "configs" / f"{RECIPES.get(part, 'swin_tiny')}.yaml")
        model = replace_attention(build_swin(config, 1000), variant)
        if part in RECIPES:
            return timer.step(model, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
        attention = StageAttention(model, int(part))
        return timer.step(attention, *attention.shape)

    return build
