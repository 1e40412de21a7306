"""Chooses the task of a configuration, with the data that it needs."""

import logging
from collections.abc import Callable

from yacs.config import CfgNode

from data.build import (
    Data,
    TrainBatches,
    ValBatches,
    build_datasets,
    build_eval_preset,
    build_mixup,
    build_train_transform,
    model_inputs,
)
from data.datasets.classes import WeightClasses
from models.build import build_model, input_channels
from tasks.classification import Classification
from tasks.task import Task
from utils.distributed.process_group import DistInfo

log = logging.getLogger(__name__)


def open_data(config: CfgNode, dist_info: DistInfo, read_weights: Callable[[], WeightClasses] | None = None) -> Data:
    """Opens the data sets of the task. For the argument `read_weights` and errors see `data.build.build_datasets`."""
    data = build_datasets(config, dist_info, read_weights)
    train = "" if data.train is None else f"{len(data.train):,} training and "
    log.info("%s%s validation images of %s classes", train, f"{len(data.val):,}", f"{data.num_classes:,}")
    return data


def build_task(config: CfgNode, data: Data | None) -> Task:
    """Builds the task with its model, whose weights are random, on the CPU.

    Args:
        data: None where speed is measured without any; the number of classes is then that of the configuration.
    """
    num_classes = (config.MODEL.NUM_CLASSES or 1000) if data is None else data.num_classes
    inputs, size = model_inputs(config), config.DATA.IMG_SIZE
    return Classification(
        build_model(config, num_classes),
        config.MODEL.LABEL_SMOOTHING,
        input_shape=(input_channels(config), size, size),
        num_classes=num_classes,
        class_names=None if data is None else data.class_names,
        mean=inputs.mean,
        std=inputs.std,
    )


def train_batches(config: CfgNode, data: Data, dist_info: DistInfo, start: int, stop: int) -> TrainBatches:
    """Opens this rank's micro-batches of the training stream, from image number `start` to `stop`."""
    transform, mixer = build_train_transform(config), build_mixup(config, data.num_classes)
    return TrainBatches(config, data, dist_info, start, stop, transform=transform, mixer=mixer)


def val_batches(config: CfgNode, data: Data, dist_info: DistInfo, weight_format: str = "original") -> ValBatches:
    """Opens this rank's share of the evaluation data.

    Args:
        weight_format: of the weights to evaluate; TEST.PRESET auto prepares images as their code base does.
    """
    return ValBatches(config, data, dist_info, build_eval_preset(config, weight_format))
