"""Counts the bytes that each implementation of window attention moves, and measures its time if there is a GPU:

    python -m benchmarks.window_attention                       # counts; measures too if there is a GPU
    python -m benchmarks.window_attention --write FILE.md --batch-size 64

Counted as in `benchmarks.footprint`: what each operation of eager PyTorch reads and writes, in bfloat16 with the bias
in float32. The floor is unavoidable traffic: queries, keys, values and the gradient of the output read once, output and
gradients written once. Repeated reads within a kernel are not counted, but they show in its time.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.footprint import EfficientAttentionMode, MemoryTracker
from benchmarks.timing import Step
from engine.throughput import images_per_second
from models.ops import dispatch as ops
from models.ops.window import ShiftedWindows
from utils.cli import CliParser, number, run_cli, user_path
from utils.files import write_text
from utils.table import Column, Table, circumstances

IMPLEMENTATIONS = ("reference", "sdpa", "triton")
HEAD_DIM = 32  # in every released Swin
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}  # bytes/s of the memory, from NVIDIA's data sheets
ROUNDS = 5
CALLS = 20  # captured in one graph

log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """A map of side × side tokens in windows of window² tokens, and the number of heads."""

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


class AttentionCall:
    """Inputs of the attention operation, and calls of its forward and backward pass."""

    def __init__(self, shape: Shape, shifted: bool, impl: str, batch_size: int, device: str):
        tokens, size = shape.window**2, (batch_size, shape.side, shape.side)
        self.qkv = torch.randn(*size, 3, shape.heads, HEAD_DIM, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.bias = torch.randn(shape.heads, tokens, tokens, device=device, requires_grad=True)
        self.grad_out = torch.randn(*size, shape.heads * HEAD_DIM, device=device, dtype=torch.bfloat16)
        self.windows = ShiftedWindows((shape.side, shape.side), shape.window, shifted).to(device)
        self.impl = impl

    def forward(self) -> Tensor:
        """(B, H, W, C)"""
        return ops.window_attention(self.qkv, self.bias, self.windows, HEAD_DIM**-0.5, impl=self.impl)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (self.qkv, self.bias), self.grad_out, retain_graph=True)

    def floor(self) -> tuple[int, int]:
        """Bytes that a forward and a backward pass have to move."""
        qkv, bias = self.qkv.nbytes, self.bias.nbytes
        return qkv + bias + qkv // 3, 2 * qkv + qkv // 3 + 2 * bias


def count_bytes(shape: Shape, shifted: bool, impl: str, batch_size: int) -> tuple[int, int]:
    """Bytes that a forward and a backward pass would move on a GPU.

    Uses fake tensors on "cpu": on "cuda" their backward pass would look for the GPU.
    """
    supported = mock.patch.dict(ops.UNSUPPORTED_REASON, triton=lambda spec: "")
    with FakeTensorMode(), supported, EfficientAttentionMode():
        call = AttentionCall(shape, shifted, impl, batch_size, "cpu")
        with MemoryTracker() as tracker:
            out = call.forward()
        forward = sum(tracker.moved.values())
        with MemoryTracker() as tracker:
            call.backward(out)
        return forward, sum(tracker.moved.values())


def bytes_table(shapes: Sequence[Shape], batch_size: int) -> Table:
    columns = [
        Column("map"), Column("shifted"), Column("path"), Column("forward, MB an image", ".2f"),
        Column("backward, MB an image", ".2f"), Column("over the floor", ".1f"),
        Column("µs an image at 4.8 TB/s", ".2f"), Column("at 3.35 TB/s", ".2f"),
    ]  # fmt: skip
    table = Table("window_attention_bytes", "Bytes that window attention moves, counted", columns)
    for shape in shapes:
        for shifted in (False, True) if shape.side > shape.window else (False,):
            with FakeTensorMode():
                floor = AttentionCall(shape, shifted, "reference", batch_size, "cpu").floor()
            for impl in IMPLEMENTATIONS:
                forward, backward = count_bytes(shape, shifted, impl, batch_size)
                total = forward + backward
                times = [total / batch_size / speed * 1e6 for speed in (BANDWIDTH["H200"], BANDWIDTH["H100"])]
                megabytes = [size / batch_size / 1e6 for size in (forward, backward)]
                row = [shape.name, "yes" if shifted else "no", impl, *megabytes, total / sum(floor), *times]
                table.rows.append(row)
    table.notes.append(
        f"For one block, counted with {batch_size} images at a time, bfloat16, heads of {HEAD_DIM}. A path at 1.0 has "
        "only unavoidable traffic; repeated reads within a kernel are not counted."
    )
    return table


def seconds_per_call(step: Step, seconds: float, stream: torch.cuda.Stream) -> tuple[float, str]:
    """Median time of a call of `step` on the GPU, over `ROUNDS` runs in `seconds`, and how it was timed.

    A kernel can take less time than the CPU needs to launch it, so `CALLS` calls are captured in a CUDA graph and
    replayed with one launch. Where they cannot be captured, they are launched, and the result may be the launch's time.

    Args:
        stream: the one on which the forward pass ran, since a backward pass runs on the same.
    """
    device = torch.device("cuda")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            step()  # compiles, allocates
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                step()
    except RuntimeError as error:
        log.warning("a call is launched each time, because it cannot be captured: %s", str(error).splitlines()[0])
        with torch.cuda.stream(stream):
            return 1 / images_per_second(step, 1, device, seconds / ROUNDS, ROUNDS), "launches"
    return 1 / images_per_second(graph.replay, CALLS, device, seconds / ROUNDS, ROUNDS), "graph"


def gpu_bandwidth() -> tuple[float, str]:
    """Bytes per second of the GPU's memory, and the source of this number."""
    name = torch.cuda.get_device_name()
    for known, speed in BANDWIDTH.items():
        if known in name:
            return speed, f"{speed / 1e12:g} TB/s, from its data sheet"
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    taken, _ = seconds_per_call(lambda: target.copy_(source), 0.5, torch.cuda.Stream())
    speed = 2 * source.nbytes / taken
    return speed, f"{speed / 1e12:.2f} TB/s, measured by a copy of 1 GiB"


