"""Every released model built here and by timm, torchvision and transformers, with the same random weights: do they give
the same logits? The weights are made by the other library, and read here as its files are.
"""

import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from models.other_libraries import LIBRARIES, logits, section_of
from models.pretrained import registry
from models.pretrained.load import load_weights
from utils.errors import UserError
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
IMAGES = 2


def comparison(only: Sequence[str] = ()) -> Table:
    """The largest difference of logits for each model that was released, or for those of the recipes `only`.

    Raises:
        UserError: no such recipe.
    """
    networks = distinct_networks(only)
    columns = [
        Column("recipes"), Column("classes"), Column("pixels"), Column("parameters", ",d"),
        Column("multiply-adds", ",d"), *(Column(f"{name} {metadata.version(name)}", ".1e") for name in LIBRARIES),
        Column("largest logit", ".2f"),
    ]  # fmt: skip
    table = Table("MODELS", "Every model, and the independent implementations that it equals", columns)
    for recipes, classes, config in networks:
        table.rows.append([", ".join(recipes), classes, config.DATA.IMG_SIZE, *compare(config, classes)])
        log.info("%s: %s", *table.rows[-1][:1], table.rows[-1][3:])
    table.notes = [
        f"Columns of the libraries: the largest difference of any logit over {IMAGES} random images, in float32, "
        "between the library's model with random weights and this project's, which read those weights in the library's "
        "layout; – where the library has no such model. The last column says how large the logits themselves are.",
        "Swin-MLP has no independent implementation; tests/models/test_swin_mlp.py computes it another way.",
        "Parameters and multiply-adds (of matrix products and convolutions, for one image) are counted from the model.",
        *circumstances(),
    ]
    return table


def distinct_networks(only: Sequence[str]) -> list[tuple[list[str], int, CfgNode]]:
    """The networks that were released, each once: its recipes, number of classes and configuration."""
    networks: dict[str, tuple[list[str], int, CfgNode]] = {}
    for release in registry.RELEASES:
        if only and release.recipe not in only:
            continue
        config = get_config(CONFIGS / f"{release.recipe}.yaml")
        key = f"{config.DATA.IMG_SIZE} {config.MODEL.TYPE} {section_of(config)} {release.classes}"
        recipes = networks.setdefault(key, ([], release.classes, config))[0]
        if release.recipe not in recipes:
            recipes.append(release.recipe)
    missing = set(only) - {recipe for recipes, _, _ in networks.values() for recipe in recipes}
    if missing:
        raise UserError(f"--only {' '.join(sorted(missing))}: not the recipe of a release; see python -m tools.models")
    return list(networks.values())


def compare(config: CfgNode, classes: int) -> list[int | float | None]:
    """Parameters, multiply-adds, the difference from each of LIBRARIES, and the largest logit."""
    ours = build_model(config, classes).eval()
    counts = [count_parameters(ours), count_macs(ours, config.DATA.IMG_SIZE)]
    size = config.DATA.IMG_SIZE
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    differences: list[float | None] = []
    largest: float | None = None
    for name, build in LIBRARIES.items():
        theirs = None if config.MODEL.TYPE == "swin_mlp" else build(config, section_of(config), classes)
        if theirs is None:
            differences.append(None)
            continue
        randomise(theirs.eval())
        load_weights(ours, theirs.state_dict(), source=f"random weights by {name}")
        with torch.inference_mode():
            expected, found = logits(theirs, images), ours(images)
        differences.append((found - expected).abs().max().item())
        largest = max(largest or 0.0, expected.abs().max().item())
    return [*counts, *differences, largest]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value that matters: no zero biases, no unit norms, tables that change the attention."""
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
