"""From the configuration to a model. The only file of this package that reads the configuration."""

from torch import nn
from yacs.config import CfgNode

from models.ops import CHOICES
from models.swin_transformer import SwinTransformer
from utils.errors import UserError

NOT_YET = ("swinv2", "swin_mlp", "swin_moe", "timm", "simmim")


def build_model(config: CfgNode, num_classes: int | None = None) -> nn.Module:
    """The model that `config.MODEL` describes, freshly initialised.

    Args:
        config: the whole configuration.
        num_classes: outputs of the classifier, where the data decide; None for MODEL.NUM_CLASSES. 0 for no
            classifier: the model then gives pooled features.

    Raises:
        UserError: a type that does not exist or values that do not go together; names the key.
    """
    kind = config.MODEL.TYPE
    if kind in NOT_YET:
        raise UserError(f"MODEL.TYPE {kind!r} is not yet supported; set MODEL.TYPE to 'swin' (V1).")
    if kind != "swin":
        raise UserError(f"MODEL.TYPE {kind!r} is not known; set MODEL.TYPE to 'swin'.")
    _check_swin(config)
    swin = config.MODEL.SWIN
    return SwinTransformer(
        img_size=config.DATA.IMG_SIZE,
        patch_size=swin.PATCH_SIZE,
        in_chans=swin.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES if num_classes is None else num_classes,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        qk_scale=swin.QK_SCALE,
        drop_rate=config.MODEL.DROP_RATE,
        attn_drop_rate=config.MODEL.ATTN_DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        ape=swin.APE,
        patch_norm=swin.PATCH_NORM,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        attn=config.MODEL.ATTN,
    )


def _check_swin(config: CfgNode) -> None:
    """Refuses values that cannot make a model, before PyTorch would, in its own words."""
    swin = config.MODEL.SWIN
    if config.MODEL.ATTN not in CHOICES:
        raise UserError(f"MODEL.ATTN {config.MODEL.ATTN!r} is not known; choose from {', '.join(CHOICES)}.")
    if not swin.DEPTHS or len(swin.DEPTHS) != len(swin.NUM_HEADS):
        raise UserError(
            f"MODEL.SWIN.DEPTHS {list(swin.DEPTHS)} and MODEL.SWIN.NUM_HEADS {list(swin.NUM_HEADS)} must have one "
            f"value for each stage; make them equally long, at least one."
        )
    for stage, heads in enumerate(swin.NUM_HEADS):
        dim = swin.EMBED_DIM * 2**stage
        if heads < 1 or dim % heads:
            raise UserError(
                f"MODEL.SWIN.NUM_HEADS: {heads} heads cannot share the {dim} channels of stage {stage} equally; "
                f"change MODEL.SWIN.EMBED_DIM {swin.EMBED_DIM} or choose a divisor of {dim}."
            )
