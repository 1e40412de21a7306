"""Loading weights into a model: which tensors are loaded, resized, dropped and initialised, and which refused."""

import hashlib

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from models.pretrained.convert import from_original
from models.pretrained.key_maps import HF, TIMM, TORCHVISION
from models.pretrained.load import LoadReport, imagenet_22k_rows, load_weights, num_outputs
from models.timm_model import build_timm_model
from tests._swin import small, spread
from utils.errors import UserError

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def weights_of(**arguments) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in spread(small(**arguments)).state_dict().items()}


def test_same_architecture_is_loaded_completely():
    source = spread(small())
    model = small()
    report = load_weights(model, source.state_dict())
    assert torch.equal(model(IMAGE), source(IMAGE))
    assert report.loaded and set(report.loaded) == set(source.state_dict())
    assert not (report.resized or report.dropped or report.initialised)


def test_given_tensors_are_neither_changed_nor_shared():
    given = weights_of()
    before = {name: value.clone() for name, value in given.items()}
    model = small()
    load_weights(model, given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_half_precision_weights_are_converted_to_the_dtype_of_the_model():
    model = small(window_size=2)
    load_weights(model, {name: value.half() for name, value in weights_of().items()})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_derived_buffers_are_dropped_whatever_their_size():
    derived = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 2, 2),
        "layers.1.blocks.0.attn_mask": None,  # as the original registers it in blocks without shift
        "layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 3, 3, 2),
    }
    source = weights_of()
    model = small()
    report = load_weights(model, {**source, **derived})
    assert [entry.split()[0] for entry in report.dropped] == list(derived)
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


def test_number_of_outputs_in_any_format():
    weights = small(num_classes=7).state_dict()
    assert num_outputs(weights) == 7 == num_outputs({f"module.{name}": value for name, value in weights.items()})
    for target in (TIMM, TORCHVISION, HF):
        assert num_outputs(from_original(weights, target)) == 7
    assert num_outputs({"fc.weight": torch.zeros(5, 3), "fc.bias": torch.zeros(5)}) == 5
    assert num_outputs({name: value for name, value in weights.items() if "head" not in name}) is None


@pytest.mark.parametrize("window", [2, 3, 8])
def test_bias_tables_are_resized_head_by_head(window: int):
    given, model = weights_of(), small(window_size=window)
    report = load_weights(model, given)
    side = 2 * min(window, 8) - 1
    table = model.state_dict()[TABLE]
    assert table.shape == (side**2, 2)
    for head in range(2):
        square = given[TABLE][:, head].reshape(1, 1, 7, 7)
        expected = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
        torch.testing.assert_close(table[:, head], expected.flatten(), atol=1e-6, rtol=0)
    assert f"{TABLE} (49x2 -> {side**2}x2, bicubic)" in report.resized
    assert all("bias_table" in entry for entry in report.resized)


def test_resizing_does_not_swap_axes():
    """A bias that depends only on the vertical offset still does in a larger window."""
    given, model = weights_of(), small(window_size=8)
    vertical = torch.linspace(-3, 3, 7).repeat_interleave(7)
    given[TABLE] = torch.stack([vertical, -vertical], dim=1)
    load_weights(model, given)
    bias = model.layers[0].blocks[1].attn.relative_position_bias().detach()  # (2, 64, 64)
    by_coordinates = bias[0].reshape(8, 8, 8, 8)
    assert (by_coordinates.std(dim=(1, 3)) < 1e-5).all()  # the same for all columns of query and key
    assert (by_coordinates.mean(dim=(1, 3)).diff(dim=0) > 0).all()  # grows with the query's row
    torch.testing.assert_close(bias[1], -bias[0])


def test_absolute_embeddings_are_resized():
    given, model = weights_of(ape=True), small(ape=True, img_size=48)
    report = load_weights(model, given)
    grid = given["absolute_pos_embed"].reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(12, 12), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.absolute_pos_embed.detach().reshape(1, 12, 12, 16), expected, atol=1e-6, rtol=0)
    assert "absolute_pos_embed (1x64x16 -> 1x144x16, bicubic)" in report.resized


