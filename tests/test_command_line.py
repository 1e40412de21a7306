"""main.py's command line: the key of each flag, refusals, and how mistakes are reported (message, exit code)."""

import ast
import os
import signal
import subprocess
import sys
import time

import pytest

import main as main_module
from config import get_config
from main import build_parser, main, parse_command_line
from utils.config.foreign_flags import FOREIGN_FLAGS
from utils.config.merge import flatten
from utils.errors import TrainingDiverged, UserError
from utils.paths import REPO_ROOT

CFG = ["--cfg", str(REPO_ROOT / "configs" / "swin_tiny.yaml")]
PLAIN = flatten(get_config(CFG[1]))


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def changed(*argv: str) -> dict[str, object]:
    """Returns the keys, with their values, that `argv` changes relative to the recipe."""
    config, _ = parse_command_line([*CFG, *argv])
    return {key: value for key, value in flatten(config).items() if value != PLAIN[key]}


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_command_line(argv)
    return str(caught.value)


FLAGS = [
    (["--batch-size", "64"], {"DATA.BATCH_SIZE": 64}),
    (["--data-path", "/data"], {"DATA.DATA_PATH": "/data"}),
    (["--zip"], {"DATA.ZIP_MODE": True}),
    (["--cache-mode", "full"], {"DATA.CACHE_MODE": "full"}),
    (["--pretrained", "a.pth"], {"MODEL.PRETRAINED": "a.pth"}),
    (["--ema", "--pretrained", "a"], {"MODEL.PRETRAINED_EMA": "ema", "MODEL.PRETRAINED": "a"}),
    (["--resume", "a.pth"], {"MODEL.RESUME": "a.pth"}),
    (["--accumulation-steps", "4"], {"TRAIN.ACCUMULATION_STEPS": 4}),
    (["--use-checkpoint"], {"TRAIN.USE_CHECKPOINT": True}),
    (["--disable_amp"], {"AMP_ENABLE": False}),
    (["--disable-amp"], {"AMP_ENABLE": False}),
    (["--output", "runs"], {"OUTPUT": "runs"}),
    (["--tag", "007"], {"TAG": "007"}),
    (["--eval", "--resume", "a.pth"], {"EVAL_MODE": True, "MODEL.RESUME": "a.pth"}),
    (["--throughput"], {"THROUGHPUT_MODE": True}),
    (["--optim", "sgd"], {"TRAIN.OPTIMIZER.NAME": "sgd"}),
    (["--local_rank", "1"], {"LOCAL_RANK": 1}),
    (["--local-rank=1"], {"LOCAL_RANK": 1}),
    (["--amp-opt-level", "O0"], {"AMP_ENABLE": False}),
    (["--amp-opt-level", "O1"], {}),
    (["--fused_window_process"], {"FUSED_WINDOW_PROCESS": True}),
    (["--fused_layernorm"], {"FUSED_LAYERNORM": True}),
    (["--opts", "TRAIN.EPOCHS", "100", "--tag", "x", "--opts", "SEED", "1"],
     {"TRAIN.EPOCHS": 100, "TAG": "x", "SEED": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "expected"), FLAGS, ids=lambda part: " ".join(part))
def test_every_flag_sets_its_key(argv, expected):
    assert changed(*argv) == expected


def test_no_flag_is_left_out_above_and_each_help_names_its_key():
    tested = {word.partition("=")[0] for argv, _ in FLAGS for word in argv if word.startswith("--")}
    # Of a parser's actions, only those that set keys know one.
    actions = [action for action in build_parser()._actions if hasattr(action, "key")]
    assert {option for action in actions for option in action.option_strings} == tested - {"--opts"}
    assert [action.key for action in actions if f"[{action.key}]" not in action.help] == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--local_rank", "0"], "--local_rank: LOCAL_RANK has no effect here: "),
        (["--local-rank", "3"], "--local-rank: LOCAL_RANK has no effect here: "),
        (["--amp-opt-level", "O0"], "--amp-opt-level: AMP_OPT_LEVEL (Apex) 'O0' is read as AMP_ENABLE False"),
        (["--amp-opt-level", "O2"], "--amp-opt-level: AMP_OPT_LEVEL (Apex) 'O2' has no effect"),
        (["--fused_window_process"], "--fused_window_process: FUSED_WINDOW_PROCESS has no effect here: "),
        (["--fused_layernorm"], "--fused_layernorm: FUSED_LAYERNORM has no effect here: "),
        (["--zip", "--tag", "x"], None),
    ],
)
def test_flags_of_old_say_in_one_line_what_they_mean_here(caplog, argv, line):
    parse_command_line([*CFG, *argv])
    assert [message.startswith(line) for message in caplog.messages] == ([True] if line else [])


