"""YAML files of the original project, by their values: V1, V2 and MLP build unchanged, others are refused by name.

The recipes of this project are those files under shorter names. (One NAME is corrected here: the original's file of
V2-L from 12 to 16 has the name of V2-B.)
"""

from pathlib import Path

import pytest
import torch

from config import get_config
from models.build import build_model
from models.count import count_parameters
from utils.config.merge import flatten
from utils.errors import UserError
from utils.paths import REPO_ROOT

FT = "192to{}_22kto1k_ft"  # the end of the names of V2's fine-tunings
T = "EMBED_DIM: 96, DEPTHS: [ 2, 2, 6, 2 ], NUM_HEADS: [ 3, 6, 12, 24 ]"
S = "EMBED_DIM: 96, DEPTHS: [ 2, 2, 18, 2 ], NUM_HEADS: [ 3, 6, 12, 24 ]"
B = "EMBED_DIM: 128, DEPTHS: [ 2, 2, 18, 2 ], NUM_HEADS: [ 4, 8, 16, 32 ]"
L = "EMBED_DIM: 192, DEPTHS: [ 2, 2, 18, 2 ], NUM_HEADS: [ 6, 12, 24, 48 ]"
C24, C12, C6 = (f"EMBED_DIM: 96, DEPTHS: [ 2, 2, 6, 2 ], NUM_HEADS: {heads}" for heads in (
    "[ 4, 8, 16, 32 ]", "[ 8, 16, 32, 64 ]", "[ 16, 32, 64, 128 ]"))  # fmt: skip
TUNE = "EPOCHS: 30, WARMUP_EPOCHS: 5, WEIGHT_DECAY: 1e-8, BASE_LR: 2e-05, WARMUP_LR: 2e-08, MIN_LR: 2e-07"
PRE = "EPOCHS: 90, WARMUP_EPOCHS: 5, WEIGHT_DECAY: {}, BASE_LR: 1.25e-4, WARMUP_LR: 1.25e-7, MIN_LR: 1.25e-6"
PRE_V1, PRE_V2 = PRE.format(0.05), PRE.format(0.1)

