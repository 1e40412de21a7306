"""config.py and utils/config/rules.py: precedence, types, ranges, and the messages of refusals."""

import re

import pytest
import yaml

from config import SCHEMA, dump, get_config, parse
from tests._configs import refusal, writer
from utils.config.docs import CONFIG_MD, config_markdown
from utils.config.merge import Override, flatten
from utils.config.rules import CHOICES, EXPERIMENTAL, INTERVALS, PATHS
from utils.paths import REPO_ROOT

DEFAULTS = flatten(get_config(None))


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


# ---------------------------------------------------------------- defaults, and the tables of rules


def test_defaults_are_the_papers_recipe():
    config = get_config(None)
    train = config.TRAIN
    assert (train.EPOCHS, train.WARMUP_EPOCHS, train.BASE_LR, train.WEIGHT_DECAY, train.CLIP_GRAD) == (
        300, 20, 5e-4, 0.05, 5.0,
    )  # fmt: skip
    assert (train.OPTIMIZER.NAME, train.OPTIMIZER.BETAS, train.OPTIMIZER.EPS) == ("adamw", (0.9, 0.999), 1e-8)
    assert (config.AUG.AUTO_AUGMENT, config.AUG.MIXUP, config.AUG.CUTMIX) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (config.MODEL.LABEL_SMOOTHING, config.AUG.REPROB, config.OUTPUT) == (0.1, 0.25, "logs")


def test_every_key_has_a_comment():
    source = (REPO_ROOT / "config.py").read_text(encoding="utf-8")
    lines = re.findall(r"^_C\.(\S+) = (.*)$", source, re.MULTILINE)
    keys = {key: rest for key, rest in lines if not rest.startswith("CfgNode()")}
    assert set(keys) == set(DEFAULTS)
    assert [key for key, rest in keys.items() if not re.search(r"  # \S.{8}", rest)] == []


def test_the_documentation_is_generated_from_config_py():
    text = config_markdown()
    assert text.count("\n| `") == len(DEFAULTS)
    assert CONFIG_MD.read_text(encoding="utf-8") == text, "rewrite docs/CONFIG.md: python -m utils.config.docs"


@pytest.mark.parametrize("key", EXPERIMENTAL)
def test_experimental_keys_log_a_warning(key, caplog):
    get_config(None, ["TRAIN.COMPILE", "True", key, "True"])
    assert caplog.messages == [f"--opts: {key} is experimental: it has never run on a GPU."]
    source = (REPO_ROOT / "config.py").read_text(encoding="utf-8")
    assert re.search(rf"^_C\.{key} = .*# experimental: never run on a GPU", source, re.MULTILINE)


def test_every_number_has_bounds_and_every_name_its_choices():
    bounded = [key for keys in INTERVALS.values() for key in keys.split()]
    assert len(bounded) == len(set(bounded))
    assert set(bounded) == {key for key, kind in SCHEMA.items() if kind.element in (int, float)}
    free_text = {"BASE", "DATA.DATA_PATH", "MODEL.PRETRAINED", "MODEL.RESUME", "OUTPUT"}
    checked_together = {"DATA.DATASET", "AUG.AUTO_AUGMENT", "MODEL.NAME", "TAG"}
    checked_by_the_task = {"TRAIN.BEST_METRIC"}
    named = set(CHOICES) | free_text | checked_together | checked_by_the_task
    assert named == {key for key, kind in SCHEMA.items() if kind.element is str}


def test_the_config_is_frozen_and_calls_do_not_share_it(write):
    config = get_config(write("MODEL: {SWIN: {DEPTHS: [1, 1, 1, 1]}}"))
    with pytest.raises(AttributeError):
        config.MODEL.SWIN.WINDOW_SIZE = 8
    config.MODEL.SWIN.DEPTHS.append(9)
    assert flatten(get_config(None)) == DEFAULTS


# ---------------------------------------------------------------- precedence


