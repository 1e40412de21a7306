"""Throughput: images per second of inference and of training (`main.py --throughput`)."""

import itertools
import logging
import statistics
import time
from collections.abc import Callable

import torch
from yacs.config import CfgNode

from engine.setup import build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState, train_steps
from tasks.task import Batch
from utils.distributed.process_group import DistInfo
from utils.precision import describe
from utils.tracking.progress import memory_gib
from utils.tracking.run_dir import hardware

log = logging.getLogger(__name__)


def measure_throughput(config: CfgNode, dist_info: DistInfo) -> None:
    """Measures images/s of inference and of training on random inputs, without reading any data."""
    components = compile_and_wrap(config, dist_info, build_components(config, dist_info, None))
    batch_size = config.DATA.BATCH_SIZE
    batch = components.module_without_ddp.example_batch(batch_size, dist_info.device)
    _measure_and_log("inference", inference_step(components, batch), batch_size, components, batch_size)
    if dist_info.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(dist_info.device)
    step = training_step(components, batch, batch_size)
    _measure_and_log("training", step, batch_size * components.grad_accum_steps, components, batch_size)


def inference_step(components: TrainComponents, batch: Batch) -> Callable[[], None]:
    """Returns a function that makes one forward pass over `batch`."""
    task = components.module_without_ddp

    @torch.inference_mode()
    def infer() -> None:
        task.eval()
        with components.autocast():
            task.predict(batch)

    return infer


def training_step(components: TrainComponents, batch: Batch, batch_size: int) -> Callable[[], object]:
    """Returns a function that makes one step of the training loop; each of its micro-batches is `batch`."""
    global_batch_size = batch_size * components.grad_accum_steps
    steps = train_steps(components, itertools.repeat(batch), TrainState(), lambda step: 1e-6, global_batch_size)
    return lambda: next(steps)


def seconds_for(step: Callable[[], object], times: int, device: torch.device) -> float:
    """Returns the wall-clock seconds of `times` calls of `step`, until the device has finished them."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def calibrate(step: Callable[[], object], images: int, device: torch.device, seconds: float) -> Callable[[], float]:
    """Warms `step` up and returns a function that runs it for about `seconds` and returns images/s.

    Args:
        images: how many images one call of `step` handles.
    """
    seconds_for(step, 2, device)  # warm-up: kernels are chosen, memory is allocated
    times = max(1, round(seconds / seconds_for(step, 1, device)))
    return lambda: times * images / seconds_for(step, times, device)


def images_per_second(
    step: Callable[[], object], images: int, device: torch.device, seconds: float = 2.0, runs: int = 5
) -> float:
    """Returns the images/s of `step`, which handles `images` images: the median of `runs` runs of `seconds` each."""
    run = calibrate(step, images, device, seconds)
    return statistics.median(run() for _ in range(runs))


def _measure_and_log(
    name: str, step: Callable[[], object], images: int, components: TrainComponents, batch_size: int
) -> None:
    first = seconds_for(step, 1, components.device)
    log.info(
        "%-9s  %8.1f images/s per process  %s  batch %d  peak memory %.2f GiB  first step %.1f s  %s",
        name,
        images_per_second(step, images, components.device),
        describe(components.amp_dtype),
        batch_size,
        memory_gib(components.device),
        first,
        hardware(),
    )
