"""How long a run takes on how many GPUs, and what runs out first: arithmetic, network, cores for the images, storage.

    python -m benchmarks.planning                                   # the page, with the assumptions below
    python -m benchmarks.planning --write docs/reports/PLANNING.md
    python -m benchmarks.planning --gpu-tflops 312 --mfu 0.12 --node-gbits 100 --cores-per-gpu 8 --images-per-core 900

A model, not a measurement: every figure follows from counted parameters and multiply-adds and from the assumptions
that the page names. tests/benchmarks/test_planning.py holds its bytes and times against two real hosts with a slow wire.

W processes (one per GPU), b images of a GPU in an update, P parameters.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from utils.files import write_text
from utils.paths import REPO_ROOT
from utils.table import Column, Table

MODELS = {"Swin-T": "swin_tiny", "Swin-S": "swin_small", "Swin-B": "swin_base", "Swin-L": "swin_large_22kto1k"}
GPUS = (1, 8, 64, 512)
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines; the comments say what stands behind a default."""

    gpu_tflops: float = 989.0  # dense bfloat16, data sheet of the H100 and H200
    mfu: float = 0.10  # share of it that training uses; 8 to 11 % are public figures of Swin-T on large GPUs
    gpus_per_node: int = 8
    gpu_gbytes: float = 300.0  # GB/s of a GPU's all-reduce within a node (NVLink: 450 by the data sheet)
    node_gbits: float = 3200.0  # Gbit/s between nodes: eight adapters of 400
    cores_per_gpu: float = 14.0  # two processors of 56 cores for eight GPUs
    images_per_core: float = 700.0  # decoded and augmented; see docs/reports/LOADER.md
    image_kbytes: float = 110.0  # mean size of an ImageNet JPEG
    read_gbytes: float = 5.0  # GB/s that a node reads from storage
    write_gbytes: float = 1.0  # GB/s that one process writes


@dataclass(frozen=True)
class Size:
    """What is counted of a model: parameters, and multiply-adds of an image forward."""

    parameters: int
    macs: int

    @classmethod
    def of(cls, recipe: str) -> "Size":
        config = get_config(str(REPO_ROOT / "configs" / f"{recipe}.yaml"))
        with torch.device("meta"):  # sizes alone
            model = build_model(config, config.MODEL.NUM_CLASSES)
        return cls(count_parameters(model), count_macs(model, config.DATA.IMG_SIZE))


@dataclass(frozen=True)
class Plan:
    """One model on W GPUs with b images each in an update."""

    size: Size
    cluster: Cluster
    gpus: int
    images: int

    @property
    def compute(self) -> float:
        """Seconds of an update's arithmetic: three times the forward pass, two operations a multiply-add."""
        return 6 * self.size.macs * self.images / (self.cluster.gpu_tflops * 1e12 * self.cluster.mfu)

    @property
    def sent(self) -> float:
        """Bytes that each process sends for an update: a ring all-reduce of the float32 gradients."""
        return 2 * (self.gpus - 1) / self.gpus * 4 * self.size.parameters

    @property
    def network(self) -> float:
        """Seconds of the all-reduce, by the slower of the two kinds of wire. Latency is not in it."""
        per_gpu = self.cluster.gpu_gbytes * 1e9
        if self.gpus > self.cluster.gpus_per_node:
            # The ring crosses each node's wire once, whatever the number of GPUs behind it, and their parts share it.
            per_gpu = min(per_gpu, self.cluster.node_gbits / 8 * 1e9)
        return self.sent / per_gpu

    @property
    def update(self) -> float:
        """Seconds of an update. The gradients travel while backward runs, which is two thirds of the arithmetic."""
        return self.compute / 3 + max(2 / 3 * self.compute, self.network)

    @property
    def loading(self) -> float:
        """Seconds in which the GPU's cores prepare its images."""
        return self.images / (self.cluster.cores_per_gpu * self.cluster.images_per_core)

    @property
    def reading(self) -> float:
        """Seconds in which a node reads its GPUs' images from storage."""
        on_node = min(self.gpus, self.cluster.gpus_per_node) * self.images
        return on_node * self.cluster.image_kbytes * 1e3 / (self.cluster.read_gbytes * 1e9)

    @property
    def seconds(self) -> float:
        """Seconds from update to update: everything overlaps, the slowest decides."""
        return max(self.update, self.loading, self.reading)

    @property
    def images_per_second(self) -> float:
        return self.gpus * self.images / self.seconds

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: parameters and AdamW's two averages in float32."""
        return 3 * 4 * self.size.parameters

    @property
    def bottleneck(self) -> str:
        seconds = {
            "arithmetic": self.compute,
            "network": self.network + self.compute / 3,
            "cores": self.loading,
            "storage": self.reading,
        }
        return max(seconds, key=seconds.__getitem__)