def test_each_source_wins_over_the_one_before(write):
    write("SEED: 1\nPRINT_FREQ: 1\nSAVE_FREQ: 1\nTAG: base", "base.yaml")
    cfg = write("BASE: [base.yaml]\nPRINT_FREQ: 2\nSAVE_FREQ: 2\nTAG: cfg")
    flags = [Override("SAVE_FREQ", "3", "--save"), Override("TAG", "flag", "--tag")]
    config = get_config(cfg, ["TAG", "opts"], flags)
    assert (config.SEED, config.PRINT_FREQ, config.SAVE_FREQ, config.TAG) == (1, 2, 3, "opts")
    assert config.BASE == [""]


def test_a_given_zero_false_or_empty_value_wins(write):
    write("AUG: {MIXUP: 0.5, CUTMIX: 0.5}\nAMP_ENABLE: True\nOUTPUT: runs\nMODEL: {RESUME: x.pth}", "base.yaml")
    cfg = write("BASE: [base.yaml]\nAUG:\n  MIXUP: 0\nMODEL: {RESUME: ''}")
    flags = [Override("AMP_ENABLE", False, "--disable_amp"), Override("OUTPUT", "", "--output")]
    config = get_config(cfg, ["AUG.CUTMIX", "0"], flags)
    assert (config.AUG.MIXUP, config.AUG.CUTMIX, config.AMP_ENABLE) == (0.0, 0.0, False)
    assert (config.OUTPUT, config.MODEL.RESUME) == ("", "")
    assert get_config(cfg, ["AMP_ENABLE", "true"], flags).AMP_ENABLE is True


def test_base_is_relative_to_its_file_and_later_ones_win(write):
    write("SEED: 1\nPRINT_FREQ: 1\nSAVE_FREQ: 1", "common/grand.yaml")
    write("BASE: [grand.yaml]\nPRINT_FREQ: 2\nSAVE_FREQ: 2", "common/first.yaml")
    write("SAVE_FREQ: 3", "second.yaml")
    config = get_config(write("BASE: ['', common/first.yaml, second.yaml]\nTAG: x"))
    assert (config.SEED, config.PRINT_FREQ, config.SAVE_FREQ) == (1, 2, 3)


def test_a_file_may_be_a_base_twice_if_not_in_a_circle(write):
    write("SEED: 7", "root.yaml")
    write("BASE: [root.yaml]\nTAG: a", "a.yaml")
    write("BASE: [root.yaml]\nPRINT_FREQ: 3", "b.yaml")
    config = get_config(write("BASE: [a.yaml, b.yaml]"))
    assert (config.SEED, config.TAG, config.PRINT_FREQ) == (7, "a", 3)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("text", ["1e-8", "'1e-8'", "1E-8", "0.00000001", "1.0e-08"])
def test_yaml_floats_in_every_spelling(write, text):
    value = get_config(write(f"TRAIN: {{WEIGHT_DECAY: {text}}}")).TRAIN.WEIGHT_DECAY
    assert value == 1e-8 and isinstance(value, float)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("TRAIN.CLIP_GRAD", 1, 1.0),
        ("TRAIN.BASE_LR", "2e-05", 2e-5),
        ("TRAIN.OPTIMIZER.BETAS", [0.9, 0.95], (0.9, 0.95)),
        ("TRAIN.OPTIMIZER.BETAS", "(0.9, 0.95)", (0.9, 0.95)),
        ("MODEL.SWIN.DEPTHS", (1, 1, 1, 1), [1, 1, 1, 1]),
        ("MODEL.SWIN.DEPTHS", "1, 1,1,1", [1, 1, 1, 1]),
        ("TRAIN.LR_SCHEDULER.MULTISTEPS", "[]", []),
        ("TRAIN.LR_SCHEDULER.MULTISTEPS", "[30, 60,]", [30, 60]),
        ("MODEL.SWIN.QK_SCALE", "0.5", 0.5),
        ("MODEL.SWIN.QK_SCALE", 1, 1.0),
        ("MODEL.SWIN.QK_SCALE", "None", None),
        ("MODEL.SWIN.QK_SCALE", None, None),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]", [0.2, 0.8]),
        ("AUG.CUTMIX_MINMAX", "null", None),
        ("AMP_ENABLE", "false", False),
        ("AMP_ENABLE", "True", True),
        ("AMP_ENABLE", "off", False),
        ("TAG", "2024-01-01", "2024-01-01"),
        ("TAG", "007", "007"),
        ("TAG", "true", "true"),
        ("DATA.DATA_PATH", "/data/1e5", "/data/1e5"),
    ],
)
def test_values_are_converted_to_the_type_of_their_key(write, key, value, expected):
    from_opts = flatten(get_config(None, [key, value]))[key]
    from_yaml = flatten(get_config(write(yaml.safe_dump({key: value}))))[key]
    assert from_opts == from_yaml == expected
    assert type(from_opts) is type(from_yaml) is type(expected)


