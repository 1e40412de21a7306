"""Compares the speed and memory of a step here with timm's, torchvision's and transformers', in one run:

    python -m benchmarks.step                                              Swin-T, eager and compiled, on this machine
    python -m benchmarks.step --models swin_tiny swinv2_tiny_w16 --dtypes bfloat16 --batch-sizes 128 256 --write FILE.md

Tiny, on any CPU:

    python -m benchmarks.step --batch-sizes 1 --dtypes float32 --compile-modes eager --rounds 1 --seconds 0.1

A training step is forward, backward, gradient clipping at 5.0 and an update by fused AdamW; here it is the training
loop's own, with all its metrics and checks. Every candidate has one turn per round; results are medians over the
rounds. A variant of this project, such as --variant skip MODEL.DROP_PATH_SKIP True, is measured as "here skip". FILE.md
and FILE.csv keep the rows of earlier runs; a row that is measured again is replaced.

With --subprocess each candidate runs in a process of its own, as its users run it. Otherwise all share one process, and
what this project sets for that process on a CPU helps the others too. "tuned" is a compiled peer with the same settings
that this project makes by itself; it does not count for the best peer.
"""

import argparse
import csv
import gc
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode

from benchmarks.footprint import MemoryTracker
from benchmarks.subprocess_step import SubprocessStep
from benchmarks.timing import Step, choose_device, compare_steps
from config import get_config
from engine.setup import build_components, compile_and_wrap
from engine.throughput import images_per_second, inference_step, training_step
from models.build import architecture_of, build_model
from models.count import count_macs
from models.other_libraries import LIBRARIES, Logits, build_with
from optimizer import build_optimizer
from utils.cli import CliParser, number, run_cli, user_path
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.malloc import disable_malloc_trim
from utils.paths import REPO_ROOT
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

CLASSES = 1000
HERE = "here"
MODES = ("inference", "training")
COMPILE_MODES = ("eager", "compiled", "tuned", "graphs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Peak dense FLOP/s of the data sheets; float32 without TensorFloat-32, as it is measured here.
DATA_SHEETS = {name: {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12} for name in ("H100", "H200")}

COLUMNS = [
    Column("model"), Column("mode"), Column("type"), Column("batch"), Column("implementation"),
    Column("images/s", ".2f"), Column("over the best peer", ".3f"), Column("memory, GiB", ".3f"),
    Column("of the matrix product, %", ".1f"), Column("of the data sheet, %", ".1f"),
]  # fmt: skip
KEY_COLUMNS = 5  # the first columns, which identify a row
COLUMNS_NOTE = (
    "Medians. Memory: on a GPU the peak allocation of a step, model and optimizer included; on a CPU the peak size of "
    "the tensors created in an eager step, without parameters and optimizer. Arithmetic is that of the matrix products "
    "(models/count.py), three times the forward pass for training."
)

Build = Callable[[], Step]
Measured = dict[str, tuple[float | None, float | None]]  # candidate → images/s, GiB; None: out of memory, not counted


@dataclass(frozen=True)
class BenchmarkCase:
    """Recipe, mode, dtype and batch size of one comparison."""

    model: str
    mode: str
    dtype: str
    batch: int

    def config(self, *opts: object) -> CfgNode:
        """The recipe's configuration, for measuring."""
        overrides = ["DATA.BATCH_SIZE", self.batch, "AMP_DTYPE", self.dtype, "THROUGHPUT_MODE", True]
        overrides += ["MODEL.NUM_CLASSES", CLASSES]
        return get_config(REPO_ROOT / "configs" / f"{self.model}.yaml", [*overrides, *opts])

    def random_batch(self, device: torch.device) -> dict:
        size = self.config().DATA.IMG_SIZE
        return {
            "image": torch.randn(self.batch, 3, size, size, device=device),
            "target": torch.rand(self.batch, CLASSES, device=device).softmax(1),
            "position": 0,
        }

    def flops(self) -> int:
        config = self.config()
        with torch.device("meta"):
            macs = count_macs(build_model(config, CLASSES), config.DATA.IMG_SIZE)
        return 2 * macs * (3 if self.mode == "training" else 1)


@dataclass(frozen=True)
class StepOptions:
    """The command line: which combinations to measure, and how."""

    models: Sequence[str]
    modes: Sequence[str]
    dtypes: Sequence[str]
    batch_sizes: Sequence[int]
    libraries: Sequence[str]
    compile_modes: Sequence[str]
    variants: Mapping[str, Sequence[str]]  # name → KEY VALUE …
    device: torch.device
    seconds: float
    rounds: int
    subprocess: bool

    def check(self) -> None:
        """Raises UserError: no such recipe, or values that do not go together."""
        for model in self.models:
            if not (REPO_ROOT / "configs" / f"{model}.yaml").is_file():
                raise UserError(f"--models {model}: there is no configs/{model}.yaml; ls configs/ lists the recipes")
            for opts in self.variants.values():  # report mistakes in them before anything is measured
                BenchmarkCase(model, self.modes[0], self.dtypes[0], self.batch_sizes[0]).config(*opts)
        if "graphs" in self.compile_modes and self.device.type != "cuda":
            raise UserError("--compile-modes graphs: CUDA graphs need a GPU, and PyTorch finds none; leave it out")
        if "tuned" in self.compile_modes and not (self.subprocess and self.device.type == "cpu"):
            raise UserError(
                "--compile-modes tuned changes settings of its process, on a CPU: add --subprocess and --device cpu"
            )


def candidates(case: BenchmarkCase, options: StepOptions) -> Iterator[tuple[str, Build]]:
    """Names, and functions that build the step of each."""
    config, device = case.config(), options.device
    available = [name for name in options.libraries if build_with(name, architecture_of(config, CLASSES)) is not None]
    for compile_mode in options.compile_modes:
        for name, opts in options.variants.items() if compile_mode != "tuned" else ():
            yield f"{name}, {compile_mode}", partial(build_own_step, case, device, compile_mode, opts)
        for library in available:
            yield f"{library}, {compile_mode}", partial(build_peer_step, library, case, device, compile_mode)


def build_own_step(case: BenchmarkCase, device: torch.device, compile_mode: str, opts: Sequence[str]) -> Step:
    """This project's step, as main.py runs it."""
    compiling = ["TRAIN.COMPILE", compile_mode != "eager", "TRAIN.CUDA_GRAPHS", compile_mode == "graphs"]
    config = case.config(*compiling, *opts)
    dist_info = DistInfo.single(device)
    components = compile_and_wrap(config, dist_info, build_components(config, dist_info, None))
    batch = case.random_batch(device)
    if case.mode == "training":
        return training_step(components, batch, case.batch)
    return inference_step(components, batch)


def build_peer_step(library: str, case: BenchmarkCase, device: torch.device, compile_mode: str) -> Step:
    """Another library's model in a minimal loop."""
    config = case.config()
    peer = build_with(library, architecture_of(config, CLASSES))
    if peer is None:
        raise UserError(f"--libraries {library}: it has no model of the architecture of {case.model}; leave it out")
    model = Logits(peer).to(device)
    if compile_mode == "tuned":
        disable_malloc_trim()
    # Freezing packs weights once, for inference on a CPU. Compiled models here do so; peers' users have to ask for it.
    torch._inductor.config.freezing = compile_mode == "tuned"
    if compile_mode != "eager":
        model.compile(dynamic=False, mode="reduce-overhead" if compile_mode == "graphs" else None)
    return bare_step(case, device, model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))