COLUMNS = [
    Column("model"), Column("GPUs", ",d"), Column("images a GPU", "d"), Column("images/s", ",.0f"),
    Column("update, ms", ".1f"), Column("each sends, MB an update", ",.0f"), Column("network, ms", ".1f"),
    Column("images read, MB/s", ",.0f"), Column("cores needed a GPU", ".1f"), Column("epoch, min", ".1f"),
    Column("checkpoint, GB", ".2f"), Column("written in, s", ".1f"), Column("ends first"),
]  # fmt: skip


def table(sizes: dict[str, Size], cluster: Cluster, title: str, images_for: Callable[[int], int]) -> Table:
    """`images_for(gpus)`: how many images a GPU has in an update."""
    rows = []
    for name, size in sizes.items():
        for gpus in GPUS:
            images = images_for(gpus)
            plan = Plan(size, cluster, gpus, images)
            rows.append([
                name, gpus, images, plan.images_per_second, 1e3 * plan.seconds, plan.sent / 1e6, 1e3 * plan.network,
                plan.images_per_second * cluster.image_kbytes / 1e3,
                plan.images_per_second / gpus / cluster.images_per_core, IMAGENET / plan.images_per_second / 60,
                plan.checkpoint / 1e9, plan.checkpoint / 1e9 / cluster.write_gbytes, plan.bottleneck,
            ])  # fmt: skip
    return Table("planning", title, COLUMNS, rows)


def page(cluster: Cluster) -> str:
    """The whole page in Markdown."""
    sizes = {name: Size.of(recipe) for name, recipe in MODELS.items()}
    tables = [
        table(sizes, cluster, "The recipe: 1,024 images an update, however many GPUs share them", lambda n: 1024 // n),
        table(sizes, cluster, "128 images a GPU: the update grows with the cluster, and the recipe must follow",
              lambda n: 128),
    ]  # fmt: skip
    assumed = "\n".join(f"- `--{f.name.replace('_', '-')} {getattr(cluster, f.name):g}`" for f in fields(cluster))
    return f"""# Planning: what a run takes, and what runs out first

From a model of each update (`benchmarks/planning.py`), with counted parameters and multiply-adds, and these
assumptions; give your own and make the page again:

{assumed}

An update takes forward and backward (three times the multiply-adds of the forward pass); the float32 gradients travel
while backward runs; images are read and prepared meanwhile. The slowest of these decides. Not in it: latency of the
network and of kernel launches, so that rows with few images a GPU are too good; memory; evaluation.

Held against two real hosts with a wire of 20 Mbit/s between them (`tests/benchmarks/test_planning.py`): the bytes of an update,
its time and the size of the checkpoint are those of the model within 15, 25 and 10 %.

{tables[0].markdown().replace("# ", "## ", 1)}
{tables[1].markdown().replace("# ", "## ", 1).rstrip()}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for assumption in fields(Cluster):
        flag = f"--{assumption.name.replace('_', '-')}"
        parser.add_argument(flag, type=assumption.type, default=assumption.default, metavar="N")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there instead of printing it")
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in fields(Cluster)}
    if wrong := [name for name, value in values.items() if not value > 0]:
        parser.error(f"--{wrong[0].replace('_', '-')} must be more than 0")
    text = page(Cluster(**values))
    if args.write:
        write_text(args.write, text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
