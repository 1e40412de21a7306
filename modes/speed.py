"""Measuring images per second."""

import itertools
import logging

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

    @torch.inference_mode()
    def infer() -> None:
        with learner.autocast():
            learner.bare.model(batch["image"])

    learner.bare.eval()
    say_throughput("inference", engine.measure(infer, batch_size, process.device), learner, batch_size)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    global_batch = batch_size * config.TRAIN.ACCUMULATION_STEPS
    updates = engine.train(learner, itertools.repeat(batch), TrainState(), lambda update: 1e-6, global_batch)
    rate = engine.measure(lambda: next(updates), global_batch, process.device)
    say_throughput("training", rate, learner, batch_size)


def say_throughput(what: str, rate: float, learner: Learner, batch_size: int) -> None:
    log.info(
        "%-9s  %8.1f images/s per process  %s  batch %d  peak memory %.2f GiB  %s",
        what, rate, describe(learner.amp_dtype), batch_size, memory_gib(learner.device), hardware(),
    )  # fmt: skip
