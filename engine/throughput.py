"""Measuring images per second."""

import itertools
import logging
from collections.abc import Callable

import torch
from yacs.config import CfgNode

from engine import train_step
from engine.setup import build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState
from models.build import input_channels
from utils.distributed.process_group import DistInfo
from utils.precision import describe
from utils.tracking.progress import memory_gib
from utils.tracking.run_dir import hardware

log = logging.getLogger(__name__)


def throughput(config: CfgNode, dist_info: DistInfo) -> None:
    """Measures images/s of inference and of training on random images, without reading any data."""
    size, channels, batch_size = config.DATA.IMG_SIZE, input_channels(config), config.DATA.BATCH_SIZE
    num_classes = config.MODEL.NUM_CLASSES or 1000
    components = build_components(config, dist_info, num_classes)
    compile_and_wrap(config, dist_info, components)
    batch = {
        "image": torch.randn(batch_size, channels, size, size, device=dist_info.device),
        "target": torch.rand(batch_size, num_classes, device=dist_info.device).softmax(1),
        "position": 0,
    }
    infer = inference_step(components, batch["image"])
    first = train_step.seconds_for(infer, 1, dist_info.device)
    rate = train_step.measure(infer, batch_size, dist_info.device)
    log_throughput("inference", rate, first, components, batch_size)
    if dist_info.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(dist_info.device)
    global_batch = batch_size * config.TRAIN.ACCUMULATION_STEPS
    update = training_step(components, batch)
    first = train_step.seconds_for(update, 1, dist_info.device)
    rate = train_step.measure(update, global_batch, dist_info.device)
    log_throughput("training", rate, first, components, batch_size)


def inference_step(components: TrainComponents, images: torch.Tensor) -> Callable[[], None]:
    """A forward pass of the learner's model over `images`."""

    @torch.inference_mode()
    def infer() -> None:
        components.module_without_ddp.eval()
        with components.autocast():
            components.module_without_ddp.model(images)

    return infer


def training_step(components: TrainComponents, batch: dict) -> Callable[[], object]:
    """An update by the training loop, with all that it counts and checks; each of its micro-batches is `batch`."""
    global_batch = len(batch["image"]) * components.grad_accum_steps
    updates = train_step.train(components, itertools.repeat(batch), TrainState(), lambda update: 1e-6, global_batch)
    return lambda: next(updates)


def log_throughput(what: str, rate: float, first: float, components: TrainComponents, batch_size: int) -> None:
    log.info(
        "%-9s  %8.1f images/s per process  %s  batch %d  peak memory %.2f GiB  first step %.1f s  %s",
        what, rate, describe(components.amp_dtype), batch_size, memory_gib(components.device), first, hardware(),
    )  # fmt: skip
