"""Builds a model from the configuration. The only file of this package that reads the configuration."""

from yacs.config import CfgNode

from models.other_libraries import Architecture
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from models.timm_model import build_timm_model
from models.trainable import TrainableModel
from utils.config.rules import SECTIONS
from utils.errors import UserError

# MODEL.SWIN.POSITION, the rows of the paper's Table 4: `ape` and `relative` of SwinTransformer.
POSITIONS = {
    "none": (False, "none"),
    "abs": (True, "none"),
    "abs+rel": (True, "bias"),
    "rel_no_app": (False, "bias_only"),
    "rel": (False, "bias"),
}


def build_model(config: CfgNode, num_classes: int | None = None) -> TrainableModel:
    """Builds the model that `config.MODEL` describes, freshly initialised.

    Args:
        config: the whole configuration, as `config.get_config` returns it: `utils.config.rules` has checked it.
        num_classes: outputs of the classifier, if the dataset determines them; None for MODEL.NUM_CLASSES. 0 for no
            classifier: the model then returns pooled features.

    Raises:
        UserError: timm cannot build the model; names the key.
    """
    kind, model = config.MODEL.TYPE, config.MODEL
    num_classes = model.NUM_CLASSES if num_classes is None else num_classes
    if kind == "timm":
        return _build_timm(config, num_classes)
    section = _architecture(config)
    arguments = {
        "img_size": config.DATA.IMG_SIZE,
        "patch_size": section.PATCH_SIZE,
        "in_chans": section.IN_CHANS,
        "num_classes": num_classes,
        "embed_dim": section.EMBED_DIM,
        "depths": section.DEPTHS,
        "num_heads": section.NUM_HEADS,
        "window_size": section.WINDOW_SIZE,
        "mlp_ratio": section.MLP_RATIO,
        "drop_rate": model.DROP_RATE,
        "drop_path_rate": model.DROP_PATH_RATE,
        "drop_path_skip": model.DROP_PATH_SKIP,
        "ape": section.APE,
        "patch_norm": section.PATCH_NORM,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
    }
    if kind == "swin_mlp":
        return SwinMLP(**arguments)
    arguments |= {"qkv_bias": section.QKV_BIAS, "attn_drop_rate": model.ATTN_DROP_RATE, "attn": model.ATTN}
    if kind == "swinv2":
        pretrained = section.PRETRAINED_WINDOW_SIZES
        return SwinTransformerV2(**arguments, pretrained_window_sizes=pretrained if any(pretrained) else ())
    absolute, relative = POSITIONS[section.POSITION]
    arguments["ape"] = section.APE or absolute
    return SwinTransformer(**arguments, qk_scale=section.QK_SCALE, shift=section.SHIFT, relative=relative)


def _architecture(config: CfgNode) -> CfgNode:
    """Returns the section with the architecture, such as MODEL.SWIN."""
    return config.MODEL[SECTIONS[config.MODEL.TYPE].rpartition(".")[2]]


def architecture_of(config: CfgNode, num_classes: int) -> Architecture:
    """The architecture of a Swin, for building it with another library."""
    section = _architecture(config)
    return Architecture(
        model_type=config.MODEL.TYPE,
        img_size=config.DATA.IMG_SIZE,
        embed_dim=section.EMBED_DIM,
        depths=tuple(section.DEPTHS),
        num_heads=tuple(section.NUM_HEADS),
        window_size=section.WINDOW_SIZE,
        num_classes=num_classes,
        pretrained_window_sizes=tuple(section.PRETRAINED_WINDOW_SIZES) if config.MODEL.TYPE == "swinv2" else (),
    )


def input_channels(config: CfgNode) -> int:
    """Returns the number of channels of the model's input images."""
    return _architecture(config).IN_CHANS if config.MODEL.TYPE in SECTIONS else 3


def _build_timm(config: CfgNode, num_classes: int) -> TrainableModel:
    name = config.MODEL.NAME
    model = build_timm_model(
        name,
        num_classes,
        img_size=config.DATA.IMG_SIZE,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
    )
    if config.TRAIN.LAYER_DECAY != 1.0 and not hasattr(model, "get_layer_id"):
        raise UserError(f"TRAIN.LAYER_DECAY must be 1: timm does not define the order of the layers of {name}.")
    return model