def test_rows_of_the_22k_head():
    """Pins the rows of the released 22K heads from which the released 1K heads were made, in order."""
    rows = imagenet_22k_rows(SYNSETS)
    assert len(set(rows)) == 1000 and min(rows) >= 0 and max(rows) < 21841
    assert rows[:3] == [359, 368, 460] and rows[-1] == 21817
    digest = hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()
    assert digest == "f13a699f4700a41e9b5c942096975bcffd36c071f390c71bdf8ec62c2a8ee0ca"


@pytest.mark.parametrize("names", [None, SYNSETS, SYNSETS[::-1]], ids=["unnamed", "sorted", "reversed"])
def test_22k_head_becomes_1k_head_by_class(names: list[str] | None):
    given, model = weights_of(num_classes=21841), small(num_classes=1000)
    report = load_weights(model, given, names)
    rows = imagenet_22k_rows(SYNSETS)
    rows = rows[::-1] if names and names[0] != SYNSETS[0] else rows
    assert torch.equal(model.head.weight, given["head.weight"][rows])
    assert torch.equal(model.head.bias, given["head.bias"][rows])
    assert [entry.split()[:4] for entry in report.resized] == [
        ["head.weight", "(21841x32", "->", "1000x32,"],
        ["head.bias", "(21841", "->", "1000,"],
    ]


@pytest.mark.parametrize(
    ("given_classes", "own_classes", "names"),
    [
        (5, 7, None),
        (1000, 10, None),
        (21843, 1000, None),  # Google's list, in another order
        (21841, 500, None),
        (21841, 1000, [f"class {i}" for i in range(1000)]),  # 1,000 other classes
    ],
)
def test_other_classes_get_a_new_head(given_classes: int, own_classes: int, names: list[str] | None):
    given, model = weights_of(num_classes=given_classes), small(num_classes=own_classes)
    report = load_weights(model, given, names)
    assert not model.head.weight.any() and not model.head.bias.any()
    assert model.head.weight.shape == (own_classes, 32)
    assert report.initialised == [
        f"head.weight ({given_classes}x32 -> {own_classes}x32, other classes: starts from zeros)",
        f"head.bias ({given_classes} -> {own_classes}, other classes: starts from zeros)",
    ]
    assert torch.equal(model.norm.weight, given["norm.weight"])


def test_weights_without_a_head_keep_the_initialised_head():
    model = small()
    weight = model.head.weight.clone()
    report = load_weights(model, weights_of(num_classes=0))
    assert torch.equal(model.head.weight, weight)
    assert [entry.split()[0] for entry in report.initialised] == ["head.weight", "head.bias"]


def test_a_model_without_a_head_drops_the_given_head():
    report = load_weights(small(num_classes=0), weights_of())
    assert [entry.split()[0] for entry in report.dropped] == ["head.weight", "head.bias"]