def test_opts_win_over_flags_and_flags_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("DATA: {BATCH_SIZE: 2}\nTAG: file\nOUTPUT: file")
    argv = ["--opts", "TAG", "opts", "--cfg", str(path), "--tag", "flag", "--output", "flag", "--output", "again"]
    config, _ = parse_command_line(argv)
    assert (config.DATA.BATCH_SIZE, config.TAG, config.OUTPUT) == (2, "opts", "again")


def test_allow_config_change_is_no_key():
    config, args = parse_command_line([*CFG, "--allow-config-change"])
    assert args.allow_config_change and flatten(config) == PLAIN
    assert not parse_command_line(CFG)[1].allow_config_change


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bacth-size", "8"], "there is no flag --bacth-size. Did you mean --batch-size?"),
        (["--bach-size=8"], "there is no flag --bach-size. Did you mean --batch-size?"),
        (["--batch", "8"], "there is no flag --batch. "),
        (["--data_path", "x"], "Did you mean --data-path?"),
        (["--pretrain", "x"], "Did you mean --pretrained?"),
        (["--qqqqqqq"], "--help lists all flags"),
        (
            ["--lr", "0.1"],
            "TRAIN.BASE_LR (for 512 images a step: it is scaled with the global batch size), set by --opts",
        ),
        (["--lr=0.1"], "set by --opts TRAIN.BASE_LR 0.1."),
        (
            ["--epochs", "3"],
            "there is no flag --epochs. Here it is the key TRAIN.EPOCHS, set by --opts TRAIN.EPOCHS 3.",
        ),
        (["--epochs"], "set by --opts TRAIN.EPOCHS VALUE."),
        (["--epochs", "--tag", "x"], "set by --opts TRAIN.EPOCHS VALUE."),
        (["--workers", "4"], "set by --opts DATA.NUM_WORKERS 4."),
        (["-j", "4"], "set by --opts DATA.NUM_WORKERS 4."),
        (["--weight-decay", "0.1"], "set by --opts TRAIN.WEIGHT_DECAY 0.1."),
        (["--weight_decay", "0.1"], "set by --opts TRAIN.WEIGHT_DECAY 0.1."),
        (
            ["--ema"],
            "averaged weights from a file: add --pretrained FILE. To average the weights of this run: --opts T",
        ),
        (["--model-ema"], "set by --opts TRAIN.EMA_DECAY 0.9999."),
        (["--img-size", "384"], "set by --opts DATA.IMG_SIZE 384."),
        (["--grad-accum-steps", "2"], "there is no flag --grad-accum-steps. Here it is --accumulation-steps 2."),
        (
            ["--model", "resnet50"],
            "Here --cfg names a recipe. For timm's models: --opts MODEL.TYPE timm MODEL.NAME res",
        ),
        (["--test-only"], "Here it is --eval."),
        (["-x"], "there is no flag -x"),
        (["word"], "'word' belongs to no flag. Keys are set by --opts"),
        (["--tag"], "argument --tag: expected one argument. `python main.py --help`"),
        (["--zip=yes"], "argument --zip: "),
        (["--opts"], "argument --opts: "),
        (["--opts", "TRAIN.EPOCHS"], "--opts takes pairs"),
        (["--batch-size", "many"], "--batch-size: DATA.BATCH_SIZE takes a whole number, not 'many'"),
        (["--batch-size", "0"], "--batch-size: DATA.BATCH_SIZE is 0 but must be in the interval [1, 65536]"),
        (["--cache-mode", "all"], "--cache-mode: DATA.CACHE_MODE is 'all' but must be one of no, part, full"),
        (["--optim", "fused_adam"], "--optim: TRAIN.OPTIMIZER.NAME is 'fused_adam'"),
        (["--batch-size", "5"], "DATA.BATCH_SIZE 5 (--batch-size) must be even"),
        (["--eval"], "--resume FILE or --pretrained FILE"),
        (["--eval", "--throughput", "--resume", "x"], "omit --eval or --throughput"),
        (["--resume", "a", "--pretrained", "b"], "give one of --resume and --pretrained"),
        (["--resume", "a", "--opts", "MODEL.PRETRAINED", "b"], "--opts MODEL.PRETRAINED starts a new one"),
    ],
)
def test_refused(argv, message):
    assert message in refusal(*CFG, *argv)


def test_flags_of_other_programs_mean_keys_and_flags_that_exist():
    ours = set(build_parser()._option_string_actions)
    assert ours.isdisjoint(FOREIGN_FLAGS)
    for flag, meaning in FOREIGN_FLAGS.items():
        assert meaning in ours or meaning.partition(" ")[0] in PLAIN, flag
        if " " in meaning:
            get_config(None, meaning.split())


def test_cfg_is_required():
    for argv in ([], ["--tag", "x"], ["--cfg", ""]):
        assert "--cfg FILE is missing" in refusal(*argv)


