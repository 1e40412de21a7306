"""What values the keys of config.py may have, alone and together; and which keys are understood but change nothing."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from yacs.config import CfgNode

from utils.errors import UserError

CHOICES = {
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.BACKEND": ("auto", "reference", "fast", "device"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "MODEL.TYPE": ("swin", "swinv2", "swin_mlp", "timm"),
    "MODEL.SWIN.POSITION": ("none", "abs", "abs+rel", "rel_no_app", "rel"),
    "MODEL.ATTN": ("auto", "reference", "sdpa", "triton", "native"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "TRAIN.PARALLEL": ("ddp", "fsdp"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.PRESET": ("auto", "original", "timm", "torchvision", "hf"),
    "AMP_DTYPE": ("auto", "bfloat16", "float16", "float32"),
}

# Bounds of numbers (of each one in a list): a bracket includes its bound, a parenthesis does not.
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
        TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.MULTISTEPS SAVE_FREQ PRINT_FREQ""",
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

LENGTHS = {"TRAIN.OPTIMIZER.BETAS": 2, "AUG.CUTMIX_MINMAX": 2}

DATASETS = ("imagenet", "imagenet22K", "packed", "demo")

_NUMBER = r"\d+(\.\d+)?"
AUTO_AUGMENT = re.compile(
    rf"none|rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw|default)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)

# Keys of the original that are understood but change nothing here, and why.
NO_EFFECT = {
    "TRAIN.START_EPOCH": "a run continues at the very sample where it was saved",
    "TRAIN.MOE.SAVE_MASTER": "there are no experts here, and rank 0 alone saves",
    "TEST.SEQUENTIAL": "every validation image counts once, whatever the order",
    "TEST.SHUFFLE": "every validation image counts once, whatever the order",
    "LOCAL_RANK": "torchrun tells each process its rank",
    "FUSED_WINDOW_PROCESS": "MODEL.ATTN chooses how windows are computed",
    "FUSED_LAYERNORM": "PyTorch's own LayerNorm is used",
}

# The same for some types of model only.
NO_EFFECT_FOR = {
    "swin_mlp": {
        "MODEL.ATTN": "Swin-MLP has no attention",
        "MODEL.ATTN_DROP_RATE": "Swin-MLP has no attention",
    },
    "timm": {
        "MODEL.ATTN": "timm's models choose how they compute attention",
        "MODEL.ATTN_DROP_RATE": "it is not passed on to timm's models",
        "MODEL.DROP_PATH_SKIP": "timm's models do their own stochastic depth",
    },
}

# Where the architecture of each type of model stands; timm's is told by MODEL.NAME.
SECTIONS = {"swin": "MODEL.SWIN", "swinv2": "MODEL.SWINV2", "swin_mlp": "MODEL.SWIN_MLP"}

# Keys (or sections) and values of the original that belong to what is not built here, and what that is.
UNSUPPORTED = {
    "MODEL.SWIN_MOE": "Swin-MoE",
    "MODEL.SIMMIM": "SimMIM pre-training",
    "DATA.MASK_PATCH_SIZE": "SimMIM pre-training",
    "DATA.MASK_RATIO": "SimMIM pre-training",
}
UNSUPPORTED_TYPES = {"swin_moe": "Swin-MoE"}

# Keys that say where, how often and with which means, but do not change what a run computes. Two configs that differ in
# these alone are the same run. Not among them: ACCUMULATION_STEPS, USE_CHECKPOINT, ATTN and the like, which may change
# the last digits, and DATA.ZIP_MODE, since a zip may hold other files, in another order, than a folder.
NON_SEMANTIC_KEYS = frozenset(NO_EFFECT) | {
    "BASE", "DATA.DATA_PATH", "DATA.CACHE_MODE", "DATA.PIN_MEMORY", "DATA.NUM_WORKERS", "DATA.MAX_BAD_IMAGES",
    "MODEL.RESUME", "TRAIN.AUTO_RESUME", "TRAIN.MAX_BAD_STEPS", "OUTPUT", "TAG", "SAVE_FREQ", "SAVE_STEPS", "SAVE_KEEP",
    "PRINT_FREQ", "TIMEOUT", "EVAL_MODE", "THROUGHPUT_MODE",
}  # fmt: skip

# Values of other keys between which a run may change without becoming another: they compute the same to the bit.
BITWISE_EQUIVALENT = {"DATA.BACKEND": frozenset(("auto", "reference", "fast"))}


def check_each(values: dict[str, object], origins: dict[str, str]) -> None:
    """Refuses the first value that is outside its choices, interval or length. `origins` says who gave a key."""
    if values["MODEL.TYPE"] in UNSUPPORTED_TYPES:
        refuse_unsupported("MODEL.TYPE", origins["MODEL.TYPE"], UNSUPPORTED_TYPES[values["MODEL.TYPE"]])
    rules: list[tuple[str, Callable[[object], bool], str]] = []
    for key, choices in CHOICES.items():
        rules.append((key, choices.__contains__, "one of " + ", ".join(choices)))
    for interval, keys in INTERVALS.items():
        rules += [(key, _inside(interval), f"in the interval {interval}") for key in keys.split()]
    for key, accepts, wanted in rules:
        value = values[key]
        items = value if isinstance(value, list | tuple) else [value]
        if not all(item is None or accepts(item) for item in items):
            raise UserError(f"{origins.get(key, 'default')}: {key} is {value!r} but must be {wanted}.")
    for key, value in values.items():
        for text in [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []:
            if isinstance(text, str) and any(character < " " for character in text):
                raise UserError(
                    f"{origins.get(key, 'default')}: {key} is {value!r}: remove the line break, tab or the like in it."
                )
    for key, length in LENGTHS.items():
        if values[key] is not None and len(values[key]) != length:
            raise UserError(f"{origins.get(key, 'default')}: {key} is {values[key]!r} but must have {length} numbers.")


def refuse_unsupported(key: str, origin: str, what: str) -> NoReturn:
    """Raises UserError for a key of the original that belongs to `what`."""
    raise UserError(
        f"{origin}: {key} belongs to {what}, which is not yet supported here. What is: MODEL.TYPE "
        f"{', '.join(CHOICES['MODEL.TYPE'])}."
    )


def _inside(interval: str) -> Callable[[object], bool]:
    low, high = map(float, interval[1:-1].split(","))

    def accepts(number: float) -> bool:
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        return above and below

    return accepts


def validate_combinations(config: CfgNode, said: Callable[[str], str]) -> Iterator[str]:
    """Sentences about values that are right alone but not together. `said` quotes a key with its value and origin."""
    if config.MODEL.TYPE in SECTIONS:
        section = SECTIONS[config.MODEL.TYPE]
        yield from _validate_architecture(config.MODEL[section.rpartition(".")[2]], section, said)
        channels = f"{section}.IN_CHANS"
        if config.MODEL[section.rpartition(".")[2]].IN_CHANS != 3 and not config.THROUGHPUT_MODE:
            yield f"{said(channels)} must be 3, since images are read as RGB; only --throughput takes other numbers."
    train, scheduler, aug = config.TRAIN, config.TRAIN.LR_SCHEDULER, config.AUG
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        yield (
            f"{said('TRAIN.WARMUP_EPOCHS')} must be less than {said('TRAIN.EPOCHS')}. "
            "For a short run give both, such as --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0."
        )
    if scheduler.NAME == "multistep":
        steps = scheduler.MULTISTEPS
        if not steps or steps != sorted(set(steps)) or steps[0] < train.WARMUP_EPOCHS:
            yield (
                f"{said('TRAIN.LR_SCHEDULER.NAME')} needs rising epochs, none within warm-up, in "
                f"{said('TRAIN.LR_SCHEDULER.MULTISTEPS')}, such as [150, 225]; {said('TRAIN.WARMUP_EPOCHS')}."
            )
    if train.CUDA_GRAPHS and not train.COMPILE:
        yield f"{said('TRAIN.CUDA_GRAPHS')} replays what is compiled: add TRAIN.COMPILE True, or leave it out."
    if train.CUDA_GRAPHS and train.ACCUMULATION_STEPS > 1:
        yield (
            f"{said('TRAIN.CUDA_GRAPHS')} reuses the memory of gradients, which {said('TRAIN.ACCUMULATION_STEPS')} "
            "adds up: use one of the two."
        )
    if train.BF16_PARAMS and config.MODEL.TYPE == "timm":
        yield f"{said('TRAIN.BF16_PARAMS')} is for this project's models: timm's may count on float32. Leave it out."
    mixing = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    if mixing and config.DATA.BATCH_SIZE % 2 and not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        yield (
            f"{said('DATA.BATCH_SIZE')} must be even, because Mixup and CutMix pair images; or switch them off: "
            "--opts AUG.MIXUP 0 AUG.CUTMIX 0 AUG.CUTMIX_MINMAX None."
        )
    if train.PARALLEL == "fsdp" and config.MODEL.TYPE == "timm":
        yield f"{said('TRAIN.PARALLEL')} splits a model by its blocks, and timm's are not known: set ddp."
    if train.PARALLEL == "fsdp" and train.OPTIMIZER.NAME != "adamw":
        yield f"{said('TRAIN.PARALLEL')} goes with adamw alone, not {said('TRAIN.OPTIMIZER.NAME')}: set ddp."
    for other in ("COMPILE", "BF16_PARAMS"):
        if train.PARALLEL == "fsdp" and train[other]:
            yield f"{said('TRAIN.PARALLEL')} does not go with {said(f'TRAIN.{other}')}: set ddp, or {other} False."
    if aug.CUTMIX_MINMAX is not None and aug.CUTMIX_MINMAX[0] > aug.CUTMIX_MINMAX[1]:
        yield f"{said('AUG.CUTMIX_MINMAX')} must be [least, largest]: swap the two."
    if not AUTO_AUGMENT.fullmatch(aug.AUTO_AUGMENT):
        yield f"{said('AUG.AUTO_AUGMENT')} is no policy. Write one such as 'rand-m9-mstd0.5-inc1', or 'none'."
    if config.DATA.DATASET not in DATASETS and "/" not in config.DATA.DATASET:
        near = difflib.get_close_matches(config.DATA.DATASET, DATASETS, n=1)
        yield f"{said('DATA.DATASET')} is not known. " + (
            f"Did you mean {near[0]}?" if near else f"Use {', '.join(DATASETS)}, or a timm name such as torch/cifar10."
        )
    elif config.DATA.ZIP_MODE and config.DATA.DATASET != "imagenet":
        yield f"{said('DATA.ZIP_MODE')} is for DATASET imagenet only, not {said('DATA.DATASET')}. Change one of them."
    for key, name in (("MODEL.NAME", config.MODEL.NAME), ("TAG", config.TAG)):
        if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{said(key)} names a folder under OUTPUT, so it must be neither empty nor absolute nor contain '..'."
        elif any(len(os.fsencode(part)) > 255 for part in Path(name).parts):
            yield f"{key} names a folder, whose name may have 255 bytes: give a shorter one than {name[:40]}…"
    if config.EVAL_MODE and config.THROUGHPUT_MODE:
        yield f"{said('EVAL_MODE')} and {said('THROUGHPUT_MODE')} exclude each other: leave out --eval or --throughput."
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        yield f"{said('EVAL_MODE')} needs weights to evaluate: add --resume FILE or --pretrained FILE."


def _validate_architecture(model: CfgNode, section: str, said: Callable[[str], str]) -> Iterator[str]:
    depths, heads = said(f"{section}.DEPTHS"), said(f"{section}.NUM_HEADS")
    if not model.DEPTHS or len(model.DEPTHS) != len(model.NUM_HEADS):
        yield f"{depths} and {heads} must be equally long, one number for each stage."
    for stage, num_heads in enumerate(model.NUM_HEADS):
        width = model.EMBED_DIM * 2**stage
        if width % num_heads:
            yield (
                f"{heads}: the {width} channels of stage {stage} cannot be divided by {num_heads} heads. "
                f"Change it, or {said(f'{section}.EMBED_DIM')}."
            )
            break  # the same channels are doubled in each further stage
    first_windows = model.get("PRETRAINED_WINDOW_SIZES", [])
    if any(first_windows) and len(first_windows) != len(model.DEPTHS):
        yield (
            f"{said(f'{section}.PRETRAINED_WINDOW_SIZES')} and {depths} must be equally long, one number for each "
            "stage; or all zeros, where the weights were made with the present window."
        )
    if model.APE and model.get("POSITION", "rel") in ("none", "rel_no_app"):
        yield (
            f"{said(f'{section}.APE')} adds an absolute position embedding, which {said(f'{section}.POSITION')} is "
            "without: set POSITION to abs or abs+rel, or APE to False."
        )
