"""Measuring images per second."""

import itertools
import logging
from collections.abc import Callable

import torch
from yacs.config import CfgNode

import engine
from engine import Learner, TrainState
from models.build import input_channels
from modes.learner import build_learner, prepare_for_speed
from utils.dist import Process
from utils.precision import describe
from utils.progress import memory_gib
from utils.run_folder import hardware

log = logging.getLogger(__name__)


def throughput(config: CfgNode, process: Process) -> None:
    """Measures images/s of inference and of training on random images, without reading any data."""
    size, channels, batch_size = config.DATA.IMG_SIZE, input_channels(config), config.DATA.BATCH_SIZE
    num_classes = config.MODEL.NUM_CLASSES or 1000
    learner = build_learner(config, process, num_classes)
    prepare_for_speed(config, process, learner)
    batch = {
        "image": torch.randn(batch_size, channels, size, size, device=process.device),
        "target": torch.rand(batch_size, num_classes, device=process.device).softmax(1),
        "position": 0,
    }
    infer = inference_step(learner, batch["image"])
    first = engine.seconds_for(infer, 1, process.device)
    rate = engine.measure(infer, batch_size, process.device)
    say_throughput("inference", rate, first, learner, batch_size)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    global_batch = batch_size * config.TRAIN.ACCUMULATION_STEPS
    update = training_step(learner, batch)
    first = engine.seconds_for(update, 1, process.device)
    rate = engine.measure(update, global_batch, process.device)
    say_throughput("training", rate, first, learner, batch_size)


def inference_step(learner: Learner, images: torch.Tensor) -> Callable[[], None]:
    """A forward pass of the learner's model over `images`."""

    @torch.inference_mode()
    def infer() -> None:
        learner.bare.eval()
        with learner.autocast():
            learner.bare.model(images)

    return infer


def training_step(learner: Learner, batch: dict) -> Callable[[], object]:
    """An update by the training loop, with all that it counts and checks; each of its micro-batches is `batch`."""
    global_batch = len(batch["image"]) * learner.accumulation
    updates = engine.train(learner, itertools.repeat(batch), TrainState(), lambda update: 1e-6, global_batch)
    return lambda: next(updates)


def say_throughput(what: str, rate: float, first: float, learner: Learner, batch_size: int) -> None:
    log.info(
        "%-9s  %8.1f images/s per process  %s  batch %d  peak memory %.2f GiB  first step %.1f s  %s",
        what, rate, describe(learner.amp_dtype), batch_size, memory_gib(learner.device), first, hardware(),
    )  # fmt: skip
