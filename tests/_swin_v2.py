"""Shared by the tests of Swin V2: small models and timm's V2, with distinct weights."""

import math

import torch
from timm.models import swin_transformer_v2 as timm_models
from torch import nn

from models.swin_transformer_v2 import SwinTransformerV2
from tests._swin import SMALL, spread


def small_v2(**changes) -> SwinTransformerV2:
    """Builds a `SMALL` model with `changes`."""
    return SwinTransformerV2(**{**SMALL, **changes})


def spread_v2(model: nn.Module, past_limit: float = 6.0) -> nn.Module:
    """As `spread`, but logit scales are near their initial value, and `past_limit` in the last block's first head."""
    spread(model)
    scales = [parameter for name, parameter in model.named_parameters() if name.endswith("logit_scale")]
    with torch.no_grad():
        for scale in scales:
            scale.copy_(math.log(10) + 0.3 * scale)
        scales[-1][0] = past_limit
    return model


def timm_swin_v2(num_classes: int = 10, **arguments) -> nn.Module:
    """Builds timm's V2 with spread weights and DropPath 0."""
    model = timm_models.SwinTransformerV2(num_classes=num_classes, drop_path_rate=0.0, **arguments)
    return spread_v2(model)
