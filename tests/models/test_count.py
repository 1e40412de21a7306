"""models/count.py: inputs that a model cannot take are refused before the first step, by key and number."""

import pytest
import timm
import torch

from config import get_config
from engine.setup import build_components
from models.count import check_inputs
from utils.distributed.process_group import DistInfo
from utils.errors import UserError

ALONE = DistInfo.single(torch.device("cpu"))


def build(name: str, *opts: object) -> None:
    words = ["MODEL.TYPE", "timm", "MODEL.NAME", name, "MODEL.NUM_CLASSES", 4, "DATA.IMG_SIZE", 32]
    words += ["AUG.MIXUP", 0, "AUG.CUTMIX", 0, *opts]
    config = get_config(None, [str(word) for word in words])
    build_components(config, ALONE, None)


def test_a_batch_of_one_is_refused_where_it_is_normalised_over():
    with pytest.raises(UserError, match=r"resnet10t normalises over .*DATA.BATCH_SIZE \(--batch-size\).* at least 2"):
        build("resnet10t", "DATA.BATCH_SIZE", 1)
    build("resnet10t", "DATA.BATCH_SIZE", 2)
    build("resnet10t", "DATA.BATCH_SIZE", 1, "DATA.IMG_SIZE", 64)  # a last map of several positions
    build("resnet10t", "DATA.BATCH_SIZE", 1, "EVAL_MODE", True, "MODEL.RESUME", "weights.pth")


@pytest.mark.parametrize(("name", "img_size"), [("inception_v3", 32), ("inception_v3", 64), ("densenet121", 8)])
def test_an_image_too_small_is_refused_by_key_and_number(name: str, img_size: int):
    with torch.device("meta"):  # weights are not looked at
        model = timm.create_model(name, num_classes=4)
    with pytest.raises(UserError, match=f"{name} cannot take images of {img_size} pixels .*larger DATA.IMG_SIZE"):
        check_inputs(model, name, 8, img_size)


def test_a_model_without_batch_norm_takes_a_batch_of_one():
    check_inputs(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4), "vit", 1, 32)
