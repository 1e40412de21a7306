"""The values that keys of config.py may have, alone and together, and the keys that are accepted without effect."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from utils.errors import UserError
from utils.origins import ORIGINS

IMAGENET_22K_CLASSES = 21841  # of the release that the published models were pre-trained on

CHOICES = {
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.BACKEND": ("auto", "reference", "native", "gpu"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "MODEL.TYPE": ("swin", "swinv2", "swin_mlp", "timm"),
    "MODEL.PRETRAINED_EMA": ("auto", "model", "ema"),
    "MODEL.SWIN.POSITION": ("none", "abs", "abs+rel", "rel_no_app", "rel"),
    "MODEL.ATTN": ("auto", "reference", "sdpa", "triton", "native"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "TRAIN.PARALLEL": ("ddp", "fsdp"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.PRESET": ("auto", *ORIGINS),
    "AMP_DTYPE": ("auto", "bfloat16", "float16", "float32"),
}

# Bounds of numbers, and of each number in a list: a bracket includes its bound, a parenthesis excludes it.
INTERVALS = {
    "[0, inf)": """
        DATA.NUM_WORKERS DATA.MAX_BAD_IMAGES MODEL.NUM_CLASSES TRAIN.START_EPOCH TRAIN.WARMUP_EPOCHS TRAIN.WEIGHT_DECAY
        TRAIN.BASE_LR TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.CLIP_GRAD TRAIN.OPTIMIZER.EPS AUG.COLOR_JITTER AUG.MIXUP
        AUG.CUTMIX SAVE_STEPS SAVE_KEEP LOCAL_RANK MODEL.SWINV2.PRETRAINED_WINDOW_SIZES""",
    "[1, inf)": """
        DATA.IMG_SIZE MODEL.SWIN.PATCH_SIZE MODEL.SWIN.IN_CHANS MODEL.SWIN.EMBED_DIM MODEL.SWIN.DEPTHS
        MODEL.SWIN.NUM_HEADS MODEL.SWIN.WINDOW_SIZE MODEL.SWINV2.PATCH_SIZE MODEL.SWINV2.IN_CHANS
        MODEL.SWINV2.EMBED_DIM MODEL.SWINV2.DEPTHS MODEL.SWINV2.NUM_HEADS MODEL.SWINV2.WINDOW_SIZE
        MODEL.SWIN_MLP.PATCH_SIZE MODEL.SWIN_MLP.IN_CHANS MODEL.SWIN_MLP.EMBED_DIM MODEL.SWIN_MLP.DEPTHS
        MODEL.SWIN_MLP.NUM_HEADS MODEL.SWIN_MLP.WINDOW_SIZE TRAIN.EPOCHS TRAIN.ACCUMULATION_STEPS TRAIN.MAX_BAD_STEPS
        TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.MULTISTEPS VAL_FREQ SAVE_FREQ PRINT_FREQ""",
    "[1, 65536]": "DATA.BATCH_SIZE",
    "[1, 100]": "AUG.RECOUNT",
    "[1, 1000000]": "TIMEOUT",
    "[0, 1e18]": "SEED",
    "(0, inf)": "MODEL.SWIN.MLP_RATIO MODEL.SWIN.QK_SCALE MODEL.SWINV2.MLP_RATIO MODEL.SWIN_MLP.MLP_RATIO",
    "[0, 1)": """
        MODEL.DROP_RATE MODEL.ATTN_DROP_RATE MODEL.DROP_PATH_RATE MODEL.LABEL_SMOOTHING TRAIN.EMA_DECAY
        TRAIN.OPTIMIZER.BETAS""",
    "(0, 1)": "TRAIN.OPTIMIZER.MOMENTUM",
    "[0, 1]": "AUG.HFLIP AUG.REPROB AUG.CUTMIX_MINMAX AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB",
    "(0, 1]": "TRAIN.LAYER_DECAY TRAIN.LR_SCHEDULER.DECAY_RATE TRAIN.LR_SCHEDULER.GAMMA",
}

# Keys with a path, in which a leading `~` is the home folder. The weights may also be a URL or the name of a release.
PATHS = ("DATA.DATA_PATH", "MODEL.PRETRAINED", "MODEL.RESUME", "OUTPUT")

LENGTHS = {"TRAIN.OPTIMIZER.BETAS": 2, "AUG.CUTMIX_MINMAX": 2}

DATASETS = ("imagenet", "imagenet22K", "packed", "demo")

_NUMBER = r"\d+(\.\d+)?"
AUTO_AUGMENT = re.compile(
    rf"none|rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw|default)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)

# Keys of the original code that are accepted without effect, and why they have none.
NO_EFFECT = {
    "TRAIN.START_EPOCH": "a run continues at the exact sample where it was saved",
    "TRAIN.MOE.SAVE_MASTER": "there are no experts here, and only rank 0 saves",
    "TEST.SEQUENTIAL": "every validation image counts once, in any order",
    "TEST.SHUFFLE": "every validation image counts once, in any order",
    "LOCAL_RANK": "torchrun sets the rank of each process",
    "FUSED_WINDOW_PROCESS": "MODEL.ATTN selects the implementation of window attention",
    "FUSED_LAYERNORM": "PyTorch's own LayerNorm is used",
}

# Keys without effect for one MODEL.TYPE.
NO_EFFECT_FOR = {
    "swin_mlp": {
        "MODEL.ATTN": "Swin-MLP has no attention",
        "MODEL.ATTN_DROP_RATE": "Swin-MLP has no attention",
    },
    "timm": {
        "MODEL.ATTN": "timm's models choose their own attention",
        "MODEL.ATTN_DROP_RATE": "it is not passed on to timm's models",
        "MODEL.DROP_PATH_SKIP": "timm's models have their own stochastic depth",
    },
}

# The section with the architecture of each MODEL.TYPE; MODEL.NAME selects that of a timm model.
SECTIONS = {"swin": "MODEL.SWIN", "swinv2": "MODEL.SWINV2", "swin_mlp": "MODEL.SWIN_MLP"}

# Keys, sections and values of the original code for features that are not supported here.
UNSUPPORTED = {
    "MODEL.SWIN_MOE": "Swin-MoE",
    "MODEL.SIMMIM": "SimMIM pre-training",
    "DATA.MASK_PATCH_SIZE": "SimMIM pre-training",
    "DATA.MASK_RATIO": "SimMIM pre-training",
}
UNSUPPORTED_TYPES = {"swin_moe": "Swin-MoE"}

# Experimental keys: switching one on logs a warning.
EXPERIMENTAL = ("TRAIN.CUDA_GRAPHS", "TRAIN.BF16_PARAMS")

# Keys that do not change what a run computes: two configs that differ only in these describe the same run. Not
# included: ACCUMULATION_STEPS, USE_CHECKPOINT, ATTN and the like, which may change the last digits, and DATA.ZIP_MODE,
# because a zip may hold other files than the folder, or in another order. Included: VAL_FREQ, which changes only which
# epochs best.pth is chosen from; training, last.pth and the numbered checkpoints do not depend on evaluations.
NON_SEMANTIC_KEYS = frozenset(NO_EFFECT) | {
    "BASE", "DATA.DATA_PATH", "DATA.CACHE_MODE", "DATA.PIN_MEMORY", "DATA.NUM_WORKERS", "DATA.MAX_BAD_IMAGES",
    "MODEL.RESUME", "TRAIN.AUTO_RESUME", "TRAIN.MAX_BAD_STEPS", "OUTPUT", "TAG", "VAL_FREQ", "SAVE_FREQ", "SAVE_STEPS",
    "SAVE_KEEP", "PRINT_FREQ", "TIMEOUT", "EVAL_MODE", "THROUGHPUT_MODE",
}  # fmt: skip

# Values of other keys that compute the same bits, so that a run may change from one to another.
BITWISE_EQUIVALENT = {"DATA.BACKEND": frozenset(("auto", "reference", "native"))}


def check_each(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Refuses the first value outside its choices, interval or length.

    Args:
        origins: by key, the place where its value was given.

    Raises:
        UserError: names the key, its value, and the values that are allowed.
    """
    if values["MODEL.TYPE"] in UNSUPPORTED_TYPES:
        refuse_unsupported("MODEL.TYPE", origins["MODEL.TYPE"], UNSUPPORTED_TYPES[values["MODEL.TYPE"]])

    def refuse(key: str, requirement: str) -> NoReturn:
        raise UserError(f"{origins.get(key, 'default')}: {key} is {values[key]!r}{requirement}.")

    rules: list[tuple[str, Callable[[object], bool], str]] = []
    for key, choices in CHOICES.items():
        rules.append((key, choices.__contains__, "one of " + ", ".join(choices)))
    for interval, keys in INTERVALS.items():
        rules += [(key, _inside(interval), f"in the interval {interval}") for key in keys.split()]
    for key, accepts, allowed in rules:
        if not all(item is None or accepts(item) for item in _items(values[key])):
            refuse(key, f" but must be {allowed}")
    for key, value in values.items():
        if any(isinstance(text, str) and any(character < " " for character in text) for text in _items(value)):
            refuse(key, ": remove the line break, tab or other control character in it")
    for key, length in LENGTHS.items():
        if values[key] is not None and len(values[key]) != length:
            refuse(key, f" but must have {length} numbers")