def build_bare_step(case: BenchmarkCase, device: torch.device) -> Step:
    """This project's model and optimizer in the minimal loop of the peers, eager."""
    config = case.config()
    model = build_model(config, CLASSES).to(device)
    return bare_step(case, device, model, build_optimizer(config, model))


def bare_step(case: BenchmarkCase, device: torch.device, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """A step without metrics or checks."""
    batch = case.random_batch(device)
    images, target = batch["image"], batch["target"]
    loss_of = SoftTargetCrossEntropy()
    parameters = list(model.parameters())
    autocast = torch.autocast(device.type, DTYPES[case.dtype], enabled=case.dtype != "float32")
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def infer() -> None:
        with torch.inference_mode(), autocast:
            model(images)

    def train() -> None:
        with autocast:
            output = model(images)
        loss_of(output.float(), target).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train(case.mode == "training")
    return train if case.mode == "training" else infer


def measure_case(case: BenchmarkCase, builders: Iterator[tuple[str, Build]], options: StepOptions) -> Measured:
    """Images/s and GiB of each candidate."""
    steps: dict[str, Step] = {}
    memory: dict[str, float | None] = {}
    with ExitStack() as processes:
        for name, build in builders:
            try:
                if options.subprocess:
                    step = processes.enter_context(closing(SubprocessStep(start_step, build, options.device, name)))
                    steps[name], memory[name] = step, step.info
                else:
                    steps[name], memory[name] = start_step(build, options.device, name)
            except torch.OutOfMemoryError as error:
                memory[name] = None
                log.warning("%s, %s: does not fit in memory: %s", case, name, str(error).splitlines()[0])
        rates = compare_steps(steps, case.batch, options.device, options.seconds, options.rounds)
    measured = {name: (statistics.median(rates[name]) if name in rates else None, memory[name]) for name in memory}
    for name, (rate, _) in measured.items():
        label = " ".join(map(str, (case.model, case.mode, case.dtype, case.batch)))
        log.info("%s  %-22s %10.2f images/s  %6.2f GiB", label, name, rate or 0, measured[name][1] or 0)
    return measured


def start_step(build: Build, device: torch.device, name: str) -> tuple[Step, float | None]:
    """Builds a candidate's step and runs it at least once; returns it and the GiB that it takes."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = build()
    step()  # compiles, chooses kernels, creates the optimizer's state
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return step, (torch.cuda.max_memory_allocated(device) - before) / 2**30
    if not name.endswith("eager"):
        return step, None
    with MemoryTracker() as tracker:
        step()
    return step, tracker.peak / 2**30


def matrix_product(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product in `dtype`: the practical upper bound."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    return images_per_second(lambda: a @ b, 1, device, seconds=0.3, runs=3) * 2 * side**3


def data_sheet(dtype: str, device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((sheet.get(dtype) for known, sheet in DATA_SHEETS.items() if known in name), None)


def make_table(options: StepOptions) -> Table:
    """Measures all combinations. Raises UserError for options that do not go together."""
    options.check()
    table, products = Table("step", "A step compared with other libraries", COLUMNS), []
    for dtype in options.dtypes:
        peak = matrix_product(dtype, options.device)
        sheet = data_sheet(dtype, options.device)
        products.append(f"{peak / 1e12:.3g} TFLOP/s in {dtype}")
        shapes = ((model, mode, batch) for model in options.models for mode in options.modes
                  for batch in options.batch_sizes)  # fmt: skip
        for model, mode, batch in shapes:
            case = BenchmarkCase(model, mode, dtype, batch)
            table.rows += case_rows(case, measure_case(case, candidates(case, options), options), peak, sheet)
            torch._dynamo.reset()
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    run_note = f"Run: {options.rounds} interleaved rounds of {options.seconds:g} s; a large matrix product reached "
    table.notes = [COLUMNS_NOTE, " ".join([f"{run_note}{', '.join(products)}.", *circumstances()])]
    return table


def case_rows(case: BenchmarkCase, measured: Measured, peak: float, sheet: float | None) -> list[list]:
    flops = case.flops()
    peers = {name: rate for name, (rate, _) in measured.items() if rate and not name.startswith(HERE)}
    best = max((rate for name, rate in peers.items() if not name.endswith("tuned")), default=None)
    rows = []
    for name, (rate, memory) in measured.items():
        used = rate and rate * flops
        rows.append([
            case.model, case.mode, case.dtype, case.batch, name,
            rate, rate and best and rate / best, memory,
            used and 100 * used / peak, used and sheet and 100 * used / sheet,
        ])  # fmt: skip
    return rows


def merge_with_file(table: Table, path: Path) -> Table:
    """Adds the rows in `path` that `table` does not have, and the notes of the runs that measured them."""
    table.stem = path.stem
    header = [column.name for column in COLUMNS]
    csv_path = path.with_suffix(".csv")
    if not (path.is_file() and csv_path.is_file()):
        return table
    with open(csv_path, newline="") as file:
        csv_header, *old_rows = csv.reader(file)
    if csv_header != header:
        raise UserError(f"--write {path}: {csv_path} has other columns; give another file, or delete it")
    new_keys = {tuple(map(str, row[:KEY_COLUMNS])) for row in table.rows}
    kept: list[Sequence[object]] = [
        row[:KEY_COLUMNS] + [float(value) if value else None for value in row[KEY_COLUMNS:]]
        for row in old_rows
        if tuple(row[:KEY_COLUMNS]) not in new_keys
    ]
    table.rows = sorted(kept + table.rows, key=lambda row: (*map(str, row[:3]), int(str(row[3]))))
    table.notes[1:1] = [line[2:] for line in path.read_text().splitlines() if line.startswith("- Run: ")]
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = number(int, 1, 65536)
    parser.add_argument("--models", nargs="+", default=["swin_tiny"], metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=count, default=[8], metavar="N")
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--compile-modes", nargs="+", choices=COMPILE_MODES, default=["eager", "compiled"])
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME KEY VALUE")
    parser.add_argument("--no-here", action="store_true", help="without this project's step; its variants remain")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each candidate in each round (2)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="medians are taken over these (5)")
    parser.add_argument("--subprocess", action="store_true", help="each candidate in a process of its own")
    parser.add_argument("--write", type=user_path, metavar="FILE.md", help="add the rows to this file and FILE.csv")
    return parser


def run(argv: Sequence[str] | None) -> int:
    values = vars(build_parser().parse_args(argv))
    path, variants = values.pop("write"), values.pop("variant")
    here: dict[str, list[str]] = {} if values.pop("no_here") else {HERE: []}
    values["variants"] = here | {f"{HERE} {name}": opts for name, *opts in variants}
    values["device"] = choose_device(values["device"])
    if path is not None and path.suffix != ".md":
        raise UserError(f"--write {path}: the table is Markdown; give a name that ends in .md")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("engine").setLevel(logging.WARNING)  # it logs a line for each model that is built
    table = make_table(StepOptions(**values))
    if path is not None:
        merge_with_file(table, path).save(path.parent)
    print(table.terminal())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