@pytest.mark.parametrize("text", ["2024-01-01", "007", "1_000", "on", "1:30", "0x10", "no"])
def test_a_plain_yaml_name_stays_as_it_was_written(write, text):
    assert get_config(write(f"TAG: {text}")).TAG == text


@pytest.mark.parametrize(
    ("key", "value", "key_type"),
    [
        ("DATA.BATCH_SIZE", "big", "a whole number"),
        ("DATA.BATCH_SIZE", "8.0", "a whole number"),
        ("DATA.BATCH_SIZE", 8.0, "a whole number"),
        ("DATA.BATCH_SIZE", True, "a whole number"),
        ("DATA.BATCH_SIZE", "true", "a whole number"),
        ("DATA.BATCH_SIZE", None, "a whole number"),
        ("DATA.BATCH_SIZE", "9" * 5000, "a whole number"),
        ("TRAIN.BASE_LR", True, "a finite number"),
        ("TRAIN.BASE_LR", "nan", "a finite number"),
        ("TRAIN.BASE_LR", float("nan"), "a finite number"),
        ("TRAIN.BASE_LR", "inf", "a finite number"),
        ("TRAIN.BASE_LR", 10**400, "a finite number"),
        ("TRAIN.BASE_LR", [1e-3], "a finite number"),
        ("AMP_ENABLE", 1, "true or false"),
        ("AMP_ENABLE", "1", "true or false"),
        ("AMP_ENABLE", "maybe", "true or false"),
        ("TAG", 5, "a text"),
        ("TAG", None, "a text"),
        ("MODEL.SWIN.DEPTHS", 2, "a list of whole numbers"),
        ("MODEL.SWIN.DEPTHS", [2, 2.0, 6, 2], "a list of whole numbers"),
        ("MODEL.SWIN.DEPTHS", "2 2 6 2", "a list of whole numbers"),
        ("MODEL.SWIN.DEPTHS", "[2,,6]", "a list of whole numbers"),
        ("MODEL.SWIN.DEPTHS", None, "a list of whole numbers"),
        ("MODEL.SWIN.QK_SCALE", "auto", "a finite number, or None"),
        ("AUG.CUTMIX_MINMAX", "[0.2, x]", "a list of finite numbers, or None"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, key_type):
    message = refusal(None, [key, value])
    assert message.startswith(f"--opts: {key} takes {key_type}, not ") and len(message) < 300


def test_no_bool_for_an_int_and_no_int_for_a_bool_from_yaml(write):
    path = write("DATA:\n  BATCH_SIZE: yes")
    assert f"{path}, line 2: DATA.BATCH_SIZE takes a whole number, not 'yes'" in refusal(path)
    path = write("AMP_ENABLE: 0")
    assert f"{path}, line 1: AMP_ENABLE takes true or false, not '0'" in refusal(path)


# ---------------------------------------------------------------- ranges, choices, validate_combinations


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("DATA.BATCH_SIZE", 0, "[1, 65536]"),
        ("MODEL.DROP_PATH_RATE", 1.0, "[0, 1)"),
        ("MODEL.DROP_PATH_RATE", -0.1, "[0, 1)"),
        ("AUG.REPROB", 1.5, "[0, 1]"),
        ("TRAIN.LAYER_DECAY", 0, "(0, 1]"),
        ("TRAIN.OPTIMIZER.MOMENTUM", 0, "(0, 1)"),
        ("TRAIN.OPTIMIZER.BETAS", "(0.9, 1.0)", "[0, 1)"),
        ("TRAIN.OPTIMIZER.BETAS", "(0.9,)", "2 numbers"),
        ("AUG.CUTMIX_MINMAX", "[0.2]", "2 numbers"),
        ("MODEL.SWIN.QK_SCALE", 0, "(0, inf)"),
        ("MODEL.SWIN.NUM_HEADS", "[3, 0, 12, 24]", "[1, inf)"),
        ("DATA.CACHE_MODE", "all", "no, part, full"),
        ("TRAIN.OPTIMIZER.NAME", "fused_lamb", "adamw, sgd"),
        ("AMP_DTYPE", "fp16", "float16"),
        ("SEED", 2**63, "[0, 1e18]"),
        ("TIMEOUT", 10**30, "[1, 1000000]"),
        ("AUG.RECOUNT", 10**9, "[1, 100]"),
        ("MODEL.TYPE", "resnet", "swin, swinv2, swin_mlp, timm"),
    ],
)
def test_out_of_range(key, value, wanted):
    message = refusal(None, [key, value])
    assert message.startswith(f"--opts: {key} is ") and wanted in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("AUG.REPROB", 1), ("AUG.REPROB", 0), ("TRAIN.LAYER_DECAY", 1), ("DATA.NUM_WORKERS", 0), ("MODEL.NUM_CLASSES", 0)],
)
def test_bounds_with_a_bracket_are_in_range(key, value):
    assert flatten(get_config(None, [key, value]))[key] == value


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        ("TRAIN.EPOCHS 20", ["TRAIN.WARMUP_EPOCHS 20 (default)", "TRAIN.EPOCHS 20 (--opts)"]),
        ("MODEL.SWIN.DEPTHS [2,2]", ["MODEL.SWIN.DEPTHS [2, 2] (--opts)", "MODEL.SWIN.NUM_HEADS"]),
        ("MODEL.SWIN.DEPTHS [] MODEL.SWIN.NUM_HEADS []", ["MODEL.SWIN.DEPTHS"]),
        ("MODEL.SWIN.EMBED_DIM 100", ["MODEL.SWIN.NUM_HEADS", "100 channels of stage 0", "MODEL.SWIN.EMBED_DIM 100"]),
        ("MODEL.SWIN.NUM_HEADS [3,6,12,25]", ["768 channels of stage 3", "25 heads"]),
        ("TRAIN.LR_SCHEDULER.NAME multistep", ["TRAIN.LR_SCHEDULER.MULTISTEPS [] (default)"]),
        ("TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MULTISTEPS [60,30]", ["MULTISTEPS [60, 30]"]),
        ("TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MULTISTEPS [10,30]", ["TRAIN.WARMUP_EPOCHS 20"]),
        ("TRAIN.BASE_LR 1e-6", ["TRAIN.MIN_LR 5e-06 (default) must not be above TRAIN.BASE_LR 1e-06 (--opts)"]),
        ("TRAIN.WARMUP_LR 1e-3", ["TRAIN.WARMUP_LR 0.001 (--opts) must not be above TRAIN.BASE_LR 0.0005 (default)"]),
        ("DATA.BATCH_SIZE 5", ["DATA.BATCH_SIZE 5 (--opts)", "AUG.MIXUP 0 AUG.CUTMIX 0"]),
        ("DATA.BATCH_SIZE 5 AUG.MIXUP 0 AUG.CUTMIX 0 AUG.CUTMIX_MINMAX [0.2,0.8]", ["AUG.CUTMIX_MINMAX None"]),
        ("AUG.CUTMIX_MINMAX [0.8,0.2]", ["AUG.CUTMIX_MINMAX [0.8, 0.2]", "swap"]),
        ("AUG.AUTO_AUGMENT rand-m9-foo3", ["AUG.AUTO_AUGMENT 'rand-m9-foo3'", "'none'"]),
        ("DATA.DATASET imagnet", ["DATA.DATASET 'imagnet'", "Did you mean imagenet?"]),
        ("DATA.DATASET demo DATA.ZIP_MODE true", ["DATA.ZIP_MODE True", "DATA.DATASET 'demo'"]),
        ("TAG ../other", ["TAG '../other'"]),
        (f"TAG {'x' * 300}", ["TAG names a folder, and folder names have at most 255 bytes"]),
        ("MODEL.SWIN.IN_CHANS 4", ["MODEL.SWIN.IN_CHANS 4 (--opts) must be 3", "--throughput"]),
        ("MODEL.TYPE swinv2 MODEL.SWINV2.IN_CHANS 1", ["MODEL.SWINV2.IN_CHANS 1 (--opts) must be 3"]),
        ("MODEL.NAME /abs", ["MODEL.NAME '/abs'"]),
        ("EVAL_MODE true", ["EVAL_MODE True", "--resume FILE or --pretrained FILE"]),
        ("EVAL_MODE true THROUGHPUT_MODE true MODEL.RESUME x", ["--eval or --throughput"]),
    ],
)
def test_contradictions_name_the_keys_their_origins_and_a_way_out(opts, parts):
    message = refusal(None, opts.split())
    assert [part for part in parts if part not in message] == [] and message.count("\n") == 0