def test_eval_takes_the_weights_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {PRETRAINED: a.pth}")
    assert parse_command_line(["--cfg", str(path), "--eval"])[0].EVAL_MODE


def test_pretrained_wins_over_a_checkpoint_named_in_the_file_and_resume_over_weights(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {PRETRAINED: old.pth, RESUME: last.pth}")
    model = parse_command_line(["--cfg", str(path), "--pretrained", "new.pth"])[0].MODEL
    assert (model.PRETRAINED, model.RESUME) == ("new.pth", "")
    model = parse_command_line(["--cfg", str(path), "--resume", "other.pth"])[0].MODEL
    assert (model.PRETRAINED, model.RESUME) == ("old.pth", "other.pth")
    model = parse_command_line(["--cfg", str(path), "--pretrained", "new.pth", "--resume", ""])[0].MODEL
    assert (model.PRETRAINED, model.RESUME) == ("new.pth", "")


# ---------------------------------------------------------------- how it ends


def fails_with(error):
    def run(config, allow_config_change):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(UserError("fix it"), 2, "error: fix it\n"), (TrainingDiverged("gone"), 3, "error: gone\n"),
     (KeyboardInterrupt(), 130, "interrupted\n")],
)  # fmt: skip
def test_exit_codes_of_a_run(monkeypatch, capsys, error, code, message):
    monkeypatch.setattr(main_module, "run", fails_with(error))
    assert main(CFG) == code
    assert capsys.readouterr().err == message


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(main_module, "run", fails_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(CFG)


def test_the_run_gets_config_and_arguments(monkeypatch):
    got = []
    monkeypatch.setattr(
        main_module, "run", lambda config, allow_config_change: got.append((config.TAG, allow_config_change))
    )
    assert main([*CFG, "--tag", "x", "--allow-config-change"]) == 0
    assert got == [("x", True)]


def test_other_ranks_wait_before_they_repeat_the_mistake(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["--tag", "x"]) == 2
    assert waited == [] and capsys.readouterr().err.startswith("error: --cfg FILE is missing")
    monkeypatch.setenv("RANK", "3")
    assert main(["--tag", "x"]) == 2
    assert waited == [main_module.OTHER_RANKS_DELAY_SECONDS]
    assert capsys.readouterr().err.startswith("error (rank 3): --cfg FILE is missing")


def start(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def test_tasks_without_torchrun_are_refused_before_torch_is_imported(monkeypatch, capsys):
    """As `srun -n 2 python main.py` starts them: all end at once, instead of training one by one in one folder."""
    monkeypatch.setattr(main_module, "run", lambda config, allow_config_change: pytest.fail("started"))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert main(CFG) == 2
        assert f"started as task {task} of 2 (SLURM_NTASKS), but not by torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(CFG) == 2
    assert "the environment variable RANK is 'x', no number from 0 to 1" in capsys.readouterr().err


def test_interrupts_are_handled_before_the_slow_imports_by_the_program_alone():
    body = ast.parse((REPO_ROOT / "main.py").read_text()).body
    kinds = [type(statement) for statement in body[:3]]
    assert kinds == [ast.Expr, ast.ImportFrom, ast.If] and "interrupt.install()" in ast.unparse(body[2])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "importing main.py installs nothing"


def test_help_opens_with_commands_answers_at_once_and_without_torch():
    started = time.perf_counter()
    done = start("main.py", "--help")
    assert time.perf_counter() - started < 1
    assert done.returncode == 0 and done.stderr == ""
    commands = [line.strip() for line in done.stdout.splitlines() if " main.py --cfg " in line]
    assert len(commands) >= 3 and commands[0].endswith("--cfg configs/demo.yaml")
    assert done.stdout.index(commands[0]) < 200 and "batch-size N" in done.stdout
    code = "import sys, main; main.parse_command_line(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert start("-c", code, *CFG).returncode == 0


def test_examples_in_the_help_are_understood():
    for line in main_module.__doc__.splitlines():
        command, found, argv = line.partition(" main.py ")
        if found and "demo.yaml" not in argv:
            parse_command_line(argv.split())


def test_a_mistake_is_one_message_without_traceback():
    done = start("main.py", "--cfg", "config.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: config.py is Python code, which is never executed")
    assert done.stderr.count("\n") == 1


def test_warnings_come_from_rank_0_alone():
    code = "import sys, main; main.run = lambda config, allow_config_change: None; sys.exit(main.main())"
    assert "LOCAL_RANK has no effect" in start("-c", code, *CFG, "--local_rank", "1", RANK="0").stdout
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    other = start("-c", code, *CFG, "--local_rank", "1", **ranks)
    assert other.stdout + other.stderr == ""