# Name of the file, recipe here, type, stochastic depth, architecture, window, TRAIN, pixels where given; and the
# parameters with the head of 1,000 or 21,841 classes.
ORIGINAL = [
    ("swin_tiny_patch4_window7_224", "swin_tiny", "swin", 0.2, T, 7, "", 0, 28_288_354),
    ("swin_small_patch4_window7_224", "swin_small", "swin", 0.3, S, 7, "", 0, 49_606_258),
    ("swin_base_patch4_window7_224", "swin_base", "swin", 0.5, B, 7, "", 0, 87_768_224),
    ("swin_tiny_c24_patch4_window8_256", "swin_tiny_c24", "swin", 0.2, C24, 8, "", 256, 28_306_432),
    ("swin_base_patch4_window12_384_finetune", "swin_base_384", "swin", 0.5, B, 12, TUNE, 384, 87_903_584),
    ("swin_tiny_patch4_window7_224_22k", "swin_tiny_22k", "swin", 0.1, T, 7, PRE_V1, 0, 44_315_083),
    ("swin_small_patch4_window7_224_22k", "swin_small_22k", "swin", 0.2, S, 7, PRE_V1, 0, 65_632_987),
    ("swin_base_patch4_window7_224_22k", "swin_base_22k", "swin", 0.2, B, 7, PRE_V1, 0, 109_130_249),
    ("swin_large_patch4_window7_224_22k", "swin_large_22k", "swin", 0.2, L, 7, PRE_V1, 0, 228_565_093),
    ("swin_tiny_patch4_window7_224_22kto1k_finetune", "swin_tiny_22kto1k", "swin", 0.1, T, 7, TUNE, 0, 28_288_354),
    ("swin_small_patch4_window7_224_22kto1k_finetune", "swin_small_22kto1k", "swin", 0.2, S, 7, TUNE, 0, 49_606_258),
    ("swin_base_patch4_window7_224_22kto1k_finetune", "swin_base_22kto1k", "swin", 0.2, B, 7, TUNE, 0, 87_768_224),
    ("swin_large_patch4_window7_224_22kto1k_finetune", "swin_large_22kto1k", "swin", 0.2, L, 7, TUNE, 0, 196_532_476),
    ("swin_base_patch4_window12_384_22kto1k_finetune", "swin_base_384_22kto1k", "swin", 0.2, B, 12, TUNE, 384,
     87_903_584),
    ("swin_large_patch4_window12_384_22kto1k_finetune", "swin_large_384", "swin", 0.2, L, 12, TUNE, 384, 196_735_516),
    ("swinv2_tiny_patch4_window8_256", "swinv2_tiny_w8", "swinv2", 0.2, T, 8, "", 256, 28_347_154),
    ("swinv2_tiny_patch4_window16_256", "swinv2_tiny_w16", "swinv2", 0.2, T, 16, "", 256, 28_347_154),
    ("swinv2_small_patch4_window8_256", "swinv2_small_w8", "swinv2", 0.3, S, 8, "", 256, 49_728_418),
    ("swinv2_small_patch4_window16_256", "swinv2_small_w16", "swinv2", 0.3, S, 16, "", 256, 49_728_418),
    ("swinv2_base_patch4_window8_256", "swinv2_base_w8", "swinv2", 0.5, B, 8, "", 256, 87_918_816),
    ("swinv2_base_patch4_window16_256", "swinv2_base_w16", "swinv2", 0.5, B, 16, "", 256, 87_918_816),
    ("swinv2_base_patch4_window12_192_22k", "swinv2_base_22k", "swinv2", 0.2, B, 12, PRE_V2, 192, 109_280_841),
    ("swinv2_large_patch4_window12_192_22k", "swinv2_large_22k", "swinv2", 0.2, L, 12, PRE_V2, 192, 228_772_549),
    *(
        (f"swinv2_{size}_patch4_window12to{window}_{FT.format(16 * window)}", f"swinv2_{size}_w12to{window}_22kto1k",
         "swinv2", 0.2, f"{sizes}, PRETRAINED_WINDOW_SIZES: [ 12, 12, 12, 6 ]", window, TUNE, 16 * window, params)
        for size, sizes, params in (("base", B, 87_918_816), ("large", L, 196_739_932))
        for window in (16, 24)
    ),
    ("swin_mlp_tiny_c24_patch4_window8_256", "swin_mlp_tiny_c24", "swin_mlp", 0.2, C24, 8, "", 256, 20_386_632),
    ("swin_mlp_tiny_c12_patch4_window8_256", "swin_mlp_tiny_c12", "swin_mlp", 0.2, C12, 8, "", 256, 21_152_072),
    ("swin_mlp_tiny_c6_patch4_window8_256", "swin_mlp_tiny_c6", "swin_mlp", 0.2, C6, 8, "", 256, 22_682_952),
    ("swin_mlp_base_patch4_window7_224", "swin_mlp_base", "swin_mlp", 0.5, B, 7, "", 0, 60_659_416),
]  # fmt: skip


def original(name: str, kind: str, drop_path: float, sizes: str, window: int, train: str, img_size: int) -> str:
    """Returns the text of an original file, with values in its spelling: YAML readers take some floats for strings."""
    section = {"swin": "SWIN", "swinv2": "SWINV2", "swin_mlp": "SWIN_MLP", "swin_moe": "SWIN_MOE"}[kind]
    data = (["DATASET: imagenet22K"] if "22k" in name and "22kto1k" not in name else []) + (
        [f"IMG_SIZE: {img_size}"] if img_size else []
    )
    lines = [f"DATA: {{{', '.join(data)}}}"] if data else []
    lines += ["MODEL:", f"  TYPE: {kind}", f"  NAME: {name}", f"  DROP_PATH_RATE: {drop_path}"]
    lines += [f"  {section}: {{{sizes}, WINDOW_SIZE: {window}}}"]
    lines += [f"TRAIN: {{{train}}}"] if train else []
    lines += ["TEST: {CROP: False}"] if img_size == 384 else []
    return "\n".join(lines)


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "original.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file


