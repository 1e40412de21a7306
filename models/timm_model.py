"""Any model of timm, made to answer what training asks of a model: what does not decay, and how deep a parameter lies.

Nothing is wrapped: parameters keep timm's names, so timm's weights load as they are.
"""

import fnmatch
import functools
import logging
import operator

import timm
from timm.models import group_parameters
from torch import nn

from utils.errors import UserError

log = logging.getLogger(__name__)


def build_timm_model(
    name: str,
    num_classes: int,
    img_size: int,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    use_checkpoint: bool = False,
) -> nn.Module:
    """timm's model `name`, freshly initialised, with the methods `no_weight_decay` and `get_layer_id` of `Backbone`.

    What a model has no use for (many convolutional ones have no stochastic depth) is left out, with a line in the log.

    Args:
        name: as in timm.list_models(), such as "regnety_040" or "vit_base_patch16_384.augreg_in21k_ft_in1k".
        num_classes: outputs of the classifier; 0 for none.
        img_size: side of the images to expect, in pixels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        use_checkpoint: compute blocks again in the backward pass instead of keeping what they computed.

    Raises:
        UserError: timm has no such model, or it cannot be built for this image size.
    """
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {name!r} is no model of timm {timm.__version__}; timm.list_models() names them.")
    optional = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    described = timm.get_pretrained_cfg(name)
    if described is not None and described.input_size[-1] != img_size:
        optional["img_size"] = img_size
    model = _create(name, num_classes, optional)
    if use_checkpoint:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"TRAIN.USE_CHECKPOINT: timm's {name} cannot recompute activations; set it to False.")
        model.set_grad_checkpointing(True)
    return _add_param_group_api(model)


def _create(name: str, num_classes: int, optional: dict[str, float]) -> nn.Module:
    """The model, with those of the `optional` arguments that it takes."""
    optional = dict(optional)
    while True:
        try:
            return timm.create_model(name, pretrained=False, num_classes=num_classes, **optional)
        except TypeError as error:
            refused = next((argument for argument in optional if f"'{argument}'" in str(error)), None)
            if refused is None:
                raise
            value = optional.pop(refused)
            if value and refused != "img_size":  # convolutions take any size
                log.warning("timm's %s has no %s: MODEL.%s has no effect", name, refused, refused.upper())
        except (AssertionError, ValueError) as error:
            raise UserError(f"timm's {name} cannot be built with {optional}: {error}. Change DATA.IMG_SIZE.") from error


def _add_param_group_api(model: nn.Module) -> nn.Module:
    """Attaches to this model what timm says in other words; its class stays timm's.

    `get_layer_id` is missing where timm does not say how its layers follow each other.
    """
    patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    names = [name for name, _ in model.named_parameters()]
    exempt = frozenset(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    model.no_weight_decay = functools.partial(frozenset, exempt)
    if hasattr(model, "group_matcher"):
        depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        model.num_layer_ids = max(depths.values()) + 1
        model.get_layer_id = functools.partial(operator.getitem, depths)
    return model