def refuse_unsupported(key: str, origin: str, feature: str) -> NoReturn:
    """Raises UserError for a key of the original code that belongs to an unsupported `feature`."""
    supported = ", ".join(CHOICES["MODEL.TYPE"])
    raise UserError(
        f"{origin}: {key} belongs to {feature}, which is not yet supported here. MODEL.TYPE may be {supported}."
    )


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def _inside(interval: str) -> Callable[[object], bool]:
    low, high = map(float, interval[1:-1].split(","))

    def accepts(number: Any) -> bool:
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        return above and below

    return accepts


def validate_combinations(config: CfgNode, describe: Callable[[str], str]) -> Iterator[str]:
    """Yields an error message for each set of values that are valid alone but not together.

    Args:
        describe: quotes a key with its value and origin.
    """
    if config.MODEL.TYPE in SECTIONS:
        yield from _validate_architecture(config, SECTIONS[config.MODEL.TYPE], describe)
    if not (config.EVAL_MODE or config.THROUGHPUT_MODE):  # these use no learning rate
        yield from _validate_schedule(config.TRAIN, describe)
    yield from _validate_step(config, describe)
    yield from _validate_augmentation(config, describe)
    yield from _validate_dataset(config.DATA, describe)
    for key, name in (("MODEL.NAME", config.MODEL.NAME), ("TAG", config.TAG)):
        if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{describe(key)} is a folder under OUTPUT: it must not be empty, absolute, or contain '..'."
        elif any(len(os.fsencode(part)) > 255 for part in Path(name).parts):
            yield f"{key} names a folder, and folder names have at most 255 bytes: shorten {name[:40]}…"
    if config.EVAL_MODE and config.THROUGHPUT_MODE:
        yield f"{describe('EVAL_MODE')} and {describe('THROUGHPUT_MODE')} are exclusive: omit --eval or --throughput."
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        yield f"{describe('EVAL_MODE')} needs weights to evaluate: add --resume FILE or --pretrained FILE."
    if config.MODEL.PRETRAINED_EMA == "ema" and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        yield (
            f"{describe('MODEL.PRETRAINED_EMA')} takes averaged weights from a file: add --pretrained FILE. To average "
            "the weights of this run: --opts TRAIN.EMA_DECAY 0.9999."
        )


