"""What labels mean: classes named by numbers, and val with fewer classes than train or than the weights."""

import unicodedata

import pytest
from timm.data import ImageNetInfo

from data.build import build_datasets
from data.datasets.classes import RelabelledImages, WeightClasses, match_val_to_train
from data.datasets.digits import write_demo
from tests._images import EVALUATE, age, data_config, process, write_splits, write_zip
from tools import pack_dataset
from utils.errors import UserError

CLASSES = {"ant": 2, "bee": 1}
NUMBERS = [str(i) for i in range(12)]
SYNSETS = ImageNetInfo("imagenet-1k").label_names()
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(root, *opts, weights=None):
    return build_datasets(data_config(root, *opts), process(), None if weights is None else lambda: weights)


def evaluate(root, *opts, names=None, outputs=None):
    return build(root, *EVALUATE, *opts, weights=WeightClasses("w.pth", names, outputs))


def touch(root, split, names):
    """Empty files: the tests look at names only."""
    for name in names:
        (root / split / name).mkdir(parents=True)
        (root / split / name / "1.jpg").touch()


def labels(images):
    """The label that `read` gives, by the folder in the image's path."""
    return {images.path(i).split("/")[-2]: images.read(i)[1] for i in range(len(images))}


# Classes named by numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["imagenet", "torch/image_folder"])
def test_classes_named_0_to_k_are_in_the_order_of_numbers(tmp_path, dataset, caplog):
    touch(tmp_path, "train", NUMBERS)
    touch(tmp_path, "val", NUMBERS)
    data = build(tmp_path, "DATA.DATASET", dataset)
    assert data.class_names == NUMBERS
    if dataset == "imagenet":
        assert labels(data.train) == labels(data.val) == {name: int(name) for name in NUMBERS}
    else:
        assert [data.train.read(i)[1] for i in range(12)] == [0, 1, 10, 11, *range(2, 10)]  # torchvision's order
    assert "label N is class N, as in ImageNetV2" in caplog.text and "label 2 is '10'" in caplog.text
    assert caplog.text.count("named by numbers") == 1


def test_the_order_of_numbers_is_kept_by_the_cache(tmp_path):
    touch(tmp_path, "train", NUMBERS)
    touch(tmp_path, "val", NUMBERS)
    age(tmp_path)
    assert build(tmp_path).class_names == build(tmp_path).class_names == NUMBERS
    assert (tmp_path / ".swin_index_train.npz").exists()


@pytest.mark.parametrize("names", [["0", "1", "2"], [f"{i:02d}" for i in range(12)], ["n1", "n10", "n2"]])
def test_no_warning_where_both_orders_are_the_same(tmp_path, names, caplog):
    touch(tmp_path, "train", names)
    touch(tmp_path, "val", names)
    assert build(tmp_path).class_names == names
    assert "named by numbers" not in caplog.text


@pytest.mark.parametrize("names", [[str(i) for i in range(1, 12)], ["3", "20"], ["0", "1", "01", "10", "2"]])
def test_other_numbers_are_in_the_order_of_text_with_a_warning(tmp_path, names, caplog):
    touch(tmp_path, "train", names)
    touch(tmp_path, "val", names)
    assert build(tmp_path).class_names == sorted(names)
    assert "named by numbers, but are not in their order" in caplog.text


def test_a_map_that_numbers_folders_as_text_is_followed_with_a_warning(tmp_path, caplog):
    text = sorted(NUMBERS)
    for split in ("train", "val"):
        write_zip(tmp_path, split, [f"{name}/1.jpg" for name in text], list(range(12)))
    data = build(tmp_path, "DATA.ZIP_MODE", True)
    assert data.class_names == text and "not in their order: label 2 is class '10'" in caplog.text


def test_packed_data_keep_the_order_of_numbers(tmp_path):
    write_splits(tmp_path / "folder", dict.fromkeys(NUMBERS, 1), dict.fromkeys(NUMBERS, 1))
    assert pack_dataset.main([str(tmp_path / "packed"), "--data-path", str(tmp_path / "folder"), "--workers", "1"]) == 0
    data = build(tmp_path / "packed", "DATA.DATASET", "packed")
    assert data.class_names == NUMBERS and labels(data.val) == {name: int(name) for name in NUMBERS}


def test_a_checkpoint_in_the_order_of_text_is_evaluated_by_name(tmp_path, caplog):
    touch(tmp_path, "val", NUMBERS)
    text = sorted(NUMBERS)
    data = evaluate(tmp_path, names=text, outputs=12)
    assert data.class_names == text and labels(data.val) == {name: text.index(name) for name in NUMBERS}
    assert "named by numbers" not in caplog.text