def assert_refused(model: nn.Module, given: dict, *texts: str) -> None:
    """Loading must fail with `texts` in the message, and leave the model unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, given)
    for text in (*texts, "MODEL.SWIN", "--pretrained"):
        assert text in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unexpected_weights_are_refused_and_nothing_is_loaded():
    given = weights_of()
    without = {name: value for name, value in given.items() if name not in ("norm.weight", "norm.bias")}
    assert_refused(small(), without, "norm.weight is missing", "norm.bias is missing")
    assert_refused(small(), {}, "patch_embed.proj.weight is missing", "more")
    assert_refused(small(), {**given, "neck.weight": torch.zeros(3)}, "neck.weight is not in the model")
    assert_refused(small(), {**given, "norm.bias": torch.zeros(33)}, "norm.bias has shape 33, the model has 32")
    assert_refused(small(), {**given, "norm.bias": 3}, "norm.bias is int, not a tensor")
    assert_refused(small(), {**given, "norm.bias": torch.zeros(32, dtype=torch.int8)}, "norm.bias is torch.int8")
    assert_refused(small(), {**given, "head.weight": "evil"}, "head.weight is str")
    assert_refused(small(), weights_of(ape=True), "absolute_pos_embed is not in the model")
    assert_refused(small(ape=True), given, "absolute_pos_embed is missing")


def test_tables_that_cannot_be_resized_are_refused():
    given = weights_of()
    assert_refused(small(window_size=2, num_heads=(4, 4)), given, f"{TABLE} has shape 49x2, the model has 9x4")
    assert_refused(small(), {**given, TABLE: torch.zeros(48, 2)}, "48x2")  # not a square
    ape = weights_of(ape=True)
    assert_refused(small(ape=True), {**ape, "absolute_pos_embed": torch.zeros(1, 60, 16)}, "1x60x16")
    assert_refused(small(ape=True), {**ape, "absolute_pos_embed": torch.zeros(1, 64, 8)}, "1x64x8")


def test_heads_that_do_not_fit_are_refused():
    given = weights_of()
    assert_refused(small(), {**given, "head.weight": torch.zeros(5, 31)}, "head.weight 5x31")
    assert_refused(small(), {**given, "head.bias": torch.zeros(4)}, "head.bias 4")
    del given["head.bias"]
    assert_refused(small(), given, "head.weight comes without")


def test_report_as_a_table():
    report = LoadReport(["a", "b"], ["c (9x2 -> 25x2, bicubic)"], [], ["d (left)"])
    assert report.table().splitlines() == [
        "loaded          2",
        "resized         1",
        "    c (9x2 -> 25x2, bicubic)",
        "dropped         0",
        "initialised     1",
        "    d (left)",
    ]


# Several classifiers -------------------------------------------------------------------------------------------------

SEVERAL = {  # of timm, with the names of their classifiers
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
    "levit_128s": ("head.linear", "head_dist.linear"),
    "efficientvim_m1": ("heads.0", "heads.1", "heads.2", "heads.3"),
    "volo_d1_224": ("head", "aux_head"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_every_classifier_starts_from_zeros_for_other_classes(name: str):
    given = {key: value.clone() for key, value in timm.create_model(name, num_classes=10).state_dict().items()}
    heads = [f"{head}.{kind}" for head in SEVERAL[name] for kind in ("weight", "bias")]
    assert set(heads) <= given.keys()
    model = build_timm_model(name, 4, 224)
    report = load_weights(model, given)
    assert [entry.split()[0] for entry in report.initialised] == heads
    assert all("other classes: starts from zeros" in entry for entry in report.initialised)
    weights = model.state_dict()
    assert not any(weights[head].any() for head in heads)
    assert all(torch.equal(value, given[key]) for key, value in weights.items() if key not in heads)


def test_several_classifiers_for_the_same_classes_are_loaded():
    name = "deit_tiny_distilled_patch16_224"
    given = spread(timm.create_model(name, num_classes=4)).state_dict()
    model = build_timm_model(name, 4, 224)
    report = load_weights(model, given)
    assert not report.initialised and all(torch.equal(value, given[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="head_dist.weight comes without head_dist.bias"):
        load_weights(model, {key: value for key, value in given.items() if key != "head_dist.bias"})
    other = load_weights(model, given, ["a", "b", "c", "d"], trained_on=["e", "f", "g", "h"])
    assert len(other.initialised) == 4 and not model.get_parameter("head_dist.weight").any()


def test_a_classifier_without_bias():
    model, given = nn.ModuleDict({"head": nn.Linear(3, 2, bias=False)}), {"head.weight": torch.ones(2, 3)}
    assert load_weights(model, given).loaded == ["head.weight"]
    with pytest.raises(UserError, match="head.bias is not in the model"):
        load_weights(model, given | {"head.bias": torch.ones(2)})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrappers_around_any_model_are_removed(prefix: str):
    given = spread(timm.create_model("resnet10t", num_classes=3)).state_dict()
    model = build_timm_model("resnet10t", 3, 64)
    report = load_weights(model, {prefix + name: value for name, value in given.items()})
    assert len(report.loaded) == len(given)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="other.conv1.0.weight is not in the model"):
        load_weights(model, {"other." + name: value for name, value in given.items()})
