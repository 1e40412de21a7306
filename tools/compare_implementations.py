"""Compares every released model with the same model of timm, torchvision and transformers.

    python -m tools.compare_implementations                           all recipes, as in docs/reports/MODELS.md
    python -m tools.compare_implementations --only swin_tiny          some recipes
    python -m tools.compare_implementations --write FILE.md           writes the table as Markdown too

Both get the same random weights: made by the other library, and read by this project as that library's files are.
Needs the packages of requirements-dev.txt.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import nn
from yacs.config import CfgNode

from config import get_config
from models.build import architecture_of, build_model
from models.count import count_macs, count_parameters
from models.other_libraries import LIBRARIES, Architecture, Logits, build_with
from models.pretrained import registry
from models.pretrained.load import load_weights
from utils.cli import CliParser, run_cli, user_path
from utils.errors import UserError
from utils.files import write_text
from utils.paths import REPO_ROOT
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

IMAGES = 2


def compare_all(only: Sequence[str] = ()) -> Table:
    """The largest difference of logits for each released model, or for those of the recipes `only`.

    Raises:
        UserError: no such recipe.
    """
    models = distinct_models(only)
    columns = [
        Column("recipes"), Column("classes"), Column("pixels"), Column("parameters", ",d"),
        Column("multiply-adds", ",d"), *(Column(f"{name} {metadata.version(name)}", ".1e") for name in LIBRARIES),
        Column("largest logit", ".2f"),
    ]  # fmt: skip
    table = Table("MODELS", "Every model, compared with independent implementations", columns)
    for recipes, classes, config in models:
        table.rows.append([", ".join(recipes), classes, config.DATA.IMG_SIZE, *compare(config, classes)])
        log.info("%s: %s", *table.rows[-1][:1], table.rows[-1][3:])
    table.notes = [
        f"Columns of the libraries: the largest difference of any logit over {IMAGES} random images, in float32, "
        "between the library's model with random weights and this project's, which reads these weights in the "
        "library's format; – if the library has no such model. The last column is the largest logit itself.",
        "Images whose maps are not multiples of the window (256 or 512 pixels with windows of 7) are compared in "
        "tests/models/test_padding.py, values and gradients, from 224 to 800 × 1344 pixels: equal to transformers and "
        "torchvision. A map is padded with zeros after the norm and before the projection to queries, keys and values, "
        "and padding is not masked. Known differences: timm shifts a map before it pads it, so its shifted windows are "
        "cut elsewhere, and logits differ by about 1e-4; torchvision drops the last pixels of a side that is not a "
        "multiple of the patch (250 × 330), where the others pad; transformers shifts neither axis where one of them "
        "has a single window, and its `SwinBackbone` always shifts both, while timm, torchvision and this project do "
        "not shift the axis of a single window.",
        "Swin-MLP has no independent implementation; tests/models/test_swin_mlp.py computes it in another way.",
        "Parameters and multiply-adds (of matrix products and convolutions, for one image) are counted from the model.",
        *circumstances(),
    ]
    return table


def distinct_models(only: Sequence[str] = ()) -> list[tuple[list[str], int, CfgNode]]:
    """The released models, each once: its recipes, number of classes and configuration.

    Raises:
        UserError: a recipe in `only` that no release has.
    """
    models: dict[Architecture, tuple[list[str], int, CfgNode]] = {}
    for release in registry.RELEASES:
        if only and release.recipe not in only:
            continue
        config = get_config(REPO_ROOT / "configs" / f"{release.recipe}.yaml")
        key = architecture_of(config, release.classes)
        recipes = models.setdefault(key, ([], release.classes, config))[0]
        if release.recipe not in recipes:
            recipes.append(release.recipe)
    missing = set(only) - {recipe for recipes, _, _ in models.values() for recipe in recipes}
    if missing:
        raise UserError(f"--only {' '.join(sorted(missing))}: not the recipe of a release; see python -m tools.models")
    return list(models.values())


def compare(config: CfgNode, classes: int) -> list[int | float | None]:
    """Parameters, multiply-adds, the largest difference for each of LIBRARIES, and the largest logit."""
    ours, size = build_model(config, classes).eval(), config.DATA.IMG_SIZE
    counts = [count_parameters(ours), count_macs(ours, size)]
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    differences: list[float | None] = []
    largest: float | None = None
    for library in LIBRARIES:
        theirs = build_with(library, architecture_of(config, classes))
        if theirs is None:
            differences.append(None)
            continue
        randomise(theirs.eval())
        load_weights(ours, theirs.state_dict(), source=f"random weights by {library}")
        with torch.inference_mode():
            expected, actual = Logits(theirs)(images), ours(images)
        differences.append((actual - expected).abs().max().item())
        largest = max(largest or 0.0, expected.abs().max().item())
    return [*counts, *differences, largest]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value that affects the output: no zero biases, no unit norms, no zero bias tables."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.add_(0.3 * noise)
            elif name.endswith("relative_position_bias_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m tools.compare_implementations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="RECIPE", help="compare only these recipes")
    parser.add_argument("--write", type=user_path, metavar="FILE", help="write the table to FILE as Markdown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def program() -> int:
        args = build_parser().parse_args(argv)
        table = compare_all(args.only)
        print(table.terminal())
        if args.write:
            args.write.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.write, table.markdown())
        return 0

    return run_cli(program)


if __name__ == "__main__":
    sys.exit(main())
