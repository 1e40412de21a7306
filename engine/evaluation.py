"""Evaluating given weights on the validation images."""

import logging

from yacs.config import CfgNode

from data.build import build_datasets, val_batches
from engine import train_step
from engine.setup import build_components, compile_in_place, load_pretrained
from models.pretrained.load import load_weights
from utils.checkpoint.io import extract_state_dict
from utils.distributed.process_group import DistInfo
from utils.errors import UserError

log = logging.getLogger(__name__)


def evaluate(config: CfgNode, dist_info: DistInfo) -> None:
    """Evaluates the weights of MODEL.RESUME or MODEL.PRETRAINED on the validation images; writes nothing.

    Raises:
        UserError: weights that cannot be read, or whose head is not for the classes of the data.
    """
    data = build_datasets(config, dist_info)
    components = build_components(config, dist_info, data.num_classes)
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    contents, layout = load_pretrained(
        source, dist_info, components.module_without_ddp.model, data.class_names, evaluating=True
    )
    val = val_batches(config, data, dist_info, layout)
    state_dicts = {"": contents}
    if contents.get("ema"):
        state_dicts["average of the weights: "] = {"model": contents["ema"]}
    for what, part in state_dicts.items():
        if what:
            load_weights(components.module_without_ddp.model, extract_state_dict(part, source), source=source)
        if config.TRAIN.COMPILE:
            compile_in_place(
                components.module_without_ddp.model, dist_info.device, config.TRAIN.CUDA_GRAPHS, fixed_weights=True
            )
        figures = train_step.evaluate(components, components.module_without_ddp, val)
        if figures["images"] == 0:
            raise UserError(f"DATA.DATA_PATH {config.DATA.DATA_PATH}: no validation image could be read")
        log.info(
            "%s%d images: top-1 %.3f %%  top-5 %.3f %%  loss %.4f",
            what, figures["images"], figures["acc1"], figures["acc5"], figures["loss"],
        )  # fmt: skip