def _validate_architecture(config: CfgNode, section: str, describe: Callable[[str], str]) -> Iterator[str]:
    model = config.MODEL[section.rpartition(".")[2]]
    depths, heads = describe(f"{section}.DEPTHS"), describe(f"{section}.NUM_HEADS")
    if not model.DEPTHS or len(model.DEPTHS) != len(model.NUM_HEADS):
        yield f"{depths} and {heads} must be equally long, one number for each stage."
    for stage, num_heads in enumerate(model.NUM_HEADS):
        channels = model.EMBED_DIM * 2**stage
        if channels % num_heads:
            yield (
                f"{heads}: the {channels} channels of stage {stage} cannot be divided by {num_heads} heads. "
                f"Change it, or {describe(f'{section}.EMBED_DIM')}."
            )
            break  # later stages have multiples of these channels
    pretrained_windows = model.get("PRETRAINED_WINDOW_SIZES", [])
    if any(pretrained_windows) and len(pretrained_windows) != len(model.DEPTHS):
        yield (
            f"{describe(f'{section}.PRETRAINED_WINDOW_SIZES')} and {depths} must be equally long, one number for each "
            "stage; or all zeros, if the weights were trained with WINDOW_SIZE."
        )
    if model.APE and model.get("POSITION", "rel") in ("none", "rel_no_app"):
        yield (
            f"{describe(f'{section}.APE')} adds an absolute position embedding, but "
            f"{describe(f'{section}.POSITION')} excludes one: set POSITION to abs or abs+rel, or APE to False."
        )
    if model.IN_CHANS != 3 and not config.THROUGHPUT_MODE:
        channels = describe(f"{section}.IN_CHANS")
        yield f"{channels} must be 3, because images are read as RGB; only --throughput accepts other numbers."


