"""From the configuration to a model. The only file of this package that reads the configuration."""

from torch import nn
from yacs.config import CfgNode

from models.layers import DropPath
from models.ops.dispatch import CHOICES
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from models.timm_model import build_timm_model
from utils.config.rules import SECTIONS
from utils.errors import UserError

# MODEL.SWIN.POSITION, the rows of the paper's Table 4: (absolute embedding, what becomes of the relative bias).
POSITIONS = {
    "none": (False, "none"),
    "abs": (True, "none"),
    "abs+rel": (True, "added"),
    "rel_no_app": (False, "alone"),
    "rel": (False, "added"),
}


def build_model(config: CfgNode, num_classes: int | None = None) -> nn.Module:
    """The model that `config.MODEL` describes, freshly initialised.

    Args:
        config: the whole configuration.
        num_classes: outputs of the classifier, where the data decide; None for MODEL.NUM_CLASSES. 0 for no
            classifier: the model then gives pooled features.

    Raises:
        UserError: a type that does not exist or values that do not go together; names the key.
    """
    kind, model = config.MODEL.TYPE, config.MODEL
    outputs = model.NUM_CLASSES if num_classes is None else num_classes
    if kind == "timm":
        return _build_timm(config, outputs)
    if kind not in SECTIONS:
        raise UserError(f"MODEL.TYPE {kind!r} is not known; choose from {', '.join([*SECTIONS, 'timm'])}.")
    section = model[SECTIONS[kind].rpartition(".")[2]]
    _check(config, section, SECTIONS[kind])
    common = {
        "img_size": config.DATA.IMG_SIZE,
        "patch_size": section.PATCH_SIZE,
        "in_chans": section.IN_CHANS,
        "num_classes": outputs,
        "embed_dim": section.EMBED_DIM,
        "depths": section.DEPTHS,
        "num_heads": section.NUM_HEADS,
        "window_size": section.WINDOW_SIZE,
        "mlp_ratio": section.MLP_RATIO,
        "drop_rate": model.DROP_RATE,
        "drop_path_rate": model.DROP_PATH_RATE,
        "ape": section.APE,
        "patch_norm": section.PATCH_NORM,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
    }
    built = _build(kind, common, model, section)
    if model.DROP_PATH_SKIP:
        for module in built.modules():
            if isinstance(module, DropPath):
                module.skip = True
    return built


def _build(kind: str, common: dict, model: CfgNode, section: CfgNode) -> nn.Module:
    """What is `common` to all kinds, and what each has beside it."""
    if kind == "swin_mlp":
        return SwinMLP(**common)
    common |= {"qkv_bias": section.QKV_BIAS, "attn_drop_rate": model.ATTN_DROP_RATE, "attn": model.ATTN}
    if kind == "swinv2":
        pretrained = section.PRETRAINED_WINDOW_SIZES
        return SwinTransformerV2(**common, pretrained_window_sizes=pretrained if any(pretrained) else ())
    absolute, relative = POSITIONS[section.POSITION]
    common["ape"] = section.APE or absolute
    return SwinTransformer(**common, qk_scale=section.QK_SCALE, shift=section.SHIFT, relative=relative)


def input_channels(config: CfgNode) -> int:
    """Channels of the images that the model takes."""
    kind = config.MODEL.TYPE
    return config.MODEL[SECTIONS[kind].rpartition(".")[2]].IN_CHANS if kind in SECTIONS else 3


def _build_timm(config: CfgNode, num_classes: int) -> nn.Module:
    name = config.MODEL.NAME
    model = build_timm_model(
        name,
        num_classes,
        config.DATA.IMG_SIZE,
        config.MODEL.DROP_RATE,
        config.MODEL.DROP_PATH_RATE,
        config.TRAIN.USE_CHECKPOINT,
    )
    if config.TRAIN.LAYER_DECAY != 1.0 and not hasattr(model, "get_layer_id"):
        raise UserError(f"TRAIN.LAYER_DECAY must be 1: timm does not say in what order the layers of {name} come.")
    return model


def _check(config: CfgNode, section: CfgNode, name: str) -> None:
    """Refuses values that cannot make a model, before PyTorch would, in its own words."""
    if config.MODEL.ATTN not in CHOICES:
        raise UserError(f"MODEL.ATTN {config.MODEL.ATTN!r} is not known; choose from {', '.join(CHOICES)}.")
    if not section.DEPTHS or len(section.DEPTHS) != len(section.NUM_HEADS):
        raise UserError(
            f"{name}.DEPTHS {list(section.DEPTHS)} and {name}.NUM_HEADS {list(section.NUM_HEADS)} must have one "
            f"value for each stage; make them equally long, at least one."
        )
    for stage, heads in enumerate(section.NUM_HEADS):
        dim = section.EMBED_DIM * 2**stage
        if heads < 1 or dim % heads:
            raise UserError(
                f"{name}.NUM_HEADS: {heads} heads cannot share the {dim} channels of stage {stage} equally; "
                f"change {name}.EMBED_DIM {section.EMBED_DIM} or choose a divisor of {dim}."
            )