def test_parse_accepts_combinations_of_another_version():
    text = dump(get_config(None)).replace("BASE_LR: 0.0005", "BASE_LR: 1.0e-06")
    assert parse(text, "last.pth").TRAIN.BASE_LR == 1e-6


@pytest.mark.parametrize("key", ["TAG", "OUTPUT", "DATA.DATA_PATH", "MODEL.NAME", "MODEL.RESUME"])
@pytest.mark.parametrize("character", ["\n", "\t", "\0", "\x1b"])
def test_names_hold_no_control_characters(key, character):
    message = refusal(None, [key, f"a{character}b"])
    assert message.startswith(f"--opts: {key} is ") and "remove the line break" in message and character not in message


def test_all_contradictions_are_reported_at_once():
    assert len(refusal(None, ["TRAIN.EPOCHS", "2", "DATA.BATCH_SIZE", "5"]).splitlines()) == 2


@pytest.mark.parametrize(
    "opts",
    [
        "DATA.BATCH_SIZE 5 AUG.MIXUP 0 AUG.CUTMIX 0",
        "DATA.BATCH_SIZE 1 EVAL_MODE true MODEL.PRETRAINED x.pth",
        "DATA.BATCH_SIZE 1 THROUGHPUT_MODE true",
        "TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MULTISTEPS [30,60]",
        "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0",
        "TRAIN.BASE_LR 1e-6 TRAIN.MIN_LR 1e-6",
        "TRAIN.BASE_LR 1e-6 TRAIN.LR_SCHEDULER.NAME linear",
        "TRAIN.WARMUP_LR 1e-3 TRAIN.WARMUP_EPOCHS 0",
        "TRAIN.BASE_LR 0 TRAIN.EPOCHS 5 THROUGHPUT_MODE true",
        "TRAIN.BASE_LR 0 TRAIN.EPOCHS 5 EVAL_MODE true MODEL.RESUME x.pth",
        "MODEL.SWIN.IN_CHANS 4 THROUGHPUT_MODE true",
        "DATA.DATASET torch/cifar10",
        "TAG trials/1",
    ],
)
def test_valid_combinations(opts):
    get_config(None, opts.split())


