"""Every configuration key with its default and meaning, and `get_config`, which builds the configuration of a run.

Names and defaults are those of the original Swin Transformer code, so that its YAML files work here. The defaults are
the paper's recipe (Section 4.1 and Appendix A2.1). The config is frozen; values that depend on the data or on the world
size (number of classes, scaled learning rate) are computed where they are used. `docs/CONFIG.md` is generated from this
file: see utils/config/docs.py.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from utils.config.merge import KeyType, Override, UnknownKey, flatten, merge, parse_opts, read_files, read_text, to_yaml
from utils.config.rules import (
    BITWISE_EQUIVALENT,
    CHOICES,
    EXPERIMENTAL,
    IMAGENET_22K_CLASSES,
    NO_EFFECT,
    NO_EFFECT_FOR,
    NON_SEMANTIC_KEYS,
    PATHS,
    SECTIONS,
    UNSUPPORTED,
    check_each,
    refuse_unsupported,
    validate_combinations,
)
from utils.errors import UserError
from utils.paths import expand_user

log = logging.getLogger(__name__)

_C = CfgNode()
_C.BASE = [""]  # YAML files to start from, relative to the file that names them; only in a YAML file, empty once merged

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and micro-batch; even if Mixup or CutMix is on
_C.DATA.DATA_PATH = ""  # folder of the data set
_C.DATA.DATASET = "imagenet"  # imagenet (folder or --zip) | imagenet22K | packed | demo | a timm name: torch/…
_C.DATA.IMG_SIZE = 224  # side of the square input, pixels; unset with MODEL.TYPE timm: timm's size for the model
_C.DATA.INTERPOLATION = "bicubic"  # for resizing: bicubic | bilinear | random (one of the two for each training image)
_C.DATA.BACKEND = "auto"  # image transforms: auto (native if it can be compiled) | reference | native | gpu
_C.DATA.EXIF_ORIENTATION = False  # turn images as their EXIF data say; the original recipe and released weights do not
_C.DATA.ZIP_MODE = False  # read train.zip and val.zip with their map files instead of an image folder
_C.DATA.CACHE_MODE = "part"  # zip files in memory: no (read when needed) | part (each process preloads a share) | full
_C.DATA.PIN_MEMORY = True  # collate batches in page-locked memory, from which a GPU copies asynchronously
_C.DATA.NUM_WORKERS = 8  # loader workers per process; 0 = load in the training process itself
_C.DATA.MAX_BAD_IMAGES = 0  # images that may fail to decode before the run stops; 0 = stop at the first

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"  # model family: swin (V1) | swinv2 | swin_mlp | timm (the timm model called NAME)
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"  # name of the model; part of the run's folder OUTPUT/NAME/TAG
_C.MODEL.PRETRAINED = ""  # weights to start a new run from, or to evaluate; '' = random initialization
_C.MODEL.PRETRAINED_EMA = "auto"  # of a file that holds an average too: auto (what it says is better) | model | ema
_C.MODEL.RESUME = ""  # checkpoint to start from; ignored once the run in its folder has started from it
_C.MODEL.NUM_CLASSES = 1000  # outputs of the head; 0 = number of classes in the data; unset with imagenet22K: 21841
_C.MODEL.DROP_RATE = 0.0  # dropout probability after the embedding and in projections and MLPs
_C.MODEL.ATTN_DROP_RATE = 0.0  # dropout probability of attention weights
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth: drop probability of the last block; linear from 0 at the first
_C.MODEL.DROP_PATH_SKIP = False  # drop a fixed number of samples per batch and do not compute them: faster
_C.MODEL.LABEL_SMOOTHING = 0.1  # share of a label that is spread evenly over all classes
_C.MODEL.ATTN = "auto"  # window attention: auto (fastest available) | reference | sdpa | triton (CUDA) | native (CPU)

_C.MODEL.SWIN = CfgNode()
_C.MODEL.SWIN.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWIN.IN_CHANS = 3  # channels of the input
_C.MODEL.SWIN.EMBED_DIM = 96  # channels of the first stage (the paper's C); each stage doubles them
_C.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]  # attention heads in each stage
_C.MODEL.SWIN.WINDOW_SIZE = 7  # side of a window, tokens (the paper's M)
_C.MODEL.SWIN.MLP_RATIO = 4.0  # hidden width of an MLP relative to its input
_C.MODEL.SWIN.QKV_BIAS = True  # bias in the projection to queries, keys and values
_C.MODEL.SWIN.QK_SCALE = None  # factor on q·k; None = 1 / sqrt(head width)
_C.MODEL.SWIN.APE = False  # add a learned absolute position embedding to the patches, as POSITION abs+rel does
_C.MODEL.SWIN.PATCH_NORM = True  # LayerNorm after the patch embedding
_C.MODEL.SWIN.SHIFT = True  # shift the windows of every second block; False is an ablation in the paper's Table 4
_C.MODEL.SWIN.POSITION = "rel"  # Table 4: none | abs | abs+rel | rel_no_app (attention from positions only) | rel

_C.MODEL.SWINV2 = CfgNode()
_C.MODEL.SWINV2.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWINV2.IN_CHANS = 3  # channels of the input
_C.MODEL.SWINV2.EMBED_DIM = 96  # channels of the first stage; each stage doubles them
_C.MODEL.SWINV2.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWINV2.NUM_HEADS = [3, 6, 12, 24]  # attention heads in each stage
_C.MODEL.SWINV2.WINDOW_SIZE = 7  # side of a window, tokens
_C.MODEL.SWINV2.MLP_RATIO = 4.0  # hidden width of an MLP relative to its input
_C.MODEL.SWINV2.QKV_BIAS = True  # bias in the projection to queries and values; keys have none
_C.MODEL.SWINV2.APE = False  # add a learned absolute position embedding to the patches
_C.MODEL.SWINV2.PATCH_NORM = True  # LayerNorm after the patch embedding
_C.MODEL.SWINV2.PRETRAINED_WINDOW_SIZES = [0, 0, 0, 0]  # window size of the pre-training, per stage; 0 = WINDOW_SIZE

_C.MODEL.SWIN_MLP = CfgNode()
_C.MODEL.SWIN_MLP.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWIN_MLP.IN_CHANS = 3  # channels of the input
_C.MODEL.SWIN_MLP.EMBED_DIM = 96  # channels of the first stage; each stage doubles them
_C.MODEL.SWIN_MLP.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWIN_MLP.NUM_HEADS = [3, 6, 12, 24]  # heads in each stage: groups of channels with their own spatial weights
_C.MODEL.SWIN_MLP.WINDOW_SIZE = 7  # side of a window, tokens
_C.MODEL.SWIN_MLP.MLP_RATIO = 4.0  # hidden width of an MLP relative to its input
_C.MODEL.SWIN_MLP.APE = False  # add a learned absolute position embedding to the patches
_C.MODEL.SWIN_MLP.PATCH_NORM = True  # LayerNorm after the patch embedding

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0  # no effect (see NO_EFFECT)
_C.TRAIN.EPOCHS = 300  # length of the run, epochs
_C.TRAIN.WARMUP_EPOCHS = 20  # linear warm-up of the learning rate, epochs; 0 = none
_C.TRAIN.WEIGHT_DECAY = 0.05  # of all weights except norms, biases and position tables
_C.TRAIN.BASE_LR = 5e-4  # learning rate after warm-up for a global batch of 512; scaled linearly with its size
_C.TRAIN.WARMUP_LR = 5e-7  # learning rate at the first step for a global batch of 512, at most BASE_LR; scaled likewise
_C.TRAIN.MIN_LR = 5e-6  # learning rate at the end of the cosine for a global batch of 512, at most BASE_LR; likewise
_C.TRAIN.CLIP_GRAD = 5.0  # maximum gradient norm; 0 = no clipping
_C.TRAIN.AUTO_RESUME = True  # continue from the last checkpoint in the run's folder, if there is one
_C.TRAIN.ACCUMULATION_STEPS = 1  # gradient accumulation steps: micro-batches per process in one step
_C.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing: recompute activations in backward; less memory, more time
_C.TRAIN.LAYER_DECAY = 1.0  # learning rate of each layer relative to the layer above it; 1 = the same for all
_C.TRAIN.EMA_DECAY = 0.0  # decay per step of a moving average of the weights, which is evaluated too; 0 = none
_C.TRAIN.MAX_BAD_STEPS = 10  # steps in a row with a non-finite loss or gradient before the run stops
_C.TRAIN.PARALLEL = "ddp"  # with several processes: ddp (each has the whole model) | fsdp (they share one sharded copy)
_C.TRAIN.BEST_METRIC = "auto"  # metric that selects best.pth: auto (the task's main one) | acc1 | acc5 | loss
_C.TRAIN.COMPILE = "auto"  # compile the model with torch.compile: auto (training on a GPU) | True | False
_C.TRAIN.CUDA_GRAPHS = False  # experimental: never run on a GPU. With COMPILE: replay each step as one CUDA graph
_C.TRAIN.BF16_PARAMS = False  # experimental: never run on a GPU. bfloat16 matrices, float32 masters in the optimizer

_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # after warm-up: cosine | linear | step | multistep
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between two decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor on the learning rate at each decay
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True  # cosine: starts after warm-up (True) or at the first step (False)
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1  # multistep: factor on the learning rate at each epoch of MULTISTEPS
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []  # multistep: epochs at which the learning rate decays, in rising order

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # adamw: added to the denominator
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # adamw: decay rates of the averages of the gradient and of its square
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd: Nesterov momentum

_C.TRAIN.MOE = CfgNode()
_C.TRAIN.MOE.SAVE_MASTER = False  # no effect (see NO_EFFECT)

_C.AUG = CfgNode()
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip; 0 where left and right matter, as in digits and text
_C.AUG.COLOR_JITTER = 0.4  # strength of color jitter, used if AUTO_AUGMENT is none; 0 = off
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm: rand-… | augmix-… | original | originalr | v0 | v0r | 3a | none
_C.AUG.REPROB = 0.25  # random erasing: probability
_C.AUG.REMODE = "pixel"  # random erasing fills with: const (0) | rand (one color) | pixel (noise per pixel)
_C.AUG.RECOUNT = 1  # random erasing: maximum number of areas in an image
_C.AUG.MIXUP = 0.8  # alpha of Mixup; 0 = off
_C.AUG.CUTMIX = 1.0  # alpha of CutMix; 0 = off
_C.AUG.CUTMIX_MINMAX = None  # [smallest, largest] share of the side that CutMix cuts; None = drawn by alpha
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch is mixed
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of CutMix instead of Mixup if both are on
_C.AUG.MIXUP_MODE = "batch"  # one draw per: batch | pair | elem

_C.TEST = CfgNode()
_C.TEST.CROP = True  # PRESET original: resize to 256/224 of IMG_SIZE and crop the center; False: resize to IMG_SIZE
_C.TEST.PRESET = "auto"  # evaluation preset: original | timm | torchvision | hf | auto (the weights' origin)
_C.TEST.SEQUENTIAL = False  # no effect (see NO_EFFECT)
_C.TEST.SHUFFLE = False  # no effect (see NO_EFFECT)

_C.AMP_ENABLE = True  # mixed precision
_C.AMP_DTYPE = "auto"  # dtype of mixed precision: auto (what the device computes well) | bfloat16 | float16 | float32
_C.OUTPUT = "logs"  # folder of all runs; each run writes to OUTPUT/MODEL.NAME/TAG
_C.TAG = "default"  # name of this run, to tell it from others of the same model
_C.VAL_FREQ = 1  # epochs between two evaluations, of which best.pth is the best; the last epoch is always evaluated
_C.SAVE_FREQ = 1  # epochs between two numbered checkpoints
_C.SAVE_STEPS = 0  # steps between two saves of last.pth within an epoch; 0 = none
_C.SAVE_KEEP = 3  # number of numbered checkpoints to keep, the newest; 0 = all
_C.PRINT_FREQ = 10  # steps between two lines in the log
_C.TIMEOUT = 1800  # seconds that a process waits for the others before the run ends and names the lost ranks
_C.SEED = 0  # seed of initialization, data order and every random draw
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # measure images/s only; needs no data
_C.LOCAL_RANK = 0  # no effect (see NO_EFFECT)
_C.FUSED_WINDOW_PROCESS = False  # no effect (see NO_EFFECT)
_C.FUSED_LAYERNORM = False  # no effect (see NO_EFFECT)

# The type of each key: that of its default, except where the default does not tell.
SCHEMA = {key: KeyType.of(default) for key, default in flatten(_C).items() if default not in (None, [])} | {
    "MODEL.SWIN.QK_SCALE": KeyType(float, optional=True),
    "TRAIN.COMPILE": KeyType(bool, words=("auto",)),
    "AUG.CUTMIX_MINMAX": KeyType(float, list, optional=True),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": KeyType(int, list),
}


def get_config(cfg_file: str | Path | None, opts: Sequence[object] = (), flags: Sequence[Override] = ()) -> CfgNode:
    """Returns the frozen configuration of a run. Precedence: defaults < BASE files < `cfg_file` < `flags` < `opts`.

    A value of 0, False or '' that was given explicitly overrides earlier ones like any other value.

    Args:
        cfg_file: a YAML file, or None for the defaults.
        opts: KEY VALUE KEY VALUE …, as after --opts.
        flags: the keys set by other flags of the command line.

    Raises:
        UserError: unknown key, wrong type, value out of range, values that contradict each other, or a file that is
            missing, malformed, not YAML or has a circular BASE.
    """
    try:
        given = read_files(cfg_file, SCHEMA) if cfg_file is not None else []
        config, origins = _build([*given, *flags, *parse_opts(opts)])
    except UnknownKey as error:
        for key, feature in UNSUPPORTED.items():
            if f"{error.key}.".startswith(f"{key}."):
                refuse_unsupported(key, error.origin, feature)
        raise
    values = flatten(config)
    _log_no_effect(values, origins)
    for key in EXPERIMENTAL:
        if values[key]:
            log.warning("%s: %s is experimental: it has never run on a GPU.", origins[key], key)
    return config


def _build(given: Sequence[Override], saved: bool = False) -> tuple[CfgNode, dict[str, str]]:
    """Merges `given` into the defaults, infers unset keys and validates the result; returns the origins too.

    Args:
        saved: it is of an earlier run, whose values are accepted as they are if each alone is valid.
    """
    config = _C.clone()
    origins = merge(config, _translate_deprecated(given), SCHEMA)
    check_each(flatten(config), origins)
    if not saved:
        _expand_paths(config, origins)
    _infer_unset(config, origins)
    described = {key: f"{key} {value!r} ({origins.get(key, 'default')})" for key, value in flatten(config).items()}
    contradictions = [] if saved else list(validate_combinations(config, described.__getitem__))
    if contradictions:
        raise UserError("\n".join(contradictions))
    config.freeze()
    return config, origins


def dump(config: CfgNode) -> str:
    """Returns the configuration as YAML, which --cfg reads as the same run."""
    return to_yaml(config)


def parse(text: str, origin: str) -> CfgNode:
    """Returns the configuration that `dump` wrote into the file `origin`.

    It is only compared: nothing is logged, and combinations of values are accepted that this version refuses.

    Raises:
        UserError: it was written by a version with other keys, or by another program.
    """
    overrides = [override for override in read_text(text, origin, SCHEMA) if override.key != "BASE"]
    return _build(overrides, saved=True)[0]


def differences(old: CfgNode, new: CfgNode) -> list[tuple[str, object, object]]:
    """Returns (key, old value, new value) for each difference that changes results; see NON_SEMANTIC_KEYS."""
    old_values, new_values = flatten(old), flatten(new)
    return [
        (key, old_values[key], new_values[key])
        for key in SCHEMA
        if key not in NON_SEMANTIC_KEYS
        and old_values[key] != new_values[key]
        and not {str(old_values[key]), str(new_values[key])} <= BITWISE_EQUIVALENT.get(key, frozenset())
    ]


def _translate_deprecated(given: Sequence[Override]) -> list[Override]:
    """Translates the original's two older keys for AMP_ENABLE, and logs each once."""
    translated, warned = [], set()
    for override in given:
        key, value, origin = override.key, override.value, override.origin
        if key not in ("ENABLE_AMP", "AMP_OPT_LEVEL"):
            translated.append(override)
            continue
        if key == "ENABLE_AMP":
            meaning = "is the old name of AMP_ENABLE and is read as that"
            translated.append(Override("AMP_ENABLE", value, origin))
        elif value in ("O0", "o0"):
            meaning = "(Apex) 'O0' is read as AMP_ENABLE False"
            translated.append(Override("AMP_ENABLE", False, origin))
        elif value in ("", "O1", "O2", "o1", "o2"):
            meaning = f"(Apex) {value!r} has no effect: mixed precision is PyTorch's, set by AMP_ENABLE and AMP_DTYPE"
        else:
            raise UserError(f"{origin}: AMP_OPT_LEVEL is {value!r}, not one of O0, O1, O2. Use AMP_ENABLE instead.")
        if value != "" and key not in warned:
            warned.add(key)
            log.warning("%s: %s %s.", origin, key, meaning)
    return translated


