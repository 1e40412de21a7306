"""How fast a step is, and what it holds in memory, beside timm, torchvision and transformers in one run:

    python -m benchmarks.step                                              Swin-T, every way, on this machine
    python -m benchmarks.step --models swin_tiny swinv2_tiny_w16 --dtypes bfloat16 --batch-sizes 128 256 --write FILE.md

Tiny, on any CPU: python -m benchmarks.step --batch-sizes 1 --dtypes float32 --ways eager --turns 1 --seconds 0.1

A training step is forward, backward, clipping at 5.0 and an update by fused AdamW; here it is the main job's own, with
all that it counts and checks. Everything has its turn in each round; figures are medians over the rounds. A variant of
this project, such as --variant skip MODEL.DROP_PATH_SKIP True, is measured as "here skip". FILE.md, and FILE.csv beside
it, keep what earlier runs wrote: a row that is measured again is replaced.

With --apart each has a process of its own, as its users run it. Otherwise all share one, and what this project sets for
it on a CPU serves the others too. "tuned" is a compiled peer for which all is set that this project sets by itself; the
best peer is sought among the others.
"""

import argparse
import csv
import gc
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from yacs.config import CfgNode

from benchmarks.footprint import Ledger
from benchmarks.subprocess_step import Step, SubprocessStep
from benchmarks.throughput import bare_steps, interleave
from benchmarks.timing import Stopwatch
from config import get_config
from engine import train_step
from engine.setup import build_components, compile_and_wrap
from engine.throughput import inference_step, training_step
from models.build import architecture_of, build_model
from models.count import count_macs
from models.other_libraries import LIBRARIES, Logits, build_with
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.malloc import disable_malloc_trim
from utils.paths import REPO_ROOT
from utils.table import Column, Table, circumstances

log = logging.getLogger(__name__)