def test_augmentation_policies_agree_with_timm():
    transforms = pytest.importorskip("timm.data.transforms_factory")
    for policy in ("rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.5-tweights", "augmix-m5-w4-d2-a1-b1", "original-mstd0.5",
                   "originalr", "v0", "v0r", "3a"):  # fmt: skip
        transforms.transforms_imagenet_train(32, auto_augment=policy)
        get_config(None, ["AUG.AUTO_AUGMENT", policy])
    for policy in ("rand-x9", "augmix-n3", "v0-m9", "v1"):
        with pytest.raises(AssertionError):
            transforms.transforms_imagenet_train(32, auto_augment=policy)
        assert "is no policy" in refusal(None, ["AUG.AUTO_AUGMENT", policy])


@pytest.mark.parametrize("key", PATHS)
def test_paths_begin_at_the_home_folder(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = {
        "~/x": "/home/me/x",
        "~": "/home/me",
        "x/~": "x/~",
        "./~x": "./~x",
        "https://a.org/~me/w.pth": None,
        "": None,
    }
    for given, expanded in values.items():
        assert flatten(get_config(None, [key, given]))[key] == (given if expanded is None else expanded)
    message = refusal(None, [key, "~nosuchuser/x"])
    assert message.startswith(f"--opts: {key} ~nosuchuser/x: there is no user 'nosuchuser'. Give the path in full")


def test_files_begin_at_the_home_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("SEED: 3", "base.yaml")
    write("BASE: ['~/base.yaml']\nTAG: x")
    config = get_config("~/run.yaml")
    assert (config.SEED, config.TAG) == (3, "x")
    assert "--cfg ~nosuchuser/a.yaml: there is no user" in refusal("~nosuchuser/a.yaml")
    path = write("BASE: ['~nosuchuser/base.yaml']")
    assert f"{path}, line 1: BASE ~nosuchuser/base.yaml: there is no user" in refusal(path)


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("TRAIN.EPOCH", "Did you mean TRAIN.EPOCHS?"),
        ("BATCH_SIZE", "Did you mean DATA.BATCH_SIZE?"),
        ("TRAIN.BATCH_SIZE", "Did you mean DATA.BATCH_SIZE?"),
        ("OPTIMIZER.NAME", "Did you mean TRAIN.OPTIMIZER.NAME?"),
        ("train.epochs", "Did you mean TRAIN.EPOCHS?"),
        ("AMP", "Did you mean AMP_ENABLE?"),
        ("LR", "Did you mean TRAIN.BASE_LR?"),
        ("TRAIN.WD", "Did you mean TRAIN.WEIGHT_DECAY?"),
        ("DATA.WORKERS", "Did you mean DATA.NUM_WORKERS?"),
        ("QQQ.ZZZ", "config.py lists all keys"),
        ("TRAIN", "is a section, not a key. Set the keys inside it, such as TRAIN.START_EPOCH"),
        ("BASE", "only inside a YAML file"),
        ("", "there is no key"),
    ],
)
def test_unknown_keys_get_advice(key, advice):
    message = refusal(None, [key, "1"])
    assert message.startswith("--opts: ") and key in message and advice in message


def test_unknown_keys_in_a_file_are_reported_with_their_line(write):
    path = write("TRAIN:\n  # a comment\n  EPOCS: 3")
    assert f"{path}, line 3: there is no key TRAIN.EPOCS. Did you mean TRAIN.EPOCHS?" in refusal(path)
    path = write("TRIAN:\n  EPOCHS: 3")
    assert f"{path}, line 1: there is no key TRIAN. Did you mean TRAIN?" in refusal(path)


@pytest.mark.parametrize("opts", [["TRAIN.EPOCHS"], ["TRAIN.EPOCHS=3"], ["TAG", "x", "SEED"]])
def test_odd_opts(opts):
    assert "--opts takes pairs, KEY VALUE" in refusal(None, opts)
