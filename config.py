"""Every key of a run: its default, what it means, what it may be; and `get_config`, which puts a run's values together.

Names and defaults are those of the original Swin Transformer code, so its users' files and habits keep working; the
defaults are the paper's recipe (Section 4.1 and Appendix A2.1). The config is frozen and stays as it was given: what
depends on the data or on the number of processes (class count, scaled learning rate) is computed where it is used.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from yacs.config import CfgNode

from utils.config_merge import Kind, Override, flatten, merge, pair_up, read_files, to_yaml
from utils.errors import UserError

log = logging.getLogger(__name__)

_C = CfgNode()
_C.BASE = [""]  # files to start from, relative to the one that names them; only in a YAML file, empty once resolved

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and micro-batch; even where Mixup or CutMix is on
_C.DATA.DATA_PATH = ""  # folder of the data set
_C.DATA.DATASET = "imagenet"  # imagenet (folder or --zip) | imagenet22K | demo | a timm name: torch/…, hfds/…
_C.DATA.IMG_SIZE = 224  # side of the square input, pixels
_C.DATA.INTERPOLATION = "bicubic"  # of resizing: bicubic | bilinear | random (one of the two for each training image)
_C.DATA.ZIP_MODE = False  # read train.zip and val.zip with their map files instead of an image folder
_C.DATA.CACHE_MODE = "part"  # of the zip files: no (read as needed) | part (each process reads its share ahead) | full
_C.DATA.PIN_MEMORY = True  # collect batches in page-locked memory, which a GPU copies from without waiting
_C.DATA.NUM_WORKERS = 8  # loader processes for each training process; 0 = load in the training process itself
_C.DATA.MAX_BAD_IMAGES = 0  # images that cannot be decoded before the run stops; 0 = stop at the first

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"  # family of models: swin
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"  # names the run's folder OUTPUT/NAME/TAG
_C.MODEL.PRETRAINED = ""  # weight file to start a new run from, or to evaluate; '' = random initialisation
_C.MODEL.RESUME = ""  # checkpoint to continue from; wins over PRETRAINED and over what lies in the run's folder
_C.MODEL.NUM_CLASSES = 1000  # outputs of the head; 0 = as many as the data has classes
_C.MODEL.DROP_RATE = 0.0  # dropout after the embedding and in projections and MLPs, probability
_C.MODEL.ATTN_DROP_RATE = 0.0  # dropout of attention weights, probability
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block, probability; rises linearly from 0 at the first
_C.MODEL.LABEL_SMOOTHING = 0.1  # share of a label spread evenly over all classes
_C.MODEL.ATTN = "auto"  # how window attention is computed: auto (the fastest here) | reference | sdpa

_C.MODEL.SWIN = CfgNode()
_C.MODEL.SWIN.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWIN.IN_CHANS = 3  # channels of the input
_C.MODEL.SWIN.EMBED_DIM = 96  # channels of the first stage (the paper's C); each further stage has twice as many
_C.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]  # attention heads in each stage
_C.MODEL.SWIN.WINDOW_SIZE = 7  # side of a window, tokens (the paper's M)
_C.MODEL.SWIN.MLP_RATIO = 4.0  # width of an MLP's hidden layer over that of its input
_C.MODEL.SWIN.QKV_BIAS = True  # biases in the projection to queries, keys and values
_C.MODEL.SWIN.QK_SCALE = None  # factor on q·k; None = 1 / sqrt(head width)
_C.MODEL.SWIN.APE = False  # add a learned absolute position embedding to the patches
_C.MODEL.SWIN.PATCH_NORM = True  # LayerNorm after the patch embedding

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0  # no effect (see NO_EFFECT)
_C.TRAIN.EPOCHS = 300  # length of the run, epochs
_C.TRAIN.WARMUP_EPOCHS = 20  # linear warm-up of the learning rate, epochs; 0 = none
_C.TRAIN.WEIGHT_DECAY = 0.05  # of all weights except norms, biases and position tables
_C.TRAIN.BASE_LR = 5e-4  # learning rate after warm-up, for 512 images an update; scaled in proportion to their number
_C.TRAIN.WARMUP_LR = 5e-7  # learning rate at the first update, for 512 images an update
_C.TRAIN.MIN_LR = 5e-6  # learning rate at the end of the cosine, for 512 images an update
_C.TRAIN.CLIP_GRAD = 5.0  # largest norm of the gradient, clipped beyond; 0 = no clipping
_C.TRAIN.AUTO_RESUME = True  # continue from the last checkpoint in the run's folder if there is one
_C.TRAIN.ACCUMULATION_STEPS = 1  # micro-batches that each process adds up for one update
_C.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing: recompute activations in backward, less memory, more time
_C.TRAIN.LAYER_DECAY = 1.0  # learning rate of each layer over that of the layer above it; 1 = all the same
_C.TRAIN.EMA_DECAY = 0.0  # decay per update of a moving average of the weights, evaluated too; 0 = none
_C.TRAIN.MAX_BAD_STEPS = 10  # updates in a row with a loss or gradient that is not finite before the run stops
_C.TRAIN.COMPILE = False  # compile the model with torch.compile

_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # after warm-up: cosine | linear | step | multistep
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between two decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor on the learning rate at each decay
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True  # cosine: begins after warm-up (True) or at the first update (False)
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1  # multistep: factor on the learning rate at each of MULTISTEPS
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []  # multistep: epochs at which the learning rate falls, rising

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # adamw: added to the denominator
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # adamw: decay of the averages of the gradient and of its square
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd: momentum, of Nesterov's kind

_C.TRAIN.MOE = CfgNode()
_C.TRAIN.MOE.SAVE_MASTER = False  # no effect (see NO_EFFECT)

_C.AUG = CfgNode()
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip; 0 where left and right matter, as in digits and text
_C.AUG.COLOR_JITTER = 0.4  # strength of colour jitter, used where AUTO_AUGMENT is none; 0 = off
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # of timm: rand-… | augmix-… | original | originalr | v0 | v0r | 3a | none
_C.AUG.REPROB = 0.25  # random erasing, probability
_C.AUG.REMODE = "pixel"  # random erasing fills with: const (0) | rand (one colour) | pixel (noise at each pixel)
_C.AUG.RECOUNT = 1  # random erasing: largest number of areas in an image
_C.AUG.MIXUP = 0.8  # alpha of Mixup; 0 = off
_C.AUG.CUTMIX = 1.0  # alpha of CutMix; 0 = off
_C.AUG.CUTMIX_MINMAX = None  # [least, largest] share of the side that CutMix cuts; None = drawn by alpha
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch is mixed at all
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of CutMix instead of Mixup where both are on
_C.AUG.MIXUP_MODE = "batch"  # one draw for each: batch | pair | elem

_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize to 256/224 of IMG_SIZE and crop the centre (True), or resize to IMG_SIZE (False)
_C.TEST.SEQUENTIAL = False  # no effect (see NO_EFFECT)
_C.TEST.SHUFFLE = False  # no effect (see NO_EFFECT)

_C.AMP_ENABLE = True  # mixed precision
_C.AMP_DTYPE = "auto"  # of mixed precision: auto (what the device does well) | bfloat16 | float16 | float32
_C.OUTPUT = "logs"  # folder of all runs; a run lies in OUTPUT/MODEL.NAME/TAG
_C.TAG = "default"  # name of this run beside others of the same model
_C.SAVE_FREQ = 1  # epochs between two numbered checkpoints
_C.SAVE_STEPS = 0  # updates between two saves of the last checkpoint inside an epoch; 0 = none
_C.SAVE_KEEP = 3  # numbered checkpoints that stay, the newest; 0 = all
_C.PRINT_FREQ = 10  # updates between two lines in the log
_C.SEED = 0  # of initialisation, order and every random draw
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # measure images/s only; needs no data
_C.LOCAL_RANK = 0  # no effect (see NO_EFFECT)
_C.FUSED_WINDOW_PROCESS = False  # no effect (see NO_EFFECT)
_C.FUSED_LAYERNORM = False  # no effect (see NO_EFFECT)

# What each key takes: what its default is, except where the default does not say.
SCHEMA = {key: Kind.of(default) for key, default in flatten(_C).items() if default not in (None, [])} | {
    "MODEL.SWIN.QK_SCALE": Kind(float, optional=True),
    "AUG.CUTMIX_MINMAX": Kind(float, list, optional=True),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": Kind(int, list),
}

CHOICES = {
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "MODEL.TYPE": ("swin",),
    "MODEL.ATTN": ("auto", "reference", "sdpa"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_DTYPE": ("auto", "bfloat16", "float16", "float32"),
}

# Bounds of numbers (of each one in a list): a bracket includes its bound, a parenthesis does not.
INTERVALS = {
    "[0, inf)": """
        DATA.NUM_WORKERS DATA.MAX_BAD_IMAGES MODEL.NUM_CLASSES TRAIN.START_EPOCH TRAIN.WARMUP_EPOCHS TRAIN.WEIGHT_DECAY
        TRAIN.BASE_LR TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.CLIP_GRAD TRAIN.OPTIMIZER.EPS AUG.COLOR_JITTER AUG.MIXUP
        AUG.CUTMIX SAVE_STEPS SAVE_KEEP SEED LOCAL_RANK""",
    "[1, inf)": """
        DATA.BATCH_SIZE DATA.IMG_SIZE MODEL.SWIN.PATCH_SIZE MODEL.SWIN.IN_CHANS MODEL.SWIN.EMBED_DIM MODEL.SWIN.DEPTHS
        MODEL.SWIN.NUM_HEADS MODEL.SWIN.WINDOW_SIZE TRAIN.EPOCHS TRAIN.ACCUMULATION_STEPS TRAIN.MAX_BAD_STEPS
        TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.MULTISTEPS AUG.RECOUNT SAVE_FREQ PRINT_FREQ""",
    "(0, inf)": "MODEL.SWIN.MLP_RATIO MODEL.SWIN.QK_SCALE",
    "[0, 1)": """
        MODEL.DROP_RATE MODEL.ATTN_DROP_RATE MODEL.DROP_PATH_RATE MODEL.LABEL_SMOOTHING TRAIN.EMA_DECAY
        TRAIN.OPTIMIZER.BETAS""",
    "(0, 1)": "TRAIN.OPTIMIZER.MOMENTUM",
    "[0, 1]": "AUG.HFLIP AUG.REPROB AUG.CUTMIX_MINMAX AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB",
    "(0, 1]": "TRAIN.LAYER_DECAY TRAIN.LR_SCHEDULER.DECAY_RATE TRAIN.LR_SCHEDULER.GAMMA",
}

LENGTHS = {"TRAIN.OPTIMIZER.BETAS": 2, "AUG.CUTMIX_MINMAX": 2}

DATASETS = ("imagenet", "imagenet22K", "demo")

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

# Keys that say where, how often and with which means, but do not change what a run computes. Two configs that differ in
# these alone are the same run. Not among them: ACCUMULATION_STEPS, USE_CHECKPOINT, ATTN and the like, which may change
# the last digits, and DATA.ZIP_MODE, since a zip may hold other files, in another order, than a folder.
BOOKKEEPING = frozenset(NO_EFFECT) | {
    "BASE", "DATA.DATA_PATH", "DATA.CACHE_MODE", "DATA.PIN_MEMORY", "DATA.NUM_WORKERS", "DATA.MAX_BAD_IMAGES",
    "MODEL.RESUME", "TRAIN.AUTO_RESUME", "TRAIN.MAX_BAD_STEPS", "OUTPUT", "TAG", "SAVE_FREQ", "SAVE_STEPS", "SAVE_KEEP",
    "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE",
}  # fmt: skip


def get_config(cfg_file: str | Path | None, opts: Sequence[object] = (), flags: Sequence[Override] = ()) -> CfgNode:
    """The frozen configuration of a run: defaults < BASE files < `cfg_file` < `flags` < `opts`.

    A value that was given wins over one that was not, also when it is 0, False or ''.

    Args:
        cfg_file: a YAML file, or None for the defaults alone.
        opts: KEY VALUE KEY VALUE …, as after --opts.
        flags: what the other flags of the command line set.

    Raises:
        UserError: unknown key, wrong type, value out of range, values that contradict each other, or a file that is
            missing, malformed, not YAML or in a circle of BASE.
    """
    given = read_files(cfg_file, SCHEMA) if cfg_file is not None else []
    given = _without_old_names([*given, *flags, *pair_up(opts)])
    config = _C.clone()
    origins = merge(config, given, SCHEMA)
    values = flatten(config)
    _check_each(values, origins)
    said = {key: f"{key} {value!r} ({origins.get(key, 'default')})" for key, value in values.items()}
    contradictions = list(_contradictions(config, said.__getitem__))
    if contradictions:
        raise UserError("\n".join(contradictions))
    _say_no_effect(values, origins)
    config.freeze()
    return config


def dump(config: CfgNode) -> str:
    """The configuration as YAML; given to --cfg, it means the same run."""
    return to_yaml(config)


def differences(old: CfgNode, new: CfgNode) -> list[tuple[str, object, object]]:
    """(key, old value, new value) wherever two configs would compute something different; see BOOKKEEPING."""
    old_values, new_values = flatten(old), flatten(new)
    return [
        (key, old_values[key], new_values[key])
        for key in SCHEMA
        if key not in BOOKKEEPING and old_values[key] != new_values[key]
    ]


def _without_old_names(given: Sequence[Override]) -> list[Override]:
    """Translates the original's two other ways to say AMP_ENABLE, saying so once for each."""
    translated, warned = [], set()
    for override in given:
        key, value, origin = override.key, override.value, override.origin
        if key not in ("ENABLE_AMP", "AMP_OPT_LEVEL"):
            translated.append(override)
            continue
        if key == "ENABLE_AMP":
            meaning = "is the old name of AMP_ENABLE and taken as that"
            translated.append(Override("AMP_ENABLE", value, origin))
        elif value in ("O0", "o0"):
            meaning = "(Apex) 'O0' is taken as AMP_ENABLE False"
            translated.append(Override("AMP_ENABLE", False, origin))
        elif value in ("", "O1", "O2", "o1", "o2"):
            meaning = f"(Apex) {value!r} has no effect: mixed precision is PyTorch's, set by AMP_ENABLE and AMP_DTYPE"
        else:
            raise UserError(f"{origin}: AMP_OPT_LEVEL is {value!r}, not one of O0, O1, O2. Better use AMP_ENABLE.")
        if value != "" and key not in warned:
            warned.add(key)
            log.warning("%s: %s %s.", origin, key, meaning)
    return translated