CLASSES = 1000
HERE = "here"
MODES = ("inference", "training")
WAYS = ("eager", "compiled", "tuned", "graphs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense arithmetic that the data sheets promise, FLOP/s; float32 without TensorFloat-32, as it is measured here.
DATA_SHEETS = {name: {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12} for name in ("H100", "H200")}

COLUMNS = [
    Column("model"), Column("mode"), Column("type"), Column("batch"), Column("implementation"),
    Column("images/s", ".2f"), Column("over the best peer", ".3f"), Column("memory, GiB", ".3f"),
    Column("of the matrix product, %", ".1f"), Column("of the data sheet, %", ".1f"),
]  # fmt: skip
MEANING = (
    "Medians. Memory: on a GPU the most that is allocated in a step, model and optimizer included; on a CPU the most "
    "that the tensors made in an eager step take, parameters and optimizer not. Arithmetic is that of the matrix "
    "products (models/count.py), three times the forward pass for training."
)
KEY = 5  # so many columns say what a row is


@dataclass(frozen=True)
class Case:
    """What one group of candidates has in common."""

    model: str
    mode: str
    dtype: str
    batch: int

    def config(self, *opts: object) -> CfgNode:
        """The recipe's configuration, for measuring."""
        said = ["DATA.BATCH_SIZE", self.batch, "AMP_DTYPE", self.dtype, "THROUGHPUT_MODE", True]
        return get_config(REPO_ROOT / "configs" / f"{self.model}.yaml", [*said, *opts])


Build = Callable[[], Step]


def candidates(
    case: Case,
    device: torch.device,
    other_libraries: Sequence[str],
    ways: Sequence[str],
    variants: dict[str, list[str]],
) -> Iterator[tuple[str, Build]]:
    """Names, and what builds the step of each."""
    config = case.config()
    architecture = architecture_of(config, CLASSES)
    offered = [name for name in other_libraries if build_with(name, architecture) is not None]
    for way in ways:
        for name, opts in variants.items() if way != "tuned" else ():
            yield f"{name}, {way}", partial(step_here, case, device, way, opts)
        for library in offered:
            yield f"{library}, {way}", partial(step_of, library, case, device, way)


def random_batch(case: Case, device: torch.device) -> dict:
    size = case.config().DATA.IMG_SIZE
    return {
        "image": torch.randn(case.batch, 3, size, size, device=device),
        "target": torch.rand(case.batch, CLASSES, device=device).softmax(1),
        "position": 0,
    }


def step_here(case: Case, device: torch.device, way: str, opts: Sequence[str]) -> Step:
    """The main job's own step."""
    compiling = ["TRAIN.COMPILE", way != "eager", "TRAIN.CUDA_GRAPHS", way == "graphs"]
    config = case.config(*compiling, *opts)
    dist_info = DistInfo.single(device)
    components = build_components(config, dist_info, CLASSES)
    compile_and_wrap(config, dist_info, components)
    batch = random_batch(case, device)
    return training_step(components, batch) if case.mode == "training" else inference_step(components, batch["image"])


def step_of(library: str, case: Case, device: torch.device, way: str) -> Step:
    """The plainest loop around another library's model."""
    config = case.config()
    model = Logits(build_with(library, architecture_of(config, CLASSES))).to(device)
    if way == "tuned":
        disable_malloc_trim()
    # Weights packed once, for inference on a CPU: compiled models here have it, elsewhere their users ask for it.
    torch._inductor.config.freezing = way == "tuned"
    if way != "eager":
        model.compile(dynamic=False, mode="reduce-overhead" if way == "graphs" else None)
    batch = random_batch(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    dtype = DTYPES[case.dtype] if case.dtype != "float32" else None
    infer, train = bare_steps(model, batch["image"], batch["target"], dtype, optimizer)
    return train if case.mode == "training" else infer


def measure(
    case: Case, builders: Iterator[tuple[str, Build]], device: torch.device, seconds: float, turns: int, apart: bool
) -> dict[str, tuple[float | None, float | None]]:
    """For each candidate images/s and GiB; None where it does not fit into the memory, or its memory is not counted."""
    steps, memory = {}, {}
    with ExitStack() as processes:
        for name, build in builders:
            try:
                if apart:
                    steps[name] = processes.enter_context(closing(SubprocessStep(begin, build, device, name)))
                    memory[name] = steps[name].known
                else:
                    steps[name], memory[name] = begin(build, device, name)
            except torch.OutOfMemoryError as error:
                memory[name] = None
                log.warning("%s, %s: does not fit into the memory: %s", case, name, str(error).splitlines()[0])
        rates = interleave(steps, case.batch, device, seconds, turns)
    found = {name: (statistics.median(rates[name]) if name in rates else None, memory[name]) for name in memory}
    for name, (rate, _) in found.items():
        shown = " ".join(map(str, (case.model, case.mode, case.dtype, case.batch)))
        log.info("%s  %-22s %10.2f images/s", shown, name, rate or 0)
    return found


def begin(build: Build, device: torch.device, name: str) -> tuple[Step, float | None]:
    """A candidate's step, run at least once, and the GiB that it takes."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = build()
    return step, peak_memory(step, device, before, name.endswith("eager"))


def peak_memory(step: Step, device: torch.device, before: int, eager: bool) -> float | None:
    """GiB that a step holds at most, its model and optimizer included.

    On a GPU as the allocator counts; on a CPU the tensors of an eager step, parameters and optimizer left out.
    """
    step()  # compiles, chooses kernels, makes the optimizer's state
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    if not eager:
        return None
    with Ledger() as ledger:
        step()
    return ledger.peak / 2**30


def matrix_product(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product in `dtype`: what arithmetic can be at most."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    return train_step.measure(lambda: a @ b, 1, device, seconds=0.3, runs=3) * 2 * side**3


def make(
    models: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    other_libraries: Sequence[str],
    ways: Sequence[str],
    variants: dict[str, list[str]],
    device: str,
    seconds: float,
    turns: int,
    apart: bool = False,
) -> Table:
    """Measures all combinations.

    Raises:
        UserError: no such recipe, no GPU, or values that do not go together.
    """
    place = Stopwatch.on(device, 0, seconds, turns, "").device
    if min([*batch_sizes, turns]) < 1:
        raise UserError("--batch-sizes and --turns count from 1")
    for model in models:
        if not (REPO_ROOT / "configs" / f"{model}.yaml").is_file():
            raise UserError(f"--models {model}: there is no configs/{model}.yaml; ls configs/ shows what there is")
        for opts in variants.values():  # mistakes in them before anything is measured
            Case(model, modes[0], dtypes[0], batch_sizes[0]).config(*opts)
    if "graphs" in ways and place.type != "cuda":
        raise UserError("--ways graphs: CUDA graphs need a GPU, and PyTorch finds none; leave it out")
    if "tuned" in ways and not (apart and place.type == "cpu"):
        raise UserError("--ways tuned sets things for its process, on a CPU: give it --apart and --device cpu")
    table, products = Table("step", "A step beside the peers", COLUMNS), []
    for dtype in dtypes:
        peak = matrix_product(dtype, place)
        sheet = data_sheet(dtype, place)
        products.append(f"{peak / 1e12:.3g} TFLOP/s in {dtype}")
        for case in (Case(m, mode, dtype, batch) for m in models for mode in modes for batch in batch_sizes):
            found = measure(
                case, candidates(case, place, other_libraries, ways, variants), place, seconds, turns, apart
            )
            table.rows += rows_of(case, found, peak, sheet)
            torch._dynamo.reset()
            gc.accumulate_master_grads()
            if place.type == "cuda":
                torch.cuda.empty_cache()
    table.notes = [MEANING]
    table.notes.append(" ".join([
        f"Run: {turns} interleaved turns of {seconds:g} s; a large matrix product reached {', '.join(products)}.",
        *circumstances(),
    ]))  # fmt: skip
    return table


def data_sheet(dtype: str, device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((sheet.get(dtype) for known, sheet in DATA_SHEETS.items() if known in name), None)


def rows_of(case: Case, found: dict, peak: float, sheet: float | None) -> list[list]:
    config = case.config()
    with torch.device("meta"):
        macs = count_macs(build_model(config, CLASSES), config.DATA.IMG_SIZE)
    flops = 2 * macs * (3 if case.mode == "training" else 1)
    peers = {name: rate for name, (rate, _) in found.items() if rate and not name.startswith(HERE)}
    best = max((rate for name, rate in peers.items() if not name.endswith("tuned")), default=None)
    rows = []
    for name, (rate, memory) in found.items():
        used = rate and rate * flops
        rows.append([
            case.model, case.mode, case.dtype, case.batch, name,
            rate, rate and best and rate / best, memory,
            used and 100 * used / peak, used and sheet and 100 * used / sheet,
        ])  # fmt: skip
    return rows


def merged(table: Table, path: Path) -> Table:
    """`table` with the rows that earlier runs wrote to `path` and it does not have, and their notes before its own."""
    table.stem = path.stem
    heads = [column.name for column in COLUMNS]
    old_csv = path.with_suffix(".csv")
    if not (path.is_file() and old_csv.is_file()):
        return table
    with open(old_csv, newline="") as file:
        found, *old = csv.reader(file)
    if found != heads:
        raise UserError(f"--write {path}: {old_csv} has other columns; give another file, or delete it")
    new = {tuple(map(str, row[:KEY])) for row in table.rows}
    kept = [row[:KEY] + [float(value) if value else None for value in row[KEY:]] for row in old]
    rows = [row for row in kept if tuple(row[:KEY]) not in new] + table.rows
    table.rows = sorted(rows, key=lambda row: (*row[:3], int(row[3])))
    notes = [line[2:] for line in path.read_text().splitlines() if line.startswith("- Run: ")]
    table.notes[1:1] = notes
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["swin_tiny"], metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8], metavar="N")
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "compiled"])
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME KEY VALUE")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each candidate in each turn (2)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="medians are taken over these (5)")
    parser.add_argument("--apart", action="store_true", help="each in a process of its own")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="add the rows to this file and FILE.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    path, given = options.pop("write"), options.pop("variant")
    options["variants"] = {HERE: []} | {f"{HERE} {name}": opts for name, *opts in given}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("engine").setLevel(logging.WARNING)  # a line for each learner that is built
    try:
        if path is not None and path.suffix != ".md":
            raise UserError(f"--write {path}: the table is Markdown; give a name that ends in .md")
        table = make(**options)
        if path is not None:
            merged(table, path).save(path.parent)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table.terminal())
    return 0


if __name__ == "__main__":
    sys.exit(main())