def time_table(shapes: Sequence[Shape], batch_size: int, seconds: float) -> Table:
    columns = [
        Column("windows of"), Column("shifted"), Column("path"),
        Column("forward, ms", ".3f"), Column("of bandwidth", ".0%"), Column("of SDPA's time", ".2f"),
        Column("backward, ms", ".3f"), Column("of bandwidth", ".0%"), Column("of SDPA's time", ".2f"),
        Column("timed by"),
    ]  # fmt: skip
    table = Table("window_attention", "Window attention alone, measured", columns)
    bandwidth, source = gpu_bandwidth()
    for shape in shapes:
        for shifted in (False, True):
            sdpa_times: list[float] = []
            for impl in ("sdpa", "triton"):
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    call = AttentionCall(shape, shifted, impl, batch_size, "cuda")
                    out = call.forward()
                steps: list[Step] = [call.forward, partial(call.backward, out)]
                timed = [seconds_per_call(step, seconds, stream) for step in steps]
                times = [taken for taken, _ in timed]
                sdpa_times = sdpa_times or times
                row: list[object] = [shape.name, "yes" if shifted else "no", impl]
                for taken, floor, sdpa in zip(times, call.floor(), sdpa_times, strict=True):
                    row += [taken * 1e3, floor / taken / bandwidth, taken / sdpa]
                table.rows.append([*row, ", ".join(dict.fromkeys(how for _, how in timed))])
                del call, out, steps, timed
                torch.cuda.empty_cache()
    table.notes += [
        f"{batch_size} maps at a time, bfloat16, heads of {HEAD_DIM}; medians of {seconds:g} s each. Of bandwidth: the "
        f"unavoidable bytes divided by the time, relative to {source}.",
        f"Timed by: graph, {CALLS} calls replayed as one CUDA graph, without their launches; launches, one by one.",
    ]
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m benchmarks.window_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help="maps at a time (64)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement (0.2)")
    parser.add_argument("--write", type=user_path, metavar="FILE", help="Markdown file for the tables")
    return parser


def run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    tables = [bytes_table([*STAGES, *WINDOWS[1:]], args.batch_size)]
    if torch.cuda.is_available():
        tables.append(time_table(WINDOWS, args.batch_size, args.seconds))
    for table in tables:
        table.notes += circumstances()
        print(table.terminal())
    if args.write:
        write_text(args.write, "\n".join(table.markdown() for table in tables))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