def _validate_schedule(train: CfgNode, describe: Callable[[str], str]) -> Iterator[str]:
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        yield (
            f"{describe('TRAIN.WARMUP_EPOCHS')} must be less than {describe('TRAIN.EPOCHS')}. "
            "For a short run give both, such as --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0."
        )
    # Above BASE_LR, either would turn its part of the schedule upside down: the cosine would rise, the warm-up fall.
    bounded = {"TRAIN.MIN_LR": train.LR_SCHEDULER.NAME == "cosine", "TRAIN.WARMUP_LR": train.WARMUP_EPOCHS > 0}
    for key, is_used in bounded.items():
        if is_used and train[key.partition(".")[2]] > train.BASE_LR:
            yield f"{describe(key)} must not be above {describe('TRAIN.BASE_LR')}. Give both, or lower {key}."
    if train.LR_SCHEDULER.NAME == "multistep":
        steps = train.LR_SCHEDULER.MULTISTEPS
        if not steps or steps != sorted(set(steps)) or steps[0] < train.WARMUP_EPOCHS:
            yield (
                f"{describe('TRAIN.LR_SCHEDULER.NAME')} needs rising epochs, none within warm-up, in "
                f"{describe('TRAIN.LR_SCHEDULER.MULTISTEPS')}, such as [150, 225]; {describe('TRAIN.WARMUP_EPOCHS')}."
            )


def _validate_step(config: CfgNode, describe: Callable[[str], str]) -> Iterator[str]:
    train, timm = config.TRAIN, config.MODEL.TYPE == "timm"
    if train.CUDA_GRAPHS and train.COMPILE is not True:
        yield f"{describe('TRAIN.CUDA_GRAPHS')} replays compiled code: add TRAIN.COMPILE True, or leave it out."
    if train.CUDA_GRAPHS and train.ACCUMULATION_STEPS > 1:
        yield (
            f"{describe('TRAIN.CUDA_GRAPHS')} reuses the memory of gradients, in which "
            f"{describe('TRAIN.ACCUMULATION_STEPS')} accumulates: use one of the two."
        )
    if train.BF16_PARAMS and timm:
        yield f"{describe('TRAIN.BF16_PARAMS')} is for this project's models: timm's may rely on float32. Leave it out."
    if train.PARALLEL == "fsdp" and timm:
        yield f"{describe('TRAIN.PARALLEL')} shards a model by its blocks, and those of timm are not known: set ddp."
    if train.PARALLEL == "fsdp" and train.OPTIMIZER.NAME != "adamw":
        yield f"{describe('TRAIN.PARALLEL')} works only with adamw, not {describe('TRAIN.OPTIMIZER.NAME')}: set ddp."
    for other in ("COMPILE", "BF16_PARAMS"):
        if train.PARALLEL == "fsdp" and train[other] is True:
            yield (
                f"{describe('TRAIN.PARALLEL')} does not work with {describe(f'TRAIN.{other}')}: set ddp, or "
                f"{other} False."
            )


def _validate_augmentation(config: CfgNode, describe: Callable[[str], str]) -> Iterator[str]:
    aug = config.AUG
    mixing = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    if mixing and config.DATA.BATCH_SIZE % 2 and not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        yield (
            f"{describe('DATA.BATCH_SIZE')} must be even, because Mixup and CutMix pair images; or switch them off: "
            "--opts AUG.MIXUP 0 AUG.CUTMIX 0 AUG.CUTMIX_MINMAX None."
        )
    if aug.CUTMIX_MINMAX is not None and aug.CUTMIX_MINMAX[0] > aug.CUTMIX_MINMAX[1]:
        yield f"{describe('AUG.CUTMIX_MINMAX')} must be [smallest, largest]: swap the two."
    if not AUTO_AUGMENT.fullmatch(aug.AUTO_AUGMENT):
        yield f"{describe('AUG.AUTO_AUGMENT')} is no policy. Write one such as 'rand-m9-mstd0.5-inc1', or 'none'."


def _validate_dataset(data: CfgNode, describe: Callable[[str], str]) -> Iterator[str]:
    if data.DATASET not in DATASETS and "/" not in data.DATASET:
        near = difflib.get_close_matches(data.DATASET, DATASETS, n=1)
        yield f"{describe('DATA.DATASET')} is not known. " + (
            f"Did you mean {near[0]}?" if near else f"Use {', '.join(DATASETS)}, or a timm name such as torch/cifar10."
        )
    elif data.ZIP_MODE and data.DATASET != "imagenet":
        yield f"{describe('DATA.ZIP_MODE')} is for DATASET imagenet only, not {describe('DATA.DATASET')}. Change one."
