"""Evaluating given weights on the validation images."""

import logging

from yacs.config import CfgNode

import engine
from data.build import build_datasets, val_batches
from models.weights import load_weights
from modes.learner import build_learner, compile_in_place, load_pretrained
from utils.checkpoint import weights_in
from utils.dist import Process
from utils.errors import UserError

log = logging.getLogger(__name__)


def evaluate(config: CfgNode, process: Process) -> None:
    """Evaluates the weights of MODEL.RESUME or MODEL.PRETRAINED on the validation images; writes nothing.

    Raises:
        UserError: weights that cannot be read, or whose head is not for the classes of the data.
    """
    data = build_datasets(config, process)
    learner = build_learner(config, process, data.num_classes)
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    contents, layout = load_pretrained(source, process, learner.bare.model, data.class_names, evaluating=True)
    val = val_batches(config, data, process, layout)
    learners = {"": contents}
    if contents.get("ema"):
        learners["average of the weights: "] = {"model": contents["ema"]}
    for what, part in learners.items():
        if what:
            load_weights(learner.bare.model, weights_in(part, source), source=source)
        if config.TRAIN.COMPILE:
            compile_in_place(learner.bare.model, process.device, config.TRAIN.CUDA_GRAPHS, fixed_weights=True)
        figures = engine.evaluate(learner, learner.bare, val)
        if figures["images"] == 0:
            raise UserError(f"DATA.DATA_PATH {config.DATA.DATA_PATH}: no validation image could be read")
        log.info(
            "%s%d images: top-1 %.3f %%  top-5 %.3f %%  loss %.4f",
            what, figures["images"], figures["acc1"], figures["acc5"], figures["loss"],
        )  # fmt: skip
