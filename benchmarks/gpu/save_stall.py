"""Measures how long training stands still while it saves, and how long the file takes in the background:

python -m benchmarks.gpu.save_stall --models swin_tiny swin_base
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.step import BenchmarkCase
from benchmarks.timing import choose_device
from engine.setup import build_components, compile_and_wrap
from engine.throughput import training_step
from utils.checkpoint.async_saver import AsyncCheckpointer
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import not_finite
from utils.checkpoint.schema import FORMAT
from utils.cli import CliParser, number, run_cli
from utils.distributed.process_group import DistInfo


def measure_saves(model: str, batch_size: int, saves: int, device: torch.device) -> None:
    """Prints a line for each save. The first one allocates page-locked memory."""
    case = BenchmarkCase(model, "training", "bfloat16", batch_size)
    config = case.config("TRAIN.COMPILE", False)
    dist_info = DistInfo.single(device)
    components = compile_and_wrap(config, dist_info, build_components(config, dist_info, None))
    step = training_step(components, case.random_batch(device), batch_size)
    step()
    step()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(Path(folder, "checkpoints"), 1)
        checkpoints.prepare()
        with closing(AsyncCheckpointer(checkpoints)) as checkpointer:
            for number_of_save in range(1, saves + 1):
                times = [_now(device)]
                contents = {**components.state_dict(), "format": FORMAT}
                not_finite(contents)
                times.append(time.perf_counter())
                checkpointer.save(contents)
                times.append(time.perf_counter())
                times.append(_now(device))
                checkpointer.wait()
                times.append(time.perf_counter())
                checked, queued, copied, written = (b - a for a, b in zip(times, times[1:], strict=False))
                print(
                    f"{model}, save {number_of_save}: training waits {checked:.3f} s for the check of values and "
                    f"{queued:.3f} s for the copies to be queued; {copied:.3f} s copying, {written:.2f} s writing",
                    flush=True,
                )


def _now(device: torch.device) -> float:
    """The time when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(argv: Sequence[str] | None) -> int:
    parser = CliParser(
        prog="python -m benchmarks.gpu.save_stall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["swin_tiny"], metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help="(64)")
    parser.add_argument("--saves", type=number(int, 1, 1000), default=3, metavar="N", help="of each model (3)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args(argv)
    for model in args.models:
        measure_saves(model, args.batch_size, args.saves, choose_device(args.device))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
