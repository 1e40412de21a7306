"""Bad configurations: wrong, huge or contradictory values, files that are not YAML, and mistyped command lines.

Each is given to main.py in a run of its own, which trains for some steps unless it is refused.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hypothesis import strategies as st

from config import SCHEMA
from tests._report import Report
from tests._tiny import RECIPE, write_images
from tests.fuzz.oracle import find_problem, run_briefly
from tests.fuzz.sampling import sample_cases
from utils.config.rules import CHOICES

PLAIN = {
    "DATA.IMG_SIZE": 32,
    "DATA.BATCH_SIZE": 8,
    "DATA.NUM_WORKERS": 0,
    "MODEL.NAME": "tiny",
    "MODEL.NUM_CLASSES": 0,
    "MODEL.SWIN.EMBED_DIM": 16,
    "MODEL.SWIN.DEPTHS": [2, 2],
    "MODEL.SWIN.NUM_HEADS": [1, 2],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SWINV2.EMBED_DIM": 16,
    "MODEL.SWINV2.DEPTHS": [2, 2],
    "MODEL.SWINV2.NUM_HEADS": [1, 2],
    "MODEL.SWINV2.WINDOW_SIZE": 4,
    "MODEL.SWIN_MLP.EMBED_DIM": 16,
    "MODEL.SWIN_MLP.DEPTHS": [2, 2],
    "MODEL.SWIN_MLP.NUM_HEADS": [1, 2],
    "MODEL.SWIN_MLP.WINDOW_SIZE": 4,
    "TRAIN.EPOCHS": 3,
    "TRAIN.WARMUP_EPOCHS": 1,
    "AMP_ENABLE": False,
    "PRINT_FREQ": 1,
}

# BASE is tested by `texts`.
_NAMES = st.sampled_from([*SCHEMA]).filter(lambda key: key != "BASE")
_NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 100_000, 1_000_003]),
    st.floats(),
    st.floats(0, 1.5),
    st.sampled_from([1e308, 1e-320, -0.0, 0.5, 1.0]),
)
_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "true",
            "None",
            "nan",
            "1e5",
            "0x10",
            "~",
            "[]",
            "[2,2",
            "../x",
            "/",
            ".",
            "a/b/c",
            "x" * 300,
            "torch/nothing",
            "torch/image_folder",
            "imagenet22K",
            "naïve\u2028name",
            "a\nb",
            "\x00",
            "-",
        ]
    ),
    st.sampled_from([choice for choices in CHOICES.values() for choice in choices]),
)
_VALUES = st.one_of(
    _NUMBERS, _TEXTS, st.booleans(), st.none(), st.lists(_NUMBERS, max_size=5), st.lists(_TEXTS, max_size=3)
)


@dataclass
class ConfigCase:
    """The text of the recipe, arguments beyond --cfg, --data-path and --output, and names that an error may mention."""

    kind: str
    text: bytes
    argv: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@st.composite
def other_values(draw) -> ConfigCase:
    """Draws one to three keys with values of any type."""
    keys = draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True))
    values = PLAIN | {key: draw(_VALUES) for key in keys}
    shown = [str(values[key]) for key in keys if isinstance(values[key], str | int)]  # a path is named by itself
    return ConfigCase(
        "values of any kind", yaml.safe_dump(values, allow_unicode=True).encode(), names=[*keys, *filter(None, shown)]
    )


@st.composite
def models(draw) -> ConfigCase:
    """Draws architectures whose numbers are plausible one by one."""
    kind = draw(st.sampled_from(["swin", "swinv2", "swin_mlp"]))
    section = f"MODEL.{kind.upper()}"
    few = st.lists(st.integers(0, 4), max_size=4)
    choices = {
        "DATA.IMG_SIZE": st.integers(1, 70),
        f"{section}.PATCH_SIZE": st.integers(0, 9),
        f"{section}.IN_CHANS": st.sampled_from([0, 1, 2, 3, 3, 3, 4]),
        f"{section}.EMBED_DIM": st.integers(0, 40),
        f"{section}.DEPTHS": few,
        f"{section}.NUM_HEADS": few,
        f"{section}.WINDOW_SIZE": st.integers(0, 40),
        f"{section}.MLP_RATIO": st.sampled_from([0.001, 0.3, 1.0, 4.0, 1e6]),
        "MODEL.DROP_PATH_RATE": st.floats(-0.1, 1.1),
        "MODEL.NUM_CLASSES": st.sampled_from([0, 1, 2, 3, 1000]),
        "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES": few,
        "MODEL.SWIN.POSITION": st.sampled_from(CHOICES["MODEL.SWIN.POSITION"]),
        "TRAIN.LAYER_DECAY": st.sampled_from([0.0, 0.5, 1e-300, 1.0]),
        "TRAIN.USE_CHECKPOINT": st.booleans(),
    }
    keys = draw(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=4, unique=True))
    values = PLAIN | {"MODEL.TYPE": kind} | {key: draw(choices[key]) for key in keys}
    argv = ["--throughput"] if draw(st.booleans()) else []
    return ConfigCase("models", yaml.safe_dump(values).encode(), argv, [*keys, "--data-path", "--batch-size"])


@st.composite
def recipes(draw) -> ConfigCase:
    """Draws schedules, augmentations and batch sizes that are plausible one by one."""
    choices = {
        "TRAIN.EPOCHS": st.integers(0, 400),
        "TRAIN.WARMUP_EPOCHS": st.integers(0, 30),
        "TRAIN.BASE_LR": st.sampled_from([0.0, 1e-30, 0.1, 1e10, 1e300]),
        "TRAIN.MIN_LR": st.sampled_from([0.0, 1.0, 1e300]),
        "TRAIN.CLIP_GRAD": st.sampled_from([0.0, 1e-30, 1e300]),
        "TRAIN.ACCUMULATION_STEPS": st.integers(0, 5),
        "TRAIN.EMA_DECAY": st.floats(0, 1),
        "TRAIN.LR_SCHEDULER.NAME": st.sampled_from(CHOICES["TRAIN.LR_SCHEDULER.NAME"]),
        "TRAIN.LR_SCHEDULER.MULTISTEPS": st.lists(st.integers(0, 10), max_size=3),
        "TRAIN.LR_SCHEDULER.DECAY_RATE": st.floats(0, 1),
        "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": st.integers(0, 10**9),
        "TRAIN.OPTIMIZER.NAME": st.sampled_from(["adamw", "sgd", "lamb"]),
        "TRAIN.OPTIMIZER.EPS": st.sampled_from([0.0, 1e-300, 1e300]),
        "DATA.BATCH_SIZE": st.sampled_from([1, 2, 7, 8, 64, 10**6, 10**12]),
        "DATA.NUM_WORKERS": st.sampled_from([0, 1, 2, 1000, 10**9]),
        "DATA.INTERPOLATION": st.sampled_from(CHOICES["DATA.INTERPOLATION"]),
        "AUG.AUTO_AUGMENT": st.sampled_from(
            [
                "none",
                "rand",
                "rand-m9999999",
                "rand-n0",
                "rand-n999",
                "rand-mstd1.5e9",
                "augmix-w0",
                "augmix-d0",
                "augmix-m5-w0",
                "original-mstd9999",
                "v0",
                "3a",
                "rand-mmax0",
                "rand-m0",
                "rand-p7",
                "augmix-a0",
                "rand-tweights",
                "rand-inc1-m10",
            ]
        ),
        "AUG.COLOR_JITTER": st.sampled_from([0.0, 0.4, 1.0, 7.0, 1e300]),
        "AUG.REPROB": st.floats(0, 1),
        "AUG.RECOUNT": st.sampled_from([1, 3, 1000, 10**9]),
        "AUG.REMODE": st.sampled_from(CHOICES["AUG.REMODE"]),
        "AUG.MIXUP": st.sampled_from([0.0, 1e-300, 0.8, 1e300]),
        "AUG.CUTMIX": st.sampled_from([0.0, 1e-300, 1.0, 1e300]),
        "AUG.CUTMIX_MINMAX": st.lists(st.floats(0, 1), max_size=3),
        "AUG.MIXUP_MODE": st.sampled_from(CHOICES["AUG.MIXUP_MODE"]),
        "MODEL.LABEL_SMOOTHING": st.floats(0, 1),
        "SEED": st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30]),
        "SAVE_FREQ": st.sampled_from([1, 10**12]),
        "SAVE_KEEP": st.sampled_from([0, 1, 10**12]),
        "SAVE_STEPS": st.sampled_from([0, 1, 10**30]),
        "TIMEOUT": st.sampled_from([1, 10**6, 10**30]),
        "AMP_DTYPE": st.sampled_from(CHOICES["AMP_DTYPE"]),
        "TEST.PRESET": st.sampled_from(CHOICES["TEST.PRESET"]),
    }
    keys = draw(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=4, unique=True))
    values = PLAIN | {"AMP_ENABLE": draw(st.booleans())} | {key: draw(choices[key]) for key in keys}
    return ConfigCase("recipes", yaml.safe_dump(values).encode(), names=[*keys, "--batch-size"])


@st.composite
def texts(draw) -> ConfigCase:
    """Draws files that are not, or only just, a configuration."""
    plain = RECIPE.encode()
    kind = draw(st.sampled_from(["bytes", "spliced", "binary", "alias bomb", "nested", "tag", "long", "base", "keys"]))
    if kind == "spliced":
        place = draw(st.integers(0, len(plain)))
        text = plain[:place] + draw(st.binary(min_size=1, max_size=6)) + plain[place + draw(st.integers(0, 40)) :]
    elif kind == "bytes":
        text = draw(st.text(alphabet="{}[]:,-#&*!|>'\"%@`? \n\tab1.", max_size=60)).encode()
    elif kind == "binary":
        text = draw(st.sampled_from([b"", b"\xff\xfe", b"PK\x03\x04", b"\x80\x02}", b"\xef\xbb\xbf"])) + draw(
            st.binary()
        )
    elif kind == "alias bomb":
        rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(draw(st.integers(5, 40)))]
        text = "\n".join(rows).encode()
    elif kind == "nested":
        opening = draw(st.sampled_from(["[", "{a: ", "- ", "a:\n ", "? "]))
        text = b"TAG: " + opening.encode() * draw(st.integers(10, 20_000))
    elif kind == "tag":
        tag = draw(
            st.sampled_from(
                [
                    "!!python/object/apply:os.system",
                    "!!python/name:os.system",
                    "!!binary",
                    "!!set",
                    "!!omap",
                    "!x",
                    "!!int",
                    "!!timestamp",
                    "tag:yaml.org,2002:python/object/new:os._exit",
                ]
            )
        )
        text = f"TAG: {tag} {draw(st.sampled_from(['[touch executed]', '{}', 'x', ''' ''']))}".encode()
    elif kind == "long":
        text = RECIPE.encode() + b"TAG: " + b"x" * draw(st.sampled_from([300, 5000, 3_000_000]))
    elif kind == "base":
        base = draw(
            st.sampled_from(
                [
                    "tiny.yaml",
                    "./tiny.yaml",
                    "nowhere.yaml",
                    ".",
                    "/",
                    "/dev/null",
                    "a\0b",
                    "~",
                    "/dev/zero",
                    "../" * 50 + "etc/passwd",
                    "x" * 5000 + ".yaml",
                    "images",
                    "/proc/self/mem.yaml",
                ]
            )
        )
        text = yaml.safe_dump({"BASE": [base]}).encode()
    else:
        key = draw(
            st.one_of(
                st.text(max_size=20),
                st.sampled_from(
                    [
                        "TRAIN.EPOCH",
                        "train.epochs",
                        "MODEL",
                        "",
                        "MODEL.SWIN.",
                        "..",
                        "MODEL.SWIN.DEPTHS.0",
                        "__class__",
                        "MODEL.__init__",
                        "_C",
                        "LR",
                        "BATCHSIZE",
                    ]
                ),
            )
        )
        text = yaml.safe_dump({key: draw(_VALUES)}).encode()
    return ConfigCase(f"files: {kind}", text, names=["tiny.yaml", "TAG"])


@st.composite
def command_lines(draw) -> ConfigCase:
    """Draws flags that are mistyped, incomplete or contradictory."""
    flags = [
        "--batch-size",
        "--eval",
        "--throughput",
        "--opts",
        "--resume",
        "--pretrained",
        "--zip",
        "--tag",
        "--output",
        "--accumulation-steps",
        "--cache-mode",
        "--optim",
        "--bacth-size",
        "--cfg",
        "-h1",
        "--",
        "--use-checkpoint",
        "--amp-opt-level",
        "--local_rank",
        "--data-path",
        "---",
        "--allow-config-change",
        "--disable_amp",
    ]
    values = [
        "8",
        "-1",
        "x",
        "",
        "/",
        "nowhere.pth",
        "tiny.yaml",
        "TRAIN.EPOCHS",
        "=",
        "TRAIN.EPOCHS=3",
        "images",
        "..",
        "O0",
        "a\nb",
        "9" * 400,
        "images/train/blue/0.jpg",
        "swin_tiny.yaml",
        "\udcff",
        "/dev/null",
    ]
    words = draw(st.lists(st.sampled_from([*flags, *values]), min_size=1, max_size=5))
    return ConfigCase("command lines", RECIPE.encode(), words, [*words, "--", "TRAIN", "DATA", "MODEL", "tiny"])


CASES = st.one_of(other_values(), other_values(), models(), models(), recipes(), recipes(), texts(), command_lines())


def run(count: int, seed: int) -> Report:
    report = Report("configurations", seed)
    cases = sample_cases(CASES, count, seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_images(root / "images")

        for case in cases:
            (root / "tiny.yaml").write_bytes(case.text)
            paths = ["--data-path", root / "images", "--output", root / f"logs{report.count}"]
            outcome = run_briefly(["--cfg", root / "tiny.yaml", *paths, *case.argv], root)
            problem = find_problem(outcome, [*case.names, root / "tiny.yaml"])
            if (root / "executed").exists():
                problem = "executed"
            report.add(
                f"{case.kind}, code {outcome.code}", not problem, f"{case.text[:700]!r} {case.argv} -> {problem}"
            )
    return report
