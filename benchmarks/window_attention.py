"""Window attention alone: the bytes that each path moves, and on a GPU how long it takes beside them.

    python -m benchmarks.window_attention                       # counts; measures too where there is a GPU
    python -m benchmarks.window_attention --write FILE.md --batch-size 64

Counted as in `benchmarks.footprint`: what each operation of eager PyTorch reads and writes, in bfloat16 with the bias
in float32. The floor is what cannot be avoided: queries, keys, values and the gradient of the output read once, output
and gradients written once. What a kernel reads again within itself is not seen by the count, but by the clock.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.footprint import FusedAttention, Ledger
from models.ops import dispatch as ops
from models.ops.window import ShiftedWindows
from utils.errors import UserError
from utils.files import write_text
from utils.table import Column, Table, circumstances

PATHS = ("reference", "sdpa", "triton")
WIDTH = 32  # of a head, in every Swin that was released
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}  # bytes/s of the memory, as NVIDIA's data sheets say


class Shape(NamedTuple):
    """A map of side × side tokens in windows of window², and the heads that attend in each."""

    name: str
    side: int
    window: int
    heads: int


STAGES = [Shape(f"Swin-T, stage {i + 1}", 56 >> i, 7, 3 << i) for i in range(4)]
WINDOWS = [
    Shape("49 tokens", 56, 7, 3),
    Shape("64 tokens", 64, 8, 3),
    Shape("144 tokens", 96, 12, 4),
    Shape("256 tokens", 64, 16, 3),
]


class Use:
    """One use of the operation on `device`: an output and a way to its gradients."""

    def __init__(self, shape: Shape, shifted: bool, impl: str, batch_size: int, device: str):
        tokens, size = shape.window**2, (batch_size, shape.side, shape.side)
        self.qkv = torch.randn(*size, 3, shape.heads, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.bias = torch.randn(shape.heads, tokens, tokens, device=device, requires_grad=True)
        self.gradient = torch.randn(*size, shape.heads * WIDTH, device=device, dtype=torch.bfloat16)
        self.windows = ShiftedWindows((shape.side, shape.side), shape.window, shifted).to(device)
        self.impl = impl

    def forward(self) -> Tensor:
        return ops.window_attention(self.qkv, self.bias, self.windows, WIDTH**-0.5, impl=self.impl)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (self.qkv, self.bias), self.gradient, retain_graph=True)

    def floor(self) -> tuple[int, int]:
        """Bytes that a forward and a backward pass have to move."""
        large, small = self.qkv.nbytes, self.bias.nbytes
        return large + small + large // 3, 2 * large + large // 3 + 2 * small


def counted(shape: Shape, shifted: bool, impl: str, batch_size: int) -> tuple[int, int]:
    """Bytes that the operations of a forward and of a backward pass would move on a GPU.

    Of tensors without contents, and not on "cuda", whose backward pass would look for the GPU.
    """
    with FakeTensorMode(), mock.patch.dict(ops.UNSUPPORTED_REASON, triton=lambda case: ""), FusedAttention():
        use = Use(shape, shifted, impl, batch_size, "cpu")
        with Ledger() as ledger:
            out = use.forward()
        forward = sum(ledger.moved.values())
        with Ledger() as ledger:
            use.backward(out)
        return forward, sum(ledger.moved.values())


def count(shapes: Sequence[Shape], batch_size: int) -> Table:
    columns = [
        Column("map"), Column("shifted"), Column("path"), Column("forward, MB an image", ".2f"),
        Column("backward, MB an image", ".2f"), Column("over the floor", ".1f"),
        Column("µs an image at 4.8 TB/s", ".2f"), Column("at 3.35 TB/s", ".2f"),
    ]  # fmt: skip
    table = Table("window_attention_bytes", "Bytes that window attention moves, counted", columns)
    for shape in shapes:
        for shifted in (False, True) if shape.side > shape.window else (False,):
            with FakeTensorMode():
                floor = Use(shape, shifted, "reference", batch_size, "cpu").floor()
            paths = {path: counted(shape, shifted, path, batch_size) for path in PATHS}
            for path, (forward, backward) in paths.items():
                total = forward + backward
                times = [total / batch_size / speed * 1e6 for speed in (BANDWIDTH["H200"], BANDWIDTH["H100"])]
                megabytes = [size / batch_size / 1e6 for size in (forward, backward)]
                row = [shape.name, "yes" if shifted else "no", path, *megabytes, total / sum(floor), *times]
                table.rows.append(row)
    table.notes.append(
        f"For one block, counted with {batch_size} images at a time, bfloat16, heads of {WIDTH}. A path at 1.0 moves "
        "what cannot be avoided; what a kernel reads again within itself is not counted."
    )
    return table


def milliseconds(step: Callable[[], object], seconds: float) -> float:
    """The median time of `step` on the GPU, over as many runs as fit into `seconds`, at least five."""
    for _ in range(3):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def bandwidth() -> tuple[float, str]:
    """Bytes per second of the GPU's memory, and where the figure is from."""
    name = torch.cuda.get_device_name()
    for known, speed in BANDWIDTH.items():
        if known in name:
            return speed, f"{speed / 1e12:g} TB/s, as its data sheet says"
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    speed = 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), 0.5) / 1e3)
    return speed, f"{speed / 1e12:.2f} TB/s, measured by a copy of 1 GiB"


def measure(shapes: Sequence[Shape], batch_size: int, seconds: float) -> Table:
    columns = [
        Column("windows of"), Column("shifted"), Column("path"),
        Column("forward, ms", ".3f"), Column("of bandwidth", ".0%"), Column("of SDPA's time", ".2f"),
        Column("backward, ms", ".3f"), Column("of bandwidth", ".0%"), Column("of SDPA's time", ".2f"),
    ]  # fmt: skip
    table = Table("window_attention", "Window attention alone, measured", columns)
    speed, source = bandwidth()
    for shape in shapes:
        for shifted in (False, True):
            peer = None
            for path in ("sdpa", "triton"):
                use = Use(shape, shifted, path, batch_size, "cuda")
                out = use.forward()
                times = [milliseconds(use.forward, seconds), milliseconds(lambda u=use, o=out: u.backward(o), seconds)]
                peer = peer or times
                cells = [
                    [taken, floor / (taken / 1e3) / speed, taken / other]
                    for taken, floor, other in zip(times, use.floor(), peer, strict=True)
                ]
                table.rows.append([shape.name, "yes" if shifted else "no", path, *cells[0], *cells[1]])
                del use, out
                torch.cuda.empty_cache()
    table.notes += [
        f"{batch_size} maps at a time, bfloat16, heads of {WIDTH}; medians of {seconds:g} s each. Of bandwidth: the "
        f"bytes that cannot be avoided over the time, beside {source}.",
    ]
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.window_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="maps at a time (64)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement (0.2)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file for the tables")
    args = parser.parse_args(argv)
    try:
        if args.batch_size < 1:
            raise UserError(f"--batch-size {args.batch_size}: at least 1 map is needed")
        tables = [count([*STAGES, *WINDOWS[1:]], args.batch_size)]
        if torch.cuda.is_available():
            tables.append(measure(WINDOWS, args.batch_size, args.seconds))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for table in tables:
        table.notes += circumstances()
        print(table.terminal())
    if args.write:
        write_text(args.write, "\n".join(table.markdown() for table in tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
