"""Table 5: the speed of ways to attend, of each stage's attention and of whole networks."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from benchmarks.attention import WAYS, attend
from benchmarks.paper import TABLE5
from benchmarks.timing import Step, Stopwatch
from config import get_config
from models.build import build_model
from utils.paths import REPO_ROOT
from utils.table import Column, Table

RECIPES = {"T": "swin_tiny", "S": "swin_small", "B": "swin_base"}
STAGES = (1, 2, 3, 4)


class StageAttention(nn.Module):
    """The attention of one stage alone: that of its blocks one after the other, on a map of the stage's size."""

    def __init__(self, model: nn.Module, stage: int):
        super().__init__()
        self.attentions = nn.ModuleList(block.attn for block in model.layers[stage - 1].blocks)
        side = model.map_size[0] // 2 ** (stage - 1)
        self.shape = (side, side, self.attentions[0].proj.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        for attention in self.attentions:
            x = attention(x)
        return x


def make(
    only: Sequence[str],
    device: str,
    batch_size: int,
    seconds: float,
    rounds: int,
    amp_dtype: str,
    models: Sequence[str],
) -> Table:
    """The rows named in `only`, all where that is empty; whole networks of the sizes in `models`."""
    watch = Stopwatch.on(device, batch_size, seconds, rounds, amp_dtype)
    ways = [way for way in WAYS if not only or way in only]
    parts = [*map(str, STAGES), *models]
    rates = watch.compare({f"{part} {way}": builder(watch, way, part) for part in parts for way in ways})

    stages = [f"S{stage}, ms per {batch_size} images" for stage in STAGES]
    columns = [Column("attention"), *(Column(f"{name} (paper)", "g") for name in ("S1", "S2", "S3", "S4"))]
    columns += [Column(stage, ".2f") for stage in stages]
    columns += [Column(f"Swin-{size}, images/s{where}", fmt) for size in "TSB"
                for where, fmt in ((" (paper)", "g"), (" here", ".2f"))]  # fmt: skip
    table = Table(f"table5_{watch.slug}", "Table 5: speed of attention", columns, notes=watch.notes)
    for way, figures in TABLE5.items():
        if only and way not in only:
            continue
        here = [rates.get(f"{stage} {way}") for stage in STAGES]
        row = [way, *figures[:4], *(rate and 1000 * batch_size / rate for rate in here)]
        for size, published in zip("TSB", figures[4:], strict=True):
            row += [published, rates.get(f"{size} {way}")]
        table.rows.append(row)
    table.notes += [
        "Stages: the attention of all blocks of one stage of Swin-T at 224 x 224, with its projections, without MLPs.",
        "The paper's figures are from a V100, its batch is not stated; its kernel for sliding windows was not released "
        "with the models and is not here.",
    ]
    return table


def builder(watch: Stopwatch, way: str, part: str) -> Callable[[], Step]:
    """Builds the attention of stage `part` of Swin-T, or the whole network of size `part`, for its turn."""

    def build() -> Step:
        config = get_config(REPO_ROOT / "configs" / f"{RECIPES.get(part, 'swin_tiny')}.yaml")
        model = attend(build_model(config, 1000), way)
        if part in RECIPES:
            return watch.step(model, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
        attention = StageAttention(model, int(part))
        return watch.step(attention, *attention.shape)

    return build
