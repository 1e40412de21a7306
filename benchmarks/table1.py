"""Table 1: Swin and its peers, counted, measured, and evaluated if there are weights and data."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from yacs.config import CfgNode

from benchmarks import runs
from benchmarks.paper import TABLE1, Peer
from benchmarks.timing import InferenceTimer, Step, device_slug
from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from utils.paths import REPO_ROOT
from utils.table import Column, Table

log = logging.getLogger(__name__)

COLUMNS = [
    Column("model"), Column("pre-trained"), Column("name here"), Column("pixels"),
    Column("parameters, M (paper)", "g"), Column("parameters, M", ".2f"),
    Column("multiply-adds, G (paper)", "g"), Column("multiply-adds, G", ".2f"),
    Column("images/s (paper, V100)", "g"), Column("images/s here", ".2f"),
    Column("top-1, % (paper)", ".1f"), Column("top-1, % here", ".2f"),
]  # fmt: skip


def make_table(
    only: Sequence[str], timer: InferenceTimer | None, weights: str, data_path: str, opts: Sequence[str]
) -> Table:
    """The rows whose name in the paper or here is in `only`, all if it is empty.

    Args:
        timer: measures images/s; None measures nothing.
        weights: folder of weight files, named as the model here or as the release; missing releases are downloaded.
        data_path: without it nothing is evaluated.
        opts: further keys for the evaluations, KEY VALUE ….
    """
    peers = [peer for peer in TABLE1 if not only or peer.name in only or peer.model in only]
    configs = {peer: peer_config(peer) for peer in peers}
    stem = "table1" if timer is None else f"table1_{device_slug(timer.device)}"
    table = Table(stem, "Table 1: Swin and its peers", COLUMNS)

    # Pre-trained rows repeat architectures: each is counted and measured once.
    architectures = {architecture_key(config): config for config in configs.values()}
    counts = {key: count(config) for key, config in architectures.items()}
    rates: dict[str, float | None] = {}
    if timer is not None:
        rates = timer.compare({key: step_builder(timer, config) for key, config in architectures.items()})
        table.notes.append(timer.note)
    for peer, config in configs.items():
        key = architecture_key(config)
        parameters, macs = counts[key]
        file = weight_file(peer, weights) if data_path else None
        top1 = runs.evaluate(config, file, data_path, opts)["acc1"] if file else None
        table.rows.append([
            peer.name, peer.pretrained, peer.model, peer.pixels, peer.parameters, parameters / 1e6,
            peer.macs, macs / 1e9, peer.rate, rates.get(key), peer.top1, top1,
        ])  # fmt: skip
    table.notes.append("Multiply-adds are those of matrix products and convolutions; the paper calls them FLOPs.")
    return table


def peer_config(peer: Peer) -> CfgNode:
    """The configuration of a row's model: a recipe here, or a model of timm."""
    recipe = REPO_ROOT / "configs" / f"{peer.model}.yaml"
    if recipe.is_file():
        return get_config(recipe)
    return get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", peer.model, "DATA.IMG_SIZE", peer.pixels])


def architecture_key(config: CfgNode) -> str:
    """Identifies the architecture, which rows with different weights may share."""
    if config.MODEL.TYPE == "timm":
        return f"{config.MODEL.NAME} {config.DATA.IMG_SIZE}"
    swin = config.MODEL.SWIN
    return f"Swin C {swin.EMBED_DIM}, depths {list(swin.DEPTHS)}, window {swin.WINDOW_SIZE}, {config.DATA.IMG_SIZE}"


def count(config: CfgNode) -> tuple[int, int]:
    """Parameters and multiply-adds of the model, built on the meta device."""
    with torch.device("meta"):
        model = build_model(config, 1000).eval()
    return count_parameters(model), count_macs(model, config.DATA.IMG_SIZE)


def step_builder(timer: InferenceTimer, config: CfgNode) -> Callable[[], Step]:
    def build() -> Step:
        return timer.step(build_model(config, 1000), 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)

    return build


def weight_file(peer: Peer, folder: str) -> str | None:
    """The row's file in `folder`, or the name of a release that main.py can download, or None."""
    for name in filter(None, (peer.weights, peer.model)):
        for suffix in (".pth", ".safetensors"):
            path = Path(folder, f"{name}{suffix}")
            if folder and path.is_file():
                return str(path)
    if not peer.weights:
        log.info("%s: no weights of %s in --weights %s; its accuracy is left out", peer.name, peer.model, folder)
    return peer.weights or None