@pytest.mark.parametrize("row", ORIGINAL, ids=lambda row: row[0])
def test_an_original_file_builds_and_is_the_recipe_here(row, write, caplog):
    name, recipe, kind, drop_path, sizes, window, train, img_size, params = row
    config = get_config(write(original(name, kind, drop_path, sizes, window, train, img_size)))
    line = "MODEL.NUM_CLASSES is not given: 21841, from DATA.DATASET imagenet22K."
    assert caplog.messages == ([line] if name.endswith("22k") else [])
    with torch.device("meta"):
        assert count_parameters(build_model(config)) == params
    assert flatten(get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")) == flatten(config)


def test_every_recipe_is_checked():
    names = {path.stem for path in (REPO_ROOT / "configs").glob("swin*.yaml")}
    assert names == {row[1] for row in ORIGINAL}


def test_base_lists_and_deprecated_keys_as_users_have_them(write, caplog):
    write(original(*(ORIGINAL[15][i] for i in (0, 2, 3, 4, 5, 6, 7))), "base.yaml")
    path = write(
        "BASE: ['', base.yaml]\nAMP_OPT_LEVEL: O1\nENABLE_AMP: False\nFUSED_WINDOW_PROCESS: True\n"
        "FUSED_LAYERNORM: True\nMODEL: {SWINV2: {PRETRAINED_WINDOW_SIZES: [ 0, 0, 0, 0 ]}}\n"
        "TRAIN: {START_EPOCH: 0, MOE: {SAVE_MASTER: False}}\nTEST: {SEQUENTIAL: True}\nLOCAL_RANK: 0"
    )
    config = get_config(path)
    assert (config.MODEL.TYPE, config.MODEL.SWINV2.WINDOW_SIZE, config.AMP_ENABLE) == ("swinv2", 8, False)
    for key in ("AMP_OPT_LEVEL", "ENABLE_AMP", "FUSED_WINDOW_PROCESS", "FUSED_LAYERNORM", "TEST.SEQUENTIAL"):
        assert sum(key in line for line in caplog.messages) == 1, key
    assert len(caplog.messages) == 5


def test_22k_classes_stay_as_given(caplog):
    given = get_config(None, ["DATA.DATASET", "imagenet22K", "MODEL.NUM_CLASSES", 1000])
    assert given.MODEL.NUM_CLASSES == 1000 and caplog.messages == []
    assert get_config(None, ["DATA.DATASET", "imagenet22K", "MODEL.NUM_CLASSES", 0]).MODEL.NUM_CLASSES == 0


def test_the_section_of_another_type_has_no_effect_and_is_logged(write, caplog):
    path = write("MODEL:\n  TYPE: swinv2\n  SWIN: {EMBED_DIM: 128, DEPTHS: [ 2, 2, 6, 2 ], QK_SCALE: 0.1}")
    get_config(path)
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "MODEL.SWIN.EMBED_DIM, MODEL.SWIN.QK_SCALE has no effect here: MODEL.TYPE is swinv2."
    ]


MOE = "MLP_FC2_BIAS: False, INIT_STD: 0.005, MOE_BLOCKS: [ [ -1 ], [ -1 ], [ 1, 3, 5, 7, 9, 11, 13, 15, 17 ], [ 1 ] ], "
MOE += "NUM_LOCAL_EXPERTS: -4, TOP_VALUE: 1, CAPACITY_FACTOR: 1.25, IS_GSHARD_LOSS: False, MOE_DROP: 0.1"
DENSE = "MLP_FC2_BIAS: False, MOE_BLOCKS: [ [ -1 ], [ -1 ], [ -1 ], [ -1 ] ]"


