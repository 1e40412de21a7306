"""configs/: recipes match the published ones, open with a command, and survive saving and reloading."""

import pytest

from config import differences, dump, get_config
from utils.config.merge import flatten
from utils.paths import REPO_ROOT

RECIPES = sorted((REPO_ROOT / "configs").glob("*.yaml"))


def test_recipes_exist():
    names = {path.stem for path in RECIPES}
    assert names >= {
        "swin_tiny", "swin_small", "swin_base", "swin_base_384", "swin_large_384", "swin_tiny_22k", "swin_small_22k",
        "swin_base_22k", "swin_large_22k", "swin_tiny_22kto1k", "swin_small_22kto1k", "swin_base_22kto1k",
        "swin_large_22kto1k", "swin_base_384_22kto1k",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_saved_config_reloads_as_the_same_run(path, tmp_path, caplog):
    config = get_config(path, ["TRAIN.WEIGHT_DECAY", 0.1 + 0.2, "TAG", "'123' # ü", "TRAIN.MIN_LR", 1e-300])
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(config), encoding="utf-8")
    again = get_config(saved)
    assert again == config and flatten(again) == flatten(config) and dump(again) == dump(config)
    assert {key: type(value) for key, value in flatten(again).items()} == {
        key: type(value) for key, value in flatten(config).items()
    }
    assert differences(config, again) == [] and caplog.messages == []


@pytest.mark.parametrize(
    "text", ["null", "", "true", "1e5", "[a]", "a: b", "# c", "ü/日本", " x ", "\udcff", "a\x85b", "./~"]
)
def test_any_path_survives_saving(text, tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(get_config(None, ["DATA.DATA_PATH", text])), encoding="utf-8")
    assert get_config(saved).DATA.DATA_PATH == text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command(path):
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"main.py --cfg configs/{path.name}" in head and head.startswith("# ")


SIZES = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
PUBLISHED = [  # recipe, released name, pixels, window, stochastic depth, epochs, base rate, weight decay, classes
    ("swin_tiny", "swin_tiny_patch4_window7_224", 224, 7, 0.2, 300, 5e-4, 0.05, 1000),
    ("swin_small", "swin_small_patch4_window7_224", 224, 7, 0.3, 300, 5e-4, 0.05, 1000),
    ("swin_base", "swin_base_patch4_window7_224", 224, 7, 0.5, 300, 5e-4, 0.05, 1000),
    ("swin_base_384", "swin_base_patch4_window12_384_finetune", 384, 12, 0.5, 30, 2e-5, 1e-8, 1000),
    ("swin_tiny_22k", "swin_tiny_patch4_window7_224_22k", 224, 7, 0.1, 90, 1.25e-4, 0.05, 21841),
    ("swin_small_22k", "swin_small_patch4_window7_224_22k", 224, 7, 0.2, 90, 1.25e-4, 0.05, 21841),
    ("swin_base_22k", "swin_base_patch4_window7_224_22k", 224, 7, 0.2, 90, 1.25e-4, 0.05, 21841),
    ("swin_large_22k", "swin_large_patch4_window7_224_22k", 224, 7, 0.2, 90, 1.25e-4, 0.05, 21841),
    ("swin_tiny_22kto1k", "swin_tiny_patch4_window7_224_22kto1k_finetune", 224, 7, 0.1, 30, 2e-5, 1e-8, 1000),
    ("swin_small_22kto1k", "swin_small_patch4_window7_224_22kto1k_finetune", 224, 7, 0.2, 30, 2e-5, 1e-8, 1000),
    ("swin_base_22kto1k", "swin_base_patch4_window7_224_22kto1k_finetune", 224, 7, 0.2, 30, 2e-5, 1e-8, 1000),
    ("swin_large_22kto1k", "swin_large_patch4_window7_224_22kto1k_finetune", 224, 7, 0.2, 30, 2e-5, 1e-8, 1000),
    ("swin_base_384_22kto1k", "swin_base_patch4_window12_384_22kto1k_finetune", 384, 12, 0.2, 30, 2e-5, 1e-8, 1000),
    ("swin_large_384", "swin_large_patch4_window12_384_22kto1k_finetune", 384, 12, 0.2, 30, 2e-5, 1e-8, 1000),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_recipes_are_the_published_ones(row):
    recipe, name, size, window, drop_path, epochs, base_lr, weight_decay, classes = row
    config = get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")
    swin, train = config.MODEL.SWIN, config.TRAIN
    assert (swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS) == SIZES[recipe.split("_")[1]]
    assert (config.MODEL.NAME, config.DATA.IMG_SIZE, swin.WINDOW_SIZE) == (name, size, window)
    assert (config.MODEL.DROP_PATH_RATE, config.MODEL.NUM_CLASSES) == (drop_path, classes)
    assert (train.EPOCHS, train.BASE_LR, train.WEIGHT_DECAY) == (epochs, base_lr, weight_decay)
    assert train.WARMUP_EPOCHS == (20 if epochs == 300 else 5)
    assert (train.WARMUP_LR, train.MIN_LR) == pytest.approx((base_lr / 1000, base_lr / 100), rel=1e-12)
    assert config.TEST.CROP is (size == 224)
    assert config.DATA.DATASET == ("imagenet22K" if classes == 21841 else "imagenet")
