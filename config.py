"""Every key of a run: its default, what it means, what it may be; and `get_config`, which puts a run's values together.

Names and defaults are those of the original Swin Transformer code, so its users' files and habits keep working; the
defaults are the paper's recipe (Section 4.1 and Appendix A2.1). The config is frozen and stays as it was given: what
depends on the data or on the number of processes (class count, scaled learning rate) is computed where it is used.
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
    NO_EFFECT,
    NO_EFFECT_FOR,
    NON_SEMANTIC_KEYS,
    SECTIONS,
    UNSUPPORTED,
    check_each,
    refuse_unsupported,
    validate_combinations,
)
from utils.errors import UserError

log = logging.getLogger(__name__)

IMAGENET_22K_CLASSES = 21841  # of the release that the models were pre-trained on

_C = CfgNode()
_C.BASE = [""]  # files to start from, relative to the one that names them; only in a YAML file, empty once resolved

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and micro-batch; even where Mixup or CutMix is on
_C.DATA.DATA_PATH = ""  # folder of the data set
_C.DATA.DATASET = "imagenet"  # imagenet (folder or --zip) | imagenet22K | packed | demo | a timm name: torch/…
_C.DATA.IMG_SIZE = 224  # side of the square input, pixels; not given for a model of timm: what timm says
_C.DATA.INTERPOLATION = "bicubic"  # of resizing: bicubic | bilinear | random (either, for each training image)
_C.DATA.BACKEND = "auto"  # who prepares images: auto (fast where it can be built) | reference | fast | device
_C.DATA.ZIP_MODE = False  # read train.zip and val.zip with their map files instead of an image folder
_C.DATA.CACHE_MODE = "part"  # of the zip files: no (read as needed) | part (each process reads its share ahead) | full
_C.DATA.PIN_MEMORY = True  # collect batches in page-locked memory, which a GPU copies from without waiting
_C.DATA.NUM_WORKERS = 8  # loader processes for each training process; 0 = load in the training process itself
_C.DATA.MAX_BAD_IMAGES = 0  # images that cannot be decoded before the run stops; 0 = stop at the first

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"  # family of models: swin (V1) | swinv2 | swin_mlp | timm (the model of timm that NAME names)
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"  # names the run's folder OUTPUT/NAME/TAG
_C.MODEL.PRETRAINED = ""  # weight file to start a new run from, or to evaluate; '' = random initialisation
_C.MODEL.RESUME = ""  # checkpoint to continue from; wins over PRETRAINED and over what lies in the run's folder
_C.MODEL.NUM_CLASSES = 1000  # outputs of the head; 0 = as the data has classes; not given for imagenet22K: 21841
_C.MODEL.DROP_RATE = 0.0  # dropout after the embedding and in projections and MLPs, probability
_C.MODEL.ATTN_DROP_RATE = 0.0  # dropout of attention weights, probability
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block, probability; rises linearly from 0 at the first
_C.MODEL.DROP_PATH_SKIP = False  # compute only what stochastic depth keeps: faster, as many dropped of every batch
_C.MODEL.LABEL_SMOOTHING = 0.1  # share of a label spread evenly over all classes
_C.MODEL.ATTN = "auto"  # window attention: auto (the fastest here) | reference | sdpa | triton (CUDA) | native (CPU)

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
_C.MODEL.SWIN.APE = False  # add a learned absolute position embedding to the patches, as POSITION abs+rel does
_C.MODEL.SWIN.PATCH_NORM = True  # LayerNorm after the patch embedding
_C.MODEL.SWIN.SHIFT = True  # shift the windows of every second block; False is an ablation of the paper's Table 4
_C.MODEL.SWIN.POSITION = "rel"  # Table 4: none | abs | abs+rel | rel_no_app (attention by position alone) | rel

_C.MODEL.SWINV2 = CfgNode()
_C.MODEL.SWINV2.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWINV2.IN_CHANS = 3  # channels of the input
_C.MODEL.SWINV2.EMBED_DIM = 96  # channels of the first stage; each further stage has twice as many
_C.MODEL.SWINV2.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWINV2.NUM_HEADS = [3, 6, 12, 24]  # attention heads in each stage
_C.MODEL.SWINV2.WINDOW_SIZE = 7  # side of a window, tokens
_C.MODEL.SWINV2.MLP_RATIO = 4.0  # width of an MLP's hidden layer over that of its input
_C.MODEL.SWINV2.QKV_BIAS = True  # biases in the projection to queries and values; keys have none
_C.MODEL.SWINV2.APE = False  # add a learned absolute position embedding to the patches
_C.MODEL.SWINV2.PATCH_NORM = True  # LayerNorm after the patch embedding
_C.MODEL.SWINV2.PRETRAINED_WINDOW_SIZES = [0, 0, 0, 0]  # windows that the weights were made with; 0 = the present one

_C.MODEL.SWIN_MLP = CfgNode()
_C.MODEL.SWIN_MLP.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.SWIN_MLP.IN_CHANS = 3  # channels of the input
_C.MODEL.SWIN_MLP.EMBED_DIM = 96  # channels of the first stage; each further stage has twice as many
_C.MODEL.SWIN_MLP.DEPTHS = [2, 2, 6, 2]  # blocks in each stage
_C.MODEL.SWIN_MLP.NUM_HEADS = [3, 6, 12, 24]  # heads in each stage: groups of channels mixed by weights of their own
_C.MODEL.SWIN_MLP.WINDOW_SIZE = 7  # side of a window, tokens
_C.MODEL.SWIN_MLP.MLP_RATIO = 4.0  # width of an MLP's hidden layer over that of its input
_C.MODEL.SWIN_MLP.APE = False  # add a learned absolute position embedding to the patches
_C.MODEL.SWIN_MLP.PATCH_NORM = True  # LayerNorm after the patch embedding

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
_C.TRAIN.PARALLEL = "ddp"  # several processes: ddp, each has the whole model; fsdp, they share one copy of all of it
_C.TRAIN.COMPILE = False  # compile the model with torch.compile
_C.TRAIN.CUDA_GRAPHS = False  # with COMPILE on a GPU: replay a step's kernels as one graph; pays for small batches
_C.TRAIN.BF16_PARAMS = False  # matrices in bfloat16, float32 masters in the optimizer: casts less, sends half as much

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
_C.TEST.CROP = True  # PROTOCOL original: resize to 256/224 of IMG_SIZE and crop the centre; False: resize to IMG_SIZE
_C.TEST.PRESET = "auto"  # who prepares test images: original | timm | torchvision | hf | auto (the weights' origin)
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
_C.TIMEOUT = 1800  # seconds that a process waits for the others before the run ends, naming who is missing
_C.SEED = 0  # of initialisation, order and every random draw
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # measure images/s only; needs no data
_C.LOCAL_RANK = 0  # no effect (see NO_EFFECT)
_C.FUSED_WINDOW_PROCESS = False  # no effect (see NO_EFFECT)
_C.FUSED_LAYERNORM = False  # no effect (see NO_EFFECT)

# What each key takes: what its default is, except where the default does not say.
SCHEMA = {key: KeyType.of(default) for key, default in flatten(_C).items() if default not in (None, [])} | {
    "MODEL.SWIN.QK_SCALE": KeyType(float, optional=True),
    "AUG.CUTMIX_MINMAX": KeyType(float, list, optional=True),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": KeyType(int, list),
}


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
    config = _C.clone()
    try:
        given = read_files(cfg_file, SCHEMA) if cfg_file is not None else []
        given = _translate_deprecated([*given, *flags, *parse_opts(opts)])
        origins = merge(config, given, SCHEMA)
    except UnknownKey as error:
        for key, what in UNSUPPORTED.items():
            if f"{error.key}.".startswith(f"{key}."):
                refuse_unsupported(key, error.origin, what)
        raise
    check_each(flatten(config), origins)
    _infer_unset(config, origins)
    values = flatten(config)
    said = {key: f"{key} {value!r} ({origins.get(key, 'default')})" for key, value in values.items()}
    wrong = list(validate_combinations(config, said.__getitem__))
    if wrong:
        raise UserError("\n".join(wrong))
    _log_no_effect(values, origins)
    config.freeze()
    return config


def dump(config: CfgNode) -> str:
    """The configuration as YAML; given to --cfg, it means the same run."""
    return to_yaml(config)


def parse(text: str, origin: str) -> CfgNode:
    """The configuration that `dump` wrote, out of the file `origin`.

    Raises:
        UserError: it was written by a version with other keys, or by somebody else.
    """
    return get_config(None, flags=[given for given in read_text(text, origin, SCHEMA) if given.key != "BASE"])


def differences(old: CfgNode, new: CfgNode) -> list[tuple[str, object, object]]:
    """(key, old value, new value) wherever two configs would compute something different; see NON_SEMANTIC_KEYS."""
    old_values, new_values = flatten(old), flatten(new)
    return [
        (key, old_values[key], new_values[key])
        for key in SCHEMA
        if key not in NON_SEMANTIC_KEYS
        and old_values[key] != new_values[key]
        and not {str(old_values[key]), str(new_values[key])} <= BITWISE_EQUIVALENT.get(key, frozenset())
    ]


def _translate_deprecated(given: Sequence[Override]) -> list[Override]:
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


def _infer_unset(config: CfgNode, origins: dict[str, str]) -> None:
    """Sets what nobody gave and what follows from other keys, one line for each: so it stands in the saved config."""
    follows: dict[str, tuple[object, str]] = {}
    if config.DATA.DATASET == "imagenet22K":
        follows["MODEL.NUM_CLASSES"] = (IMAGENET_22K_CLASSES, "DATA.DATASET imagenet22K")
    if config.MODEL.TYPE == "timm":
        images = _from_timm(config.MODEL.NAME, origins.get("MODEL.NAME", "default"))
        follows |= {key: (value, f"timm's {config.MODEL.NAME}") for key, value in images.items()}
    for key, (value, source) in follows.items():
        if key not in origins:
            section, name = key.split(".")
            config[section][name] = value
            origins[key] = source
            log.warning("%s is not given: %r, from %s.", key, value, source)


def _from_timm(name: str, origin: str) -> dict[str, object]:
    """What timm's configuration of the model `name` says about its images."""
    import timm  # slow, and only here: --help and Swin runs do not wait for it

    described = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if described is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"Near it are {', '.join(near)}." if near else "timm.list_models() names them all."
        raise UserError(f"{origin}: MODEL.NAME {name!r} is no model of timm {timm.__version__}. {advice}")
    images: dict[str, object] = {"DATA.IMG_SIZE": described.input_size[-1]}
    if described.interpolation in CHOICES["DATA.INTERPOLATION"]:
        images["DATA.INTERPOLATION"] = described.interpolation
    return images


def _log_no_effect(values: dict[str, object], origins: dict[str, str]) -> None:
    """One line for each key without effect that somebody changed, or typed as a flag."""
    defaults, kind = flatten(_C), values["MODEL.TYPE"]
    for key, why in (NO_EFFECT | NO_EFFECT_FOR.get(kind, {})).items():
        origin = origins.get(key, "")
        if values[key] != defaults[key] or origin.startswith("--") and key in NO_EFFECT:
            log.warning("%s: %s has no effect here: %s.", origin, key, why)
    for section in SECTIONS.values():
        unused = section != SECTIONS.get(kind)
        changed = [key for key in origins if unused and key.startswith(f"{section}.") and values[key] != defaults[key]]
        if changed:
            log.warning(
                "%s: %s has no effect here: MODEL.TYPE is %s.", origins[changed[0]], ", ".join(sorted(changed)), kind
            )
