"""Builds any model of timm, with the methods that the optimizer calls: `no_weight_decay` and `get_layer_id`.

The model is not wrapped: parameters keep timm's names, so timm's weights load without conversion.
"""

import fnmatch
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any, cast

import timm
from timm.models import group_parameters
from torch import nn

from models.trainable import TrainableModel
from utils.errors import UserError

log = logging.getLogger(__name__)


def build_timm_model(
    name: str,
    num_classes: int,
    img_size: int,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    use_checkpoint: bool = False,
) -> TrainableModel:
    """Builds timm's model `name`, freshly initialised, with `no_weight_decay` and `get_layer_id` as in `Backbone`.

    Arguments that the model does not take are left out, with a warning: many convolutional models have no stochastic
    depth.

    Args:
        name: as in timm.list_models(), such as "regnety_040" or "vit_base_patch16_384.augreg_in21k_ft_in1k".
        num_classes: outputs of the classifier; 0 for none.
        img_size: expected side of the images, in pixels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        UserError: timm has no such model, or it cannot be built for this image size.
    """
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {name!r} is no model of timm {timm.__version__}; timm.list_models() names them.")
    optional: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.input_size[-1] != img_size:
        optional["img_size"] = img_size
    model = _create(name, num_classes, optional)
    if use_checkpoint:
        set_grad_checkpointing: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
        if set_grad_checkpointing is None:
            raise UserError(f"TRAIN.USE_CHECKPOINT: timm's {name} cannot recompute activations; set it to False.")
        set_grad_checkpointing(True)
    return _add_param_group_api(model)


def _create(name: str, num_classes: int, optional: dict[str, Any]) -> nn.Module:
    """Creates the model with those of the `optional` arguments that it takes."""
    optional = dict(optional)
    while True:
        try:
            return timm.create_model(name, pretrained=False, num_classes=num_classes, **optional)
        except TypeError as error:
            rejected = next((argument for argument in optional if f"'{argument}'" in str(error)), None)
            if rejected is None:
                raise
            value = optional.pop(rejected)
            if value and rejected != "img_size":  # convolutional models take any size
                log.warning("timm's %s has no %s: MODEL.%s has no effect", name, rejected, rejected.upper())
        except (AssertionError, ValueError) as error:
            raise UserError(f"timm's {name} cannot be built with {optional}: {error}. Change DATA.IMG_SIZE.") from error


def _add_param_group_api(model: nn.Module) -> TrainableModel:
    """Adds `no_weight_decay`, `num_layer_ids` and `get_layer_id`, from timm's own definitions, to this instance.

    `num_layer_ids` and `get_layer_id` are missing if timm does not define the order of the layers.
    """
    timm_no_weight_decay: Callable[[], Collection[str]] | None = getattr(model, "no_weight_decay", None)
    timm_group_matcher: Callable[..., dict[str, Any]] | None = getattr(model, "group_matcher", None)
    patterns = () if timm_no_weight_decay is None else timm_no_weight_decay()
    names = [name for name, _ in model.named_parameters()]
    exempt = frozenset(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    trainable = cast(TrainableModel, model)  # is one, once the attributes below are set
    trainable.no_weight_decay = functools.partial(frozenset, exempt)
    if timm_group_matcher is not None:
        layer_ids: dict[str, int] = group_parameters(model, timm_group_matcher(coarse=False), reverse=True)
        trainable.num_layer_ids = max(layer_ids.values()) + 1
        trainable.get_layer_id = layer_ids.__getitem__  # no lambda: it has to be picklable
    return trainable
