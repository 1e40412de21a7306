"""MODEL.TYPE timm: outputs, parameter groups and sizes equal timm's own; main.py trains and evaluates such a model."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from config import get_config
from data.build import model_inputs
from main import main
from models.build import build_model, input_channels
from models.count import count_macs, count_parameters
from models.timm_model import build_timm_model
from optimizer import build_optimizer, parameter_groups
from tests._images import write_splits
from utils.errors import UserError

NAMES = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "regnety_002", "swinv2_cr_tiny_ns_224"]


def config_of(name: str, *opts: object):
    return get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", name, *opts])


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_equal_timm(name: str):
    """Against timm's own grouping functions."""
    with torch.device("meta"):
        model = build_timm_model(name, 10, timm.get_pretrained_cfg(name).input_size[-1], drop_path_rate=0.1)
        theirs = timm.create_model(name, num_classes=10)
    assert list(model.state_dict()) == list(theirs.state_dict())
    exempt = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}

    def described(groups: list[dict]) -> set[tuple]:
        return {
            (names[id(parameter)], group["weight_decay"], round(group.get("lr_scale", 1.0), 12))
            for group in groups
            for parameter in group["params"]
        }

    def ours(layer_decay: float) -> set[tuple]:
        return {
            (name, group["weight_decay"], round(group["lr_scale"], 12))
            for group in parameter_groups(model, 0.05, layer_decay)
            for name in group["names"]
        }

    assert ours(1.0) == described(param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=exempt))
    if not any(name.endswith("bias") and value.ndim > 1 for name, value in theirs.named_parameters()):
        expected = param_groups_layer_decay(theirs, 0.05, no_weight_decay_list=exempt, layer_decay=0.7)
        assert ours(0.7) == described(expected)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_outputs_equal_timm(name: str):
    model = build_model(config_of(name), num_classes=7).eval()
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(images), theirs(images))
    assert input_channels(config_of(name)) == 3


def test_a_deep_copy_has_the_methods():
    """The moving average is a deep copy."""
    model = build_timm_model("test_vit", 10, 160)
    copied = copy.deepcopy(model)
    assert (
        copied.no_weight_decay()
        == model.no_weight_decay()
        == {"pos_embed", "cls_token", "reg_token"} & set(dict(model.named_parameters()))
    )
    assert copied.get_layer_id("head.weight") == model.num_layer_ids - 1


def test_image_size_and_interpolation_default_to_timm(caplog):
    config = config_of("test_resnet", "MODEL.NUM_CLASSES", 10)
    assert (config.DATA.IMG_SIZE, config.DATA.INTERPOLATION) == (160, "bilinear")
    assert [line.split(" is not given")[0] for line in caplog.messages] == ["DATA.IMG_SIZE", "DATA.INTERPOLATION"]
    inputs = model_inputs(config)
    assert (inputs.mean, inputs.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = config_of("test_resnet", "DATA.IMG_SIZE", 224, "DATA.INTERPOLATION", "bicubic")
    assert (given.DATA.IMG_SIZE, given.DATA.INTERPOLATION) == (224, "bicubic")


def test_another_image_size():
    """A ViT is built with a position embedding of this size; a convolutional network takes any size."""
    assert build_timm_model("test_vit", 10, 96)(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    assert build_timm_model("test_resnet", 10, 96)(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    assert build_timm_model("test_vit", 0, 160)(torch.randn(1, 3, 160, 160)).shape == (1, 64)


def test_arguments_without_effect_are_logged(caplog):
    build_timm_model("test_mambaout", 10, 160, drop_path_rate=0.1)
    assert caplog.messages == []
    build_timm_model("vgg11", 10, 224, drop_path_rate=0.1)
    assert ["vgg11 has no drop_path_rate: MODEL.DROP_PATH_RATE has no effect" in line for line in caplog.messages] == [
        1
    ]


def test_checkpointing_is_switched_on():
    model = build_model(config_of("test_vit", "TRAIN.USE_CHECKPOINT", True))
    assert model.grad_checkpointing


@pytest.mark.parametrize("name", ["swin_tiny_patch4_windw7_224", "hf-hub:somebody/model", "resnet"])
def test_unknown_name(name: str):
    with pytest.raises(UserError, match="MODEL.NAME .* is no model of timm"):
        config_of(name)
    with pytest.raises(UserError, match="is no model of timm"):
        build_timm_model(name, 10, 224)


def test_similar_name_is_suggested():
    with pytest.raises(UserError, match="--opts: MODEL.NAME 'vit_base_patch16_22'.*vit_base_patch16_224"):
        config_of("vit_base_patch16_22")


PEERS = [  # timm's name of a model in the paper's Table 1, image size; parameters (M) and MACs (G) as printed there
    ("regnety_040", 224, 21, 4.0),
    ("regnety_080", 224, 39, 8.0),
    ("regnety_160", 224, 84, 16.0),
    ("efficientnet_b3", 300, 12, 1.8),
    ("vit_base_patch16_384", 384, 86, 55.4),
    ("deit_small_patch16_224", 224, 22, 4.6),
    ("deit_base_patch16_224", 224, 86, 17.5),
    ("deit_base_patch16_384", 384, 86, 55.4),
]


@pytest.mark.parametrize(("name", "img_size", "m_params", "g_macs"), PEERS)
def test_sizes_of_table_1(name: str, img_size: int, m_params: float, g_macs: float):
    with torch.device("meta"):
        model = build_timm_model(name, 1000, img_size)
    assert count_parameters(model) / 1e6 == pytest.approx(m_params, abs=0.9)
    assert count_macs(model, img_size) / 1e9 == pytest.approx(g_macs, rel=0.03)


RECIPE = """
DATA: {IMG_SIZE: 64, BATCH_SIZE: 4, NUM_WORKERS: 0}
MODEL: {TYPE: timm, NAME: test_vit, NUM_CLASSES: 0}
TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, EMA_DECAY: 0.9, LAYER_DECAY: 0.8}
AMP_ENABLE: False
"""


def test_main_trains_and_evaluates(tmp_path: Path, capfd: pytest.CaptureFixture):
    data = write_splits(tmp_path / "data", {"a": 6, "b": 6}, {"a": 3, "b": 3})
    recipe = tmp_path / "timm.yaml"
    recipe.write_text(RECIPE)
    argv = ["--cfg", str(recipe), "--data-path", str(data), "--output", str(tmp_path / "logs")]
    assert main(argv) == 0
    output = capfd.readouterr()
    assert "best top-1" in output.out + output.err
    best = tmp_path / "logs" / "test_vit" / "default" / "checkpoints" / "best.pth"
    assert main([*argv, "--eval", "--resume", str(best)]) == 0
    output = capfd.readouterr()
    assert "6 images: top-1" in output.out + output.err
    saved = torch.load(best, weights_only=True)["model"]
    timm.create_model("test_vit", num_classes=2, img_size=64).load_state_dict(saved)  # timm's names


def test_optimizer_has_all_parameters():
    config = config_of("test_efficientnet", "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.LAYER_DECAY", 0.9)
    model = build_model(config, num_classes=4)
    optimizer = build_optimizer(config, model)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
