"""Predicts the speed of training on 1 to 512 GPUs, and the bottleneck: arithmetic, network, CPU cores or storage.

    python -m benchmarks.planning                                   # the page, with default assumptions
    python -m benchmarks.planning --write docs/reports/PLANNING.md
    python -m benchmarks.planning --gpu-tflops 312 --mfu 0.12 --node-gbits 100 --cores-per-gpu 8 --images-per-core 900

A model, not a measurement: every number follows from counted parameters and multiply-adds and from the assumptions
that the page lists. tests/benchmarks/test_planning.py compares its bytes and times with two real hosts on a slow link.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from config import get_config
from models.build import build_model
from models.count import count_macs, count_parameters
from utils.cli import CliParser, number, run_cli, user_path
from utils.files import write_text
from utils.paths import REPO_ROOT
from utils.table import Column, Table

MODELS = {"Swin-T": "swin_tiny", "Swin-S": "swin_small", "Swin-B": "swin_base", "Swin-L": "swin_large_22kto1k"}
GPUS = (1, 8, 64, 512)
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines. Comments give the source of each default."""

    gpu_tflops: float = 989.0  # dense bfloat16, data sheet of the H100 and H200
    mfu: float = 0.10  # model FLOPs utilisation; published numbers of Swin-T on large GPUs are 8 to 11 %
    gpus_per_node: int = 8
    gpu_gbytes: float = 300.0  # GB/s of a GPU's all-reduce within a node (NVLink data sheet: 450)
    node_gbits: float = 3200.0  # Gbit/s between nodes: eight 400 Gbit/s adapters
    cores_per_gpu: float = 14.0  # two 56-core processors for eight GPUs
    images_per_core: float = 700.0  # decoded and augmented; see docs/reports/LOADER.md
    image_kbytes: float = 110.0  # mean size of an ImageNet JPEG
    read_gbytes: float = 5.0  # GB/s that a node reads from storage
    write_gbytes: float = 1.0  # GB/s that one process writes


@dataclass(frozen=True)
class ModelSize:
    """Parameters, and multiply-adds of the forward pass of one image."""

    parameters: int
    macs: int

    @classmethod
    def of(cls, recipe: str) -> "ModelSize":
        config = get_config(str(REPO_ROOT / "configs" / f"{recipe}.yaml"))
        with torch.device("meta"):
            model = build_model(config, config.MODEL.NUM_CLASSES)
        return cls(count_parameters(model), count_macs(model, config.DATA.IMG_SIZE))


@dataclass(frozen=True)
class Plan:
    """A model on `gpus` GPUs, one process each, with `images` images per GPU and step."""

    size: ModelSize
    cluster: Cluster
    gpus: int
    images: int

    @property
    def compute(self) -> float:
        """Seconds of a step's arithmetic: three times the forward pass, two operations per multiply-add."""
        return 6 * self.size.macs * self.images / (self.cluster.gpu_tflops * 1e12 * self.cluster.mfu)

    @property
    def sent(self) -> float:
        """Bytes that each process sends per step: a ring all-reduce of the float32 gradients."""
        return 2 * (self.gpus - 1) / self.gpus * 4 * self.size.parameters

    @property
    def network(self) -> float:
        """Seconds of the all-reduce over the slower of the two kinds of link, without latency."""
        per_gpu = self.cluster.gpu_gbytes * 1e9
        if self.gpus > self.cluster.gpus_per_node:
            # The ring crosses each node's link once, and all GPUs of the node share it.
            per_gpu = min(per_gpu, self.cluster.node_gbits / 8 * 1e9)
        return self.sent / per_gpu

    @property
    def step(self) -> float:
        """Seconds of a step without data loading. The all-reduce overlaps backward, two thirds of the arithmetic."""
        return self.compute / 3 + max(2 / 3 * self.compute, self.network)

    @property
    def loading(self) -> float:
        """Seconds in which a GPU's CPU cores decode and augment its images of a step."""
        return self.images / (self.cluster.cores_per_gpu * self.cluster.images_per_core)

    @property
    def reading(self) -> float:
        """Seconds in which a node reads its images of a step from storage."""
        on_node = min(self.gpus, self.cluster.gpus_per_node) * self.images
        return on_node * self.cluster.image_kbytes * 1e3 / (self.cluster.read_gbytes * 1e9)

    @property
    def seconds(self) -> float:
        """Seconds from step to step: everything overlaps, so the slowest part decides."""
        return max(self.step, self.loading, self.reading)

    @property
    def images_per_second(self) -> float:
        return self.gpus * self.images / self.seconds

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: parameters and AdamW's two moments in float32."""
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
    Column("model"), Column("GPUs", ",d"), Column("images per GPU", "d"), Column("images/s", ",.0f"),
    Column("step, ms", ".1f"), Column("sent per GPU and step, MB", ",.0f"), Column("network, ms", ".1f"),
    Column("images read, MB/s", ",.0f"), Column("cores needed per GPU", ".1f"), Column("epoch, min", ".1f"),
    Column("checkpoint, GB", ".2f"), Column("written in, s", ".1f"), Column("bottleneck"),
]  # fmt: skip


def make_table(sizes: dict[str, ModelSize], cluster: Cluster, title: str, images_for: Callable[[int], int]) -> Table:
    """`images_for(gpus)`: images per GPU and step."""
    rows: list[Sequence[object]] = []
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


def make_page(cluster: Cluster) -> str:
    """The whole page in Markdown."""
    sizes = {name: ModelSize.of(recipe) for name, recipe in MODELS.items()}
    tables = [
        make_table(sizes, cluster, title, images_for)
        for title, images_for in (
            ("The recipe: a global batch size of 1,024 on any number of GPUs", lambda gpus: 1024 // gpus),
            (
                "128 images per GPU: the global batch size grows with the cluster, so the recipe must change",
                lambda _: 128,
            ),
        )
    ]
    assumptions = "\n".join(f"- `--{f.name.replace('_', '-')} {getattr(cluster, f.name):g}`" for f in fields(cluster))
    return f"""# Planning: predicted training speed and bottlenecks

Predicted by a model of a training step (`benchmarks/planning.py`), from counted parameters and multiply-adds and these
assumptions. Give your own as flags to generate the page again:

{assumptions}

A step is forward and backward (three times the multiply-adds of the forward pass); the all-reduce of the float32
gradients overlaps backward; images are read and prepared at the same time. The slowest of these decides. The model
leaves out the latency of the network and of kernel launches, so rows with few images per GPU are too optimistic; it
also leaves out memory and evaluation.

Compared with two real hosts on a link of 20 Mbit/s (`tests/benchmarks/test_planning.py`), the model is right within
15 % for the bytes of a step, 25 % for its time and 10 % for the size of the checkpoint.

{tables[0].markdown().replace("# ", "## ", 1)}
{tables[1].markdown().replace("# ", "## ", 1).rstrip()}
"""


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m benchmarks.planning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for assumption in fields(Cluster):
        flag = f"--{assumption.name.replace('_', '-')}"
        positive = number(int if isinstance(assumption.default, int) else float, 1e-9, 1e12)
        parser.add_argument(flag, type=positive, default=assumption.default, metavar="N")
    parser.add_argument("--write", type=user_path, metavar="FILE", help="write the page there instead of printing it")
    return parser


def run(argv: Sequence[str] | None) -> int:
    assumptions = vars(build_parser().parse_args(argv))
    path = assumptions.pop("write")
    page = make_page(Cluster(**assumptions))
    if path:
        write_text(path, page)
    else:
        print(page, end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
