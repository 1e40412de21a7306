"""Table 1: Swin and its peers, counted, measured, and evaluated where there are weights and data."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from yacs.config import CfgNode

from benchmarks import runs
from benchmarks.paper import TABLE1, Peer
from benchmarks.timing import Step, Stopwatch
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


def make(
    only: Sequence[str],
    device: str,
    batch_size: int,
    seconds: float,
    rounds: int,
    amp_dtype: str,
    count_only: bool,
    weights: str,
    data_path: str,
    opts: Sequence[str],
) -> Table:
    """The rows of which the name in the paper or here is among `only`, all where that is empty.

    Args:
        weights: folder of weight files, named as the model here or as the release; releases that are not there are
            downloaded. Without `data_path` nothing is evaluated.
    """
    watch = Stopwatch.on(device, batch_size, seconds, rounds, amp_dtype)
    peers = [peer for peer in TABLE1 if not only or peer.name in only or peer.model in only]
    configs = {peer: configuration(peer) for peer in peers}
    table = Table("table1" if count_only else f"table1_{watch.slug}", "Table 1: Swin and its peers", COLUMNS)

    # The pre-trained rows are the same networks again: each is counted and measured once.
    networks = {network_of(config): config for config in configs.values()}
    counts = {network: count(config) for network, config in networks.items()}
    rates = {}
    if not count_only:
        rates = watch.compare({network: builder(watch, config) for network, config in networks.items()})
        table.notes += watch.notes
    for peer, config in configs.items():
        network = network_of(config)
        file = weight_file(peer, weights) if data_path else None
        top1 = runs.accuracy(config, file, data_path, opts) if file else None
        table.rows.append([
            peer.name, peer.pretrained, peer.model, peer.pixels,
            peer.parameters, counts[network][0] / 1e6, peer.macs, counts[network][1] / 1e9,
            peer.rate, rates.get(network), peer.top1, top1,
        ])  # fmt: skip
    table.notes.append("Multiply-adds are those of matrix products and convolutions; the paper calls them FLOPs.")
    return table


def configuration(peer: Peer) -> CfgNode:
    """The configuration of a row's model: a recipe here, or a model of timm."""
    recipe = REPO_ROOT / "configs" / f"{peer.model}.yaml"
    if recipe.is_file():
        return get_config(recipe)
    return get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", peer.model, "DATA.IMG_SIZE", peer.pixels])


def network_of(config: CfgNode) -> str:
    """What tells one network from another: rows with other weights of the same network share it."""
    if config.MODEL.TYPE == "timm":
        return f"{config.MODEL.NAME} {config.DATA.IMG_SIZE}"
    swin = config.MODEL.SWIN
    return f"Swin C {swin.EMBED_DIM}, depths {list(swin.DEPTHS)}, window {swin.WINDOW_SIZE}, {config.DATA.IMG_SIZE}"


def count(config: CfgNode) -> tuple[int, int]:
    """Parameters and multiply-adds of the model, built without memory for its values."""
    with torch.device("meta"):
        model = build_model(config, 1000).eval()
    return count_parameters(model), count_macs(model, config.DATA.IMG_SIZE)


def builder(watch: Stopwatch, config: CfgNode) -> Callable[[], Step]:
    """Builds the model for its turn."""

    def build() -> Step:
        return watch.step(build_model(config, 1000), 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)

    return build


def weight_file(peer: Peer, folder: str) -> str | None:
    """The file in `folder` that belongs to the row, else the released name that main.py can download, else None."""
    for name in filter(None, (peer.weights, peer.model)):
        for ending in (".pth", ".safetensors"):
            path = Path(folder, f"{name}{ending}")
            if folder and path.is_file():
                return str(path)
    if not peer.weights:
        log.info("%s: no weights of %s in --weights %s; its accuracy stays open", peer.name, peer.model, folder)
    return peer.weights or None