def _infer_unset(config: CfgNode, origins: dict[str, str]) -> None:
    """Infers unset keys from others, and logs each; the saved config holds the inferred values."""
    inferred: dict[str, tuple[object, str]] = {}  # value and its source
    if config.DATA.DATASET == "imagenet22K":
        inferred["MODEL.NUM_CLASSES"] = (IMAGENET_22K_CLASSES, "DATA.DATASET imagenet22K")
    if config.MODEL.TYPE == "timm":
        images = _from_timm(config.MODEL.NAME, origins.get("MODEL.NAME", "default"))
        inferred |= {key: (value, f"timm's {config.MODEL.NAME}") for key, value in images.items()}
    for key, (value, source) in inferred.items():
        if key not in origins:
            section, name = key.split(".")
            config[section][name] = value
            origins[key] = source
            log.warning("%s is not given: %r, from %s.", key, value, source)


def _expand_paths(config: CfgNode, origins: dict[str, str]) -> None:
    """Replaces `~` in paths, so that the saved config means the same for any user."""
    for key in PATHS:
        *sections, name = key.split(".")
        node = config[sections[0]] if sections else config
        node[name] = expand_user(node[name], f"{origins.get(key, 'default')}: {key}")


def _from_timm(name: str, origin: str) -> dict[str, object]:
    """Returns the keys that timm's pre-training of the model `name` determines: image size and interpolation."""
    import timm  # slow: only runs with timm models wait for it

    pretrained_cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if pretrained_cfg is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"Similar names: {', '.join(near)}." if near else "timm.list_models() lists all."
        raise UserError(f"{origin}: MODEL.NAME {name!r} is no model of timm {timm.__version__}. {advice}")
    images: dict[str, object] = {"DATA.IMG_SIZE": pretrained_cfg.input_size[-1]}
    if pretrained_cfg.interpolation in CHOICES["DATA.INTERPOLATION"]:
        images["DATA.INTERPOLATION"] = pretrained_cfg.interpolation
    return images


def _log_no_effect(values: dict[str, object], origins: dict[str, str]) -> None:
    """Logs one line for each key without effect that was changed, or given as a flag."""
    defaults, model_type = flatten(_C), str(values["MODEL.TYPE"])
    for key, why in (NO_EFFECT | NO_EFFECT_FOR.get(model_type, {})).items():
        origin = origins.get(key, "")
        if values[key] != defaults[key] or origin.startswith("--") and key in NO_EFFECT:
            log.warning("%s: %s has no effect here: %s.", origin, key, why)
    for section in SECTIONS.values():
        unused = section != SECTIONS.get(model_type)
        changed = [key for key in origins if unused and key.startswith(f"{section}.") and values[key] != defaults[key]]
        if changed:
            log.warning(
                "%s: %s has no effect here: MODEL.TYPE is %s.",
                origins[changed[0]],
                ", ".join(sorted(changed)),
                model_type,
            )