def test_imagenet_v2_has_the_labels_of_imagenet(tmp_path, caplog):
    """Folders 0…999; the weights know no names, or ImageNet's, or are those of ImageNet-22K."""
    touch(tmp_path, "val", map(str, range(1000)))
    expected = {str(i): i for i in range(1000)}
    assert labels(evaluate(tmp_path, outputs=1000).val) == expected
    assert caplog.text.count("label N is class N") == 1
    for names, outputs in ((SYNSETS, 1000), (None, 21841)):
        data = evaluate(tmp_path, names=names, outputs=outputs)
        assert labels(data.val) == expected and data.class_names == SYNSETS


def test_weights_of_numbered_classes_know_synsets(tmp_path):
    touch(tmp_path, "val", SYNSETS[500:700])
    data = evaluate(tmp_path, names=sorted(map(str, range(1000))), outputs=1000)
    assert labels(data.val) == {name: data.class_names.index(str(SYNSETS.index(name))) for name in SYNSETS[500:700]}


# Classes without validation images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [True, False])
def test_val_may_lack_classes_of_train(tmp_path, empty, caplog):
    write_splits(tmp_path, {"ant": 1, "bee": 1, "cow": 2}, {"ant": 1, "cow": 1} | ({"bee": 0} if empty else {}))
    data = build(tmp_path)
    assert data.num_classes == 3 and data.class_names == ["ant", "bee", "cow"] == data.val.class_names
    assert labels(data.val) == {"ant": 0, "cow": 2}
    assert caplog.text.count("1 of 3 classes have no validation images (bee)") == 1


def test_all_class_folders_without_validation_images_are_refused(tmp_path):
    write_splits(tmp_path, CLASSES, {"ant": 0, "bee": 0})
    with pytest.raises(UserError, match=f"class folders in {tmp_path}/val have no images"):
        build(tmp_path)


def test_train_lacking_a_class_is_refused_without_contradiction(tmp_path):
    write_splits(tmp_path, {"ant": 1, "bee": 0}, CLASSES)
    with pytest.raises(UserError, match="train/bee has no images"):
        build(tmp_path)
    (tmp_path / "train" / "bee").rmdir()
    with pytest.raises(UserError, match="only in val: bee. Give val no classes that train does not have"):
        build(tmp_path)


@pytest.mark.parametrize("names", [["ant/1.jpg", "cow/1.jpg"], ["1.jpg", "2.jpg"]])
def test_zip_maps_may_have_gaps_in_val_only(tmp_path, names, caplog):
    write_zip(tmp_path, "train", ["ant/1.jpg", "bee/1.jpg", "cow/1.jpg"], [0, 1, 2])
    write_zip(tmp_path, "val", names, [0, 2])
    data = build(tmp_path, "DATA.ZIP_MODE", True)
    assert data.num_classes == 3 and [data.val.read(i)[1] for i in range(2)] == [0, 2]
    assert "1 of 3 classes have no validation images" in caplog.text
    write_zip(tmp_path, "val", names[:1], [0])
    assert build(tmp_path, "DATA.ZIP_MODE", True).num_classes == 3
    write_zip(tmp_path, "val", names[:1], [999_999_999])
    with pytest.raises(UserError, match="line 1: label 999999999 is not in 0…999999"):
        build(tmp_path, "DATA.ZIP_MODE", True)
    write_zip(tmp_path, "val", ["1.jpg"], [3])
    with pytest.raises(UserError, match="train has 3 classes and val has 4. Give val no classes that train"):
        build(tmp_path, "DATA.ZIP_MODE", True)


def test_maps_with_other_labels_for_the_same_classes_are_refused(tmp_path):
    write_zip(tmp_path, "train", ["ant/1.jpg", "bee/1.jpg"], [0, 1])
    write_zip(tmp_path, "val", ["ant/1.jpg", "bee/1.jpg"], [1, 0])
    with pytest.raises(UserError, match="label 0 means 'ant' in train but 'bee' in val"):
        build(tmp_path, "DATA.ZIP_MODE", True)


def test_a_name_of_two_classes_has_no_label(tmp_path):
    write_splits(tmp_path, {"ant": 1, "bee": 1, "crane": 1}, {"crane": 1})
    data = build(tmp_path)
    twice = RelabelledImages(data.train, range(3), ["bee", "crane", "crane"], 3)
    assert match_val_to_train(twice, twice, "x") is twice  # as in ImageNet's names by torchvision
    for train, val in ((twice, data.val), (data.train, twice)):
        val = RelabelledImages(val, range(3), ["crane"], 1) if val is data.val else val
        with pytest.raises(UserError, match="two classes of these data or of the weights are called 'crane'"):
            match_val_to_train(train, val, "x")


