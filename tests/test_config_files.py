"""Configuration files: malformed YAML, BASE, nothing executed; old names, keys without effect, differences."""

import re

import pytest

import config as config_module
from config import differences, dump, get_config, parse
from tests._configs import refusal, writer
from utils.config.merge import Override, flatten
from utils.errors import UserError
from utils.paths import REPO_ROOT

DEFAULTS = flatten(get_config(None))


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b", "holds no keys"),
        ("just text", "holds no keys"),
        ("TAG: x\nDATA: [1,\nSEED: 2", "line 3: not YAML"),
        ("TAG: x\n\tSEED: 1", "line 2: not YAML"),
        ("TAG: *nowhere", "line 1: not YAML"),
        ("TAG: x\n---\nTAG: y", "line 2: not YAML"),
        ("TAG: \x00", "not YAML"),
        ("TAG: " + "[" * 5000, "nested too deeply"),
        ("SEED: 1\nTAG: x\nSEED: 2", "line 3: SEED is already set at "),
        ("DATA: {NUM_WORKERS: 1}\nDATA: {NUM_WORKERS: 2}", "line 2: DATA.NUM_WORKERS is already set"),
        ("TRAIN: 5", "line 1: TRAIN is a section"),
        ("TRAIN:\nTAG: x", "line 1: TRAIN is a section"),
        ("SEED: {a: 1}", "line 1: SEED takes a whole number, not a section"),
        ("[a, b]: 1", "line 1: a key must be a name"),
        ("MODEL: {SWIN: {DEPTHS: [[2], 2, 6, 2]}}", "contains a list or a section"),
        ("MODEL: &m {MODEL: *m}", "there is no key MODEL.MODEL"),
        ("SEED: &s [*s]", "SEED contains a list or a section"),
        ("TAG:", "For an empty text write ''"),
        ("1: 2", "there is no key 1"),
        ("BASE: [nothere.yaml]", "line 1: BASE names nothere.yaml, but there is no file"),
        ("BASE: {a: 1}", "BASE takes a list of texts"),
    ],
)
def test_malformed_files_are_refused(write, text, wanted):
    path = write(text)
    message = refusal(path)
    assert str(path) in message and wanted in message and len(message) < 500


def test_missing_file_suggests_a_near_one(write, tmp_path):
    write("TAG: x", "swin_tiny.yaml")
    message = refusal(tmp_path / "swin_tyni.yaml")
    assert f"There is no file {tmp_path / 'swin_tyni.yaml'}. Did you mean {tmp_path / 'swin_tiny.yaml'}?" == message
    assert "Check the path" in refusal(tmp_path / "elsewhere" / "a.yaml")