def _check_each(values: dict[str, object], origins: dict[str, str]) -> None:
    """Refuses the first value that is outside its choices, interval or length."""
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
    for key, length in LENGTHS.items():
        if values[key] is not None and len(values[key]) != length:
            raise UserError(f"{origins.get(key, 'default')}: {key} is {values[key]!r} but must have {length} numbers.")


def _inside(interval: str) -> Callable[[object], bool]:
    low, high = map(float, interval[1:-1].split(","))

    def accepts(number: float) -> bool:
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        return above and below

    return accepts


def _contradictions(config: CfgNode, said: Callable[[str], str]) -> Iterator[str]:
    """Sentences about values that are right alone but not together. `said` quotes a key with its value and origin."""
    yield from _architecture_contradictions(config.MODEL.SWIN, said)
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
    mixing = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    if mixing and config.DATA.BATCH_SIZE % 2 and not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        yield (
            f"{said('DATA.BATCH_SIZE')} must be even, because Mixup and CutMix pair images; or switch them off: "
            "--opts AUG.MIXUP 0 AUG.CUTMIX 0 AUG.CUTMIX_MINMAX None."
        )
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
    if config.EVAL_MODE and config.THROUGHPUT_MODE:
        yield f"{said('EVAL_MODE')} and {said('THROUGHPUT_MODE')} exclude each other: leave out --eval or --throughput."
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        yield f"{said('EVAL_MODE')} needs weights to evaluate: add --resume FILE or --pretrained FILE."


def _architecture_contradictions(swin: CfgNode, said: Callable[[str], str]) -> Iterator[str]:
    depths, heads = said("MODEL.SWIN.DEPTHS"), said("MODEL.SWIN.NUM_HEADS")
    if not swin.DEPTHS or len(swin.DEPTHS) != len(swin.NUM_HEADS):
        yield f"{depths} and {heads} must be equally long, one number for each stage."
    for stage, num_heads in enumerate(swin.NUM_HEADS):
        width = swin.EMBED_DIM * 2**stage
        if width % num_heads:
            yield (
                f"{heads}: the {width} channels of stage {stage} cannot be divided by {num_heads} heads. "
                f"Change it, or {said('MODEL.SWIN.EMBED_DIM')}."
            )
            break  # the same channels are doubled in each further stage


def _say_no_effect(values: dict[str, object], origins: dict[str, str]) -> None:
    """One line for each key without effect that somebody changed, or typed as a flag."""
    defaults = flatten(_C)
    for key, why in NO_EFFECT.items():
        origin = origins.get(key, "")
        if values[key] != defaults[key] or origin.startswith("--"):
            log.warning("%s: %s has no effect here: %s.", origin, key, why)