def test_packed_val_keeps_the_labels_of_train(tmp_path, caplog):
    write_splits(tmp_path / "folder", {"ant": 1, "bee": 1, "cow": 1}, {"cow": 2})
    assert pack_dataset.main([str(tmp_path / "packed"), "--data-path", str(tmp_path / "folder"), "--workers", "1"]) == 0
    caplog.clear()
    data = build(tmp_path / "packed", "DATA.DATASET", "packed")
    assert data.val.class_names == ["ant", "bee", "cow"] and [data.val.read(i)[1] for i in range(2)] == [2, 2]
    assert "2 of 3 classes have no validation images (ant, bee)" in caplog.text


def test_torchvision_folders_may_lack_classes_in_val(tmp_path, caplog):
    write_splits(tmp_path, {"ant": 1, "bee": 1, "cow": 1}, {"cow": 1})
    data = build(tmp_path, "DATA.DATASET", "torch/image_folder")
    assert data.num_classes == 3 and data.val.read(0)[1] == 2
    assert "2 of 3 classes have no validation images (ant, bee)" in caplog.text


def test_train_and_val_with_different_classes(tmp_path):
    write_splits(tmp_path, CLASSES, {"ant": 1, "cow": 1})
    with pytest.raises(UserError, match="Only in train: bee; only in val: cow"):
        build(tmp_path)


@pytest.mark.parametrize(("names", "outputs"), [(SYNSETS, 1000), (None, 1000), (None, 21841), (None, None)])
def test_imagenet_a_is_evaluated_with_weights_for_1000_classes(tmp_path, names, outputs, caplog):
    some = SYNSETS[3:1000:5]
    touch(tmp_path, "val", some)
    configured = (0, 1000) if outputs else (1000,)
    for num_classes in configured:
        data = evaluate(tmp_path, "MODEL.NUM_CLASSES", num_classes, names=names, outputs=outputs)
        assert data.num_classes == 1000 and data.class_names == SYNSETS
        assert labels(data.val) == {name: SYNSETS.index(name) for name in some}
    assert caplog.text.count("800 of 1000 classes have no validation images") == len(configured)


def test_weights_for_a_part_of_imagenet_keep_its_classes(tmp_path):
    touch(tmp_path, "val", SYNSETS[:100])
    data = evaluate(tmp_path, outputs=100)
    assert data.num_classes == 100 and data.class_names == SYNSETS[:100]


def test_weights_with_other_classes_are_refused(tmp_path):
    touch(tmp_path, "val", ["ant", "cow"])
    with pytest.raises(UserError, match="w.pth: was trained on other classes.*Only in the weights: bee; only in.*cow"):
        evaluate(tmp_path, "MODEL.NUM_CLASSES", 1000, names=["ant", "bee"], outputs=2)


# Unicode -------------------------------------------------------------------------------------------------------------


def test_names_that_differ_in_normalisation_alone(tmp_path, caplog):
    write_splits(tmp_path / "a", {COMPOSED: 1, "thé": 1}, {DECOMPOSED: 1, "thé": 1})
    with pytest.raises(UserError, match=r"'caf\\xe9'.*'cafe\\u0301'.* differ in Unicode normalisation alone.*rename"):
        build(tmp_path / "a")
    with pytest.raises(UserError, match="w.pth: was trained on other.* differ in Unicode normalisation alone"):
        evaluate(tmp_path / "a", names=[COMPOSED, "thé"], outputs=2)
    write_splits(tmp_path / "b", {COMPOSED: 1, DECOMPOSED: 1}, {COMPOSED: 1, DECOMPOSED: 1})
    assert build(tmp_path / "b").num_classes == 2
    assert r"'caf\xe9' and 'cafe\u0301' differ in Unicode normalisation alone" in caplog.text


def test_map_and_zip_that_differ_in_normalisation_alone(tmp_path):
    for split in ("train", "val"):
        write_zip(tmp_path, split, [f"{DECOMPOSED}/1.jpg"], [0])
    (tmp_path / "train_map.txt").write_text(f"{COMPOSED}/1.jpg\t0\n")
    with pytest.raises(UserError, match=r"no member.*'cafe\\u0301/1.jpg', and the map 'caf\\xe9/1.jpg'.*normalisation"):
        build(tmp_path, "DATA.ZIP_MODE", True)


def test_relabelled_images_are_those_of_their_source(tmp_path):
    write_demo(tmp_path)
    images = build(tmp_path, "DATA.DATASET", "demo").val
    relabelled = RelabelledImages(images, range(9, -1, -1), None, 10)
    assert len(relabelled) == len(images) and relabelled.path(5) == images.path(5)
    assert relabelled.read(5) == (images.read(5)[0], 9 - images.read(5)[1])
    assert (relabelled.index.labels == 9 - images.index.labels).all() and relabelled.index.paths is images.index.paths