def test_binary_files_and_folders(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(bytes(range(128, 256)))
    assert "weights.yaml cannot be read" in refusal(tmp_path / "weights.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml cannot be read" in refusal(tmp_path / "folder.yaml")


def test_a_recipe_of_the_original_project_is_named_by_ours(tmp_path):
    message = refusal(tmp_path / "configs" / "swin" / "swin_tiny_patch4_window7_224.yaml")
    assert message.endswith("Here that recipe is configs/swin_tiny.yaml.")
    assert "configs/swin_base_384.yaml" in refusal(tmp_path / "swin_base_patch4_window12_384_finetune.yaml")
    assert "configs/swin_mlp_base.yaml" in refusal(tmp_path / "swin_mlp_base_patch4_window7_224.yaml")


def test_parse_reads_what_dump_wrote():
    config = get_config(None, ["TAG", "007", "TRAIN.LR_SCHEDULER.MULTISTEPS", "[30,60]", "MODEL.SWIN.QK_SCALE", "0.5"])
    assert flatten(parse(dump(config), "file")) == flatten(config)


@pytest.mark.parametrize("text", ["", "x", "a: [", "NEW: 1", "TAG: !!python/name:os.system x", "[" * 2000])
def test_parse_refuses_a_config_of_another_program_by_name(text):
    with pytest.raises(UserError, match="last.pth"):
        parse(text, "last.pth")


def test_circles_are_shown_as_a_chain(write):
    write("BASE: [b.yaml]", "a.yaml")
    write("BASE: [sub/../c.yaml]", "b.yaml")
    write("", "sub/nothing")
    path = write("BASE: [a.yaml]", "c.yaml")
    message = refusal(path)
    assert re.search(r"circular: .*c\.yaml → .*a\.yaml → .*b\.yaml → .*c\.yaml\. Remove", message)
    own = write("BASE: [own.yaml]", "own.yaml")
    assert re.search(r"own\.yaml → .*own\.yaml", refusal(own))


def test_python_is_never_executed(write, tmp_path):
    marker = tmp_path / "executed"
    evil = f"open({str(marker)!r}, 'w').close()\ncfg = dict(SEED=1)\n"
    assert "never executed" in refusal(write(evil, "run.py"))
    assert "never executed" in refusal(write("BASE: [run.py]"))
    assert "is not a YAML file" in refusal(write(evil, "run.txt"))
    for value in (f"!!python/object/apply:os.mkdir [{str(marker)!r}]", "!!python/name:os.system", "!mine {a: 1}"):
        assert "Tags are not used here" in refusal(write(f"TAG: {value}"))
    assert "has the YAML tag" in refusal(write("MODEL: {SWIN: {DEPTHS: [!!python/name:os.system x]}}"))
    assert "SEED takes" in refusal(None, ["SEED", f"__import__('os').mkdir({str(marker)!r})"])
    assert not marker.exists()


# ---------------------------------------------------------------- old names and keys without effect


@pytest.mark.parametrize(
    ("text", "enabled", "message"),
    [
        ("ENABLE_AMP: False", False, "ENABLE_AMP is the old name of AMP_ENABLE"),
        ("AMP_OPT_LEVEL: O0", False, "AMP_OPT_LEVEL (Apex) 'O0' is read as AMP_ENABLE False"),
        ("AMP_OPT_LEVEL: O1", True, "AMP_OPT_LEVEL (Apex) 'O1' has no effect"),
        ("AMP_OPT_LEVEL: ''", True, None),
    ],
)
def test_old_names_of_amp_enable(write, caplog, text, enabled, message):
    path = write(text)
    config = get_config(path)
    assert config.AMP_ENABLE is enabled
    assert get_config(path, ["AMP_ENABLE", "true"]).AMP_ENABLE is True
    lines = caplog.messages
    assert len(lines) == (2 if message else 0) and all(line.startswith(f"{path}, line 1: {message}") for line in lines)


def test_an_unknown_apex_level_is_refused():
    assert "AMP_OPT_LEVEL is 'O9', not one of O0, O1, O2" in refusal(None, ["AMP_OPT_LEVEL", "O9"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("TRAIN.START_EPOCH", 5), ("TRAIN.MOE.SAVE_MASTER", True), ("TEST.SEQUENTIAL", True), ("TEST.SHUFFLE", True),
     ("LOCAL_RANK", 1), ("FUSED_WINDOW_PROCESS", True), ("FUSED_LAYERNORM", True)],
)  # fmt: skip
def test_keys_without_effect_are_logged_once_if_changed(caplog, key, value):
    same = get_config(None, flags=[Override(key, DEFAULTS[key], "FILE, line 1")])
    assert caplog.messages == []
    changed = get_config(None, flags=[Override(key, value, "FILE, line 1")])
    assert [line.startswith(f"FILE, line 1: {key} has no effect here: ") for line in caplog.messages] == [True]
    assert flatten(changed)[key] == value and differences(same, changed) == []


def test_the_list_of_keys_without_effect_is_complete():
    source = (REPO_ROOT / "config.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^_C\.(\S+) = .*# no effect", source, re.MULTILINE)) == set(config_module.NO_EFFECT)


# ---------------------------------------------------------------- comparing


def test_differences_are_those_that_change_what_is_computed():
    old = get_config(None)
    new = get_config(None, ["TRAIN.EPOCHS", 100, "AUG.MIXUP", 0, "TAG", "other", "DATA.NUM_WORKERS", 0, "OUTPUT", "x"])
    assert differences(old, new) == [("TRAIN.EPOCHS", 300, 100), ("AUG.MIXUP", 0.8, 0.0)]
    assert config_module.NON_SEMANTIC_KEYS <= set(DEFAULTS)
    for key in ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "SEED", "TRAIN.EPOCHS", "MODEL.PRETRAINED"):
        assert key not in config_module.NON_SEMANTIC_KEYS