@pytest.mark.parametrize("sizes", [f"{S}, {MOE}", f"{B}, {MOE}, COSINE_ROUTER: True", f"{S}, {DENSE}", f"{B}, {DENSE}"])
def test_mixture_of_experts_is_not_yet_supported(sizes, write):
    path = write(original("swin_moe_22k", "swin_moe", 0.2, sizes, 12, PRE_V2, 192))
    with pytest.raises(
        UserError, match=r"line 6: MODEL\.SWIN_MOE belongs to Swin-MoE, which is not yet supported here"
    ):
        get_config(path)
    with pytest.raises(
        UserError, match=r"--opts: MODEL\.TYPE belongs to Swin-MoE, .*not yet.* swin, swinv2, swin_mlp, timm"
    ):
        get_config(None, ["MODEL.TYPE", "swin_moe"])


MASKING = "DATA: {IMG_SIZE: 192, MASK_PATCH_SIZE: 32, MASK_RATIO: 0.6}"
NORM_TARGET = "SIMMIM: {NORM_TARGET: {ENABLE: True, PATCH_SIZE: 47}}"
MULTISTEP = "TRAIN: {EPOCHS: 800, WARMUP_EPOCHS: 10, BASE_LR: 1e-4, WARMUP_LR: 5e-7, WEIGHT_DECAY: 0.05, "
MULTISTEP += "LR_SCHEDULER: {NAME: 'multistep', GAMMA: 0.1, MULTISTEPS: [700,]}}"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (f"TYPE: swin, DROP_PATH_RATE: 0.0, SWIN: {{{B}, WINDOW_SIZE: 6}}", "DATA.MASK_PATCH_SIZE"),
        (f"TYPE: swin, DROP_PATH_RATE: 0.0, SWIN: {{{L}, WINDOW_SIZE: 12}}", "DATA.MASK_PATCH_SIZE"),
        (f"TYPE: swinv2, DROP_PATH_RATE: 0.1, {NORM_TARGET}, SWINV2: {{{B}, WINDOW_SIZE: 12}}", "MODEL.SIMMIM"),
    ],
)
def test_simmim_pre_training_is_not_yet_supported(model, named, write):
    path = write(f"MODEL: {{NAME: simmim_pretrain, {model}}}\n{MASKING}\n{MULTISTEP}\nPRINT_FREQ: 100\nSAVE_FREQ: 5")
    with pytest.raises(UserError, match=f"{named} belongs to SimMIM pre-training, which is not yet supported here"):
        get_config(path)


@pytest.mark.parametrize(
    ("kind", "sizes", "window", "drop_path", "layer_decay", "params"),
    [
        ("swin", B, 7, 0.1, 0.8, 87_768_224),
        ("swin", L, 14, 0.2, 0.7, 196_794_556),
        ("swinv2", f"{B}, PRETRAINED_WINDOW_SIZES: [ 12, 12, 12, 6 ]", 14, 0.1, 0.75, 87_918_816),
    ],
)
def test_simmim_fine_tuning_is_ordinary_training(kind, sizes, window, drop_path, layer_decay, params, write, caplog):
    """These files use nothing that V1 and V2 do not have."""
    train = "EPOCHS: 100, WARMUP_EPOCHS: 20, BASE_LR: 1.25e-3, WARMUP_LR: 2.5e-7, MIN_LR: 2.5e-7, WEIGHT_DECAY: 0.05, "
    text = original("simmim_finetune", kind, drop_path, sizes, window, f"{train}LAYER_DECAY: {layer_decay}", 224)
    config = get_config(write(f"{text}\nPRINT_FREQ: 100\nSAVE_FREQ: 5\nTAG: simmim_finetune__800ep"))
    assert config.TRAIN.LAYER_DECAY == layer_decay and caplog.messages == []
    with torch.device("meta"):
        assert count_parameters(build_model(config)) == params
