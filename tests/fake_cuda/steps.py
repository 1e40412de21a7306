"""Makes training steps on the stand-in CUDA runtime and prints as JSON what one launches:

    python -m tests.fake_cuda python -m tests.fake_cuda.steps configs/demo.yaml --opts AMP_DTYPE bfloat16
    python -m tests.fake_cuda python -m tests.fake_cuda.steps configs/demo.yaml --ddp --opts TRAIN.COMPILE True

The step is the training loop's own. PyTorch raises an error where the host would wait for the device in it.
"""

import argparse
import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from config import get_config
from engine.setup import build_components, compile_and_wrap
from engine.throughput import training_step
from tests._process_group import group_of_one
from tests.fake_cuda.counters import count, forbid_syncs
from utils.distributed.process_group import DistInfo

STEPS_BEFORE = 3  # they compile, choose kernels, make the optimizer's state and DDP's buckets
BATCH_SIZE = 4
# Nothing is computed, so losses and gradients are whatever was in memory; not finite ones must not stop the run.
OPTS = ["DATA.BATCH_SIZE", BATCH_SIZE, "TRAIN.MAX_BAD_STEPS", 100_000]


def measure(cfg: str, opts: list[str], ddp: bool, by_name: Path | None) -> dict[str, float]:
    """Returns the launches and synchronisations of one step, and the milliseconds that the CPU takes for it."""
    config = get_config(cfg, [*OPTS, *opts])
    dist_info = DistInfo.single(torch.device("cuda", 0))
    components = build_components(config, dist_info, None)
    if ddp:
        dist_info = replace(dist_info, world_size=2)  # a single process is not wrapped; the group itself is of one
    components = compile_and_wrap(config, dist_info, components)
    batch = components.module_without_ddp.example_batch(BATCH_SIZE, dist_info.device)
    step = training_step(components, batch, BATCH_SIZE)
    for _ in range(STEPS_BEFORE):
        step()
    forbid_syncs(step)
    counts = count(step, by_name)
    start = time.perf_counter()
    step()
    return {"launches": counts.launches, "syncs": counts.syncs, "ms": 1e3 * (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg", metavar="FILE.yaml")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="+", default=[])
    parser.add_argument("--ddp", action="store_true", help="in a group of one process")
    parser.add_argument("--by-name", type=Path, metavar="FILE", help="write how often each kernel is launched")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.cuda.set_device(0)
    if args.ddp:
        with group_of_one(torch.device("cuda", 0)):
            print(json.dumps(measure(args.cfg, args.opts, True, args.by_name)))
    else:
        print(json.dumps(measure(args.cfg, args.opts, False, args.by_name)))


if __name__ == "__main__":
    main()
