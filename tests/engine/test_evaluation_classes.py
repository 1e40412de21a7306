"""--eval: the labels are those of the weights, by class name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from config import get_config
from engine.setup import check_same_class_names
from models.build import build_model
from tests._tiny import run_main, write_recipe
from utils.errors import UserError

NAMES = [str(i) for i in range(12)]


def write_answers(root, names):
    """The image of each class."""
    for name in names:
        (root / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels(name)).save(root / "val" / name / "0.png")
    return root


def pixels(name):
    return np.random.RandomState(int(name)).randint(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function that writes weights which know the 12 classes, with the given names by label or none."""
    folder = tmp_path_factory.mktemp("weights")
    config = get_config(str(write_recipe(folder)), ["MODEL.NUM_CLASSES", 12])
    torch.manual_seed(0)
    model = build_model(config, 12).eval()

    def write(names):
        images = torch.stack([torch.from_numpy(pixels(name)).permute(2, 0, 1) / 255 for name in names or NAMES])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            features = model.forward_features((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).mean((1, 2))
        head = torch.linalg.pinv(torch.cat([features, torch.ones(12, 1)], 1).double()).float().T  # (12, C + 1)
        state = model.state_dict() | {"head.weight": head[:, :-1].contiguous(), "head.bias": head[:, -1].contiguous()}
        path = folder / f"{'-'.join(names or ['unnamed'])}.pth"
        torch.save({"model": state} | ({"class_names": names} if names else {}), path)
        return path

    return folder, write


@pytest.mark.parametrize("names", [None, NAMES, sorted(NAMES)], ids=["no names", "numbers", "text"])
def test_numbered_classes_are_right_whatever_the_order_of_the_weights(weights, tmp_path, names):
    assert accuracy(weights, tmp_path, names, NAMES) == 100


def test_classes_without_images_are_allowed(weights, tmp_path, capsys):
    assert accuracy(weights, tmp_path, sorted(NAMES), ["1", "5", "11"]) == 100
    assert "9 of 12 classes have no validation images (0, 10, 2, 3, 4 and 4 more)" in "".join(capsys.readouterr())


def accuracy(weights, tmp_path, names, classes):
    folder, write = weights
    command = ["--cfg", write_recipe(folder), "--data-path", write_answers(tmp_path, classes), "--output", tmp_path]
    assert run_main([*command, "--eval", "--pretrained", write(names)]) == 0
    results = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert results["images"] == len(classes)
    return results["metrics"]["acc1"]


def test_refusals_say_what_differs():
    cases = [
        (["a", "b"], ["a", "c"], "other classes than the data's: b there, c here. Give"),
        (["a"], ["a", "c"], "other classes than the data's: 1 there, 2 here. Give"),
        (
            ["0", "10", "2"],
            ["0", "2", "10"],
            "the classes of the data in another order: label 1 is 10 there, 2 here",
        ),
        (["caf\u00e9"], ["cafe\u0301"], r"'cafe\\u0301'\) differ in Unicode normalisation alone"),
    ]
    for saved, current, message in cases:
        with pytest.raises(UserError, match=f"^w.pth: .*{message}"):
            check_same_class_names("w.pth", saved, current)
    check_same_class_names("w.pth", None, ["a"])
    check_same_class_names("w.pth", ["a"], ["a"])
