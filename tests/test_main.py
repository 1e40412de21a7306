"""Runs of main.py on tiny images: training, kills, resuming, evaluation, fine-tuning and errors."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import throughput, train_step
from main import main
from utils.paths import REPO_ROOT
from utils.tracking.metric_writer import read_records

TRAIN, VAL, BATCH = 44, 14, 8  # an epoch is 5.5 batches, so one batch spans two epochs
COLORS = {"blue": (30, 30, 220), "green": (30, 220, 30)}

RECIPE = f"""
DATA: {{IMG_SIZE: 32, BATCH_SIZE: {BATCH}, NUM_WORKERS: 0}}
MODEL:
  NAME: tiny
  NUM_CLASSES: 0
  DROP_RATE: 0.1
  DROP_PATH_RATE: 0.1
  SWIN: {{EMBED_DIM: 16, DEPTHS: [2, 2], NUM_HEADS: [1, 2], WINDOW_SIZE: 4}}
TRAIN: {{EPOCHS: 3, WARMUP_EPOCHS: 1, BASE_LR: 0.1, EMA_DECAY: 0.9}}
AMP_ENABLE: False
PRINT_FREQ: 2
"""


CPU_ONLY = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides GPUs, except from tests marked `gpu`: results are bitwise reproducible on the CPU."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in color."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", TRAIN // 2), ("val", VAL // 2)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + 5 * (i % 7)) for c in color)
                Image.new("RGB", (40, 36), shade).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def job(recipe: Path, images: Path, capfd: pytest.CaptureFixture):
    """Runs main.py in this process; returns its exit code and its output."""

    def run(*args: str, data: Path = images) -> tuple[int, str]:
        capfd.readouterr()
        argv = ["--cfg", str(recipe), "--data-path", str(data), "--output", str(recipe.parent / "logs"), *args]
        code = main(argv)
        output = capfd.readouterr()
        return code, output.out + output.err

    return run


def command(recipe: Path, images: Path, *args: str, processes: int = 1) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = start if processes > 1 else [sys.executable]
    where = ["--data-path", str(images), "--output", str(recipe.parent / "logs")]
    return [*start, str(REPO_ROOT / "main.py"), "--cfg", str(recipe), *where, *args]


def kill_all(recipe: Path) -> None:
    """Kills every process of the run with `kill -9`: torchrun, the ranks (in their own sessions) and their workers."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            mine = str(recipe).encode() in path.read_bytes() and int(path.parent.name) != os.getpid()
            if mine:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended


def run_dir(recipe: Path, tag: str = "default") -> Path:
    return recipe.parent / "logs" / "tiny" / tag


def checkpoint(recipe: Path, tag: str = "default", name: str = "last") -> dict:
    return torch.load(run_dir(recipe, tag) / "checkpoints" / f"{name}.pth", weights_only=True)


def assert_same(one, other, where: str = "") -> None:
    """Asserts that two nested structures are bitwise equal."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    else:
        assert one == other, where


def test_one_run_from_start_to_end(job, recipe: Path):
    code, output = job()
    assert code == 0, output
    folder = run_dir(recipe)
    for expected in ("best top-1", f"less {folder}/log.txt", f"tensorboard --logdir {folder}/tensorboard", "best.pth"):
        assert expected in output

    steps = -(-3 * TRAIN // BATCH)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["step"] for record in epochs] == [6, 11, steps]
    assert all(record["images"] == VAL for record in epochs)
    assert {"lr", "weight_decay", "grad_norm", "images_per_second", "data_wait", "memory_gib"} <= records[0].keys()
    summary = csv.DictReader((folder / "summary.csv").read_text().splitlines())
    assert [row["epoch"] for row in summary] == ["1", "2", "3"]

    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 10}).Reload().Tags()
    assert {"train/loss", "train/lr", "epoch/acc1", "epoch/acc5", "epoch/ema_acc1"} <= set(shown["scalars"])
    assert shown["images"] == ["first_batch"]

    saved = checkpoint(recipe)
    assert saved["class_names"] == ["blue", "green"]
    assert saved["state"]["images_seen"] == steps * BATCH
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "best.pth", "epoch_0001.pth", "epoch_0002.pth", "epoch_0003.pth", "last.pth",
    ]  # fmt: skip

    # The saved config continues the same run, which is complete.
    code = main(["--cfg", str(folder / "config.yaml")])
    assert code == 0
    assert_same(saved, checkpoint(recipe))

    # The best checkpoint evaluates to the metric that was logged.
    code, output = job("--eval", "--resume", str(folder / "checkpoints" / "best.pth"))
    assert code == 0, output
    best = checkpoint(recipe, name="best")["state"]["best_metric"]
    assert f"top-1 {best:.3f} %" in output
    assert f"{VAL} images" in output and "average of the weights" in output


def test_starting_a_complete_run_does_nothing(job, recipe: Path):
    assert job("--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")[0] == 0
    code, output = job("--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert code == 0 and "this run is complete: all 1 epochs are done" in output


@pytest.mark.slow  # tests/faults/kill.py tests the same without torchrun
def test_killed_run_resumes_to_the_same_bits(recipe: Path, images: Path):
    """Kills two ranks with two workers each in the middle of an epoch, and starts the same command again."""
    args = ["--opts", "SAVE_STEPS", "1", "PRINT_FREQ", "1", "DATA.NUM_WORKERS", "2"]
    through = command(recipe, images, "--tag", "through", *args, processes=2)
    subprocess.run(through, check=True, capture_output=True, cwd=REPO_ROOT, env=CPU_ONLY, timeout=280)

    killed = command(recipe, images, "--tag", "killed", *args, processes=2)
    lines = run_dir(recipe, "killed") / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(killed, cwd=REPO_ROOT, env=CPU_ONLY, **pipes) as running:
        for line in running.stdout:
            if "epoch 1.8" in line:  # 5 of 9 steps of 16 images, in the second epoch
                break
        kill_all(recipe)
    stopped_at = checkpoint(recipe, "killed")["state"]["images_seen"]
    assert 0 < stopped_at < 3 * TRAIN and stopped_at % TRAIN != 0

    again = subprocess.run(killed, check=True, capture_output=True, text=True, cwd=REPO_ROOT, env=CPU_ONLY, timeout=280)
    assert f"after {stopped_at} images" in again.stdout
    one, other = checkpoint(recipe, "through"), checkpoint(recipe, "killed")
    for contents in (one, other):
        contents.pop("config")  # contains the tag
    assert_same(one, other)
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 10))


def test_preempted_run_saves_at_once_and_resumes_to_the_same_bits(job, recipe: Path, monkeypatch):
    assert job("--tag", "through")[0] == 0
    train_steps = train_step.train_steps

    def signalling_steps(*args):
        for number, metrics in enumerate(train_steps(*args)):
            if number == 7:  # in the middle of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "train_steps", signalling_steps)
        code, output = job("--tag", "stopped")
    assert code == 0 and "stopped and saved after 64 images; the same command continues" in output
    assert checkpoint(recipe, "stopped")["state"]["images_seen"] == 64
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert job("--tag", "stopped")[0] == 0
    one, other = checkpoint(recipe, "through"), checkpoint(recipe, "stopped")
    assert_same({**one, "config": ""}, {**other, "config": ""})


def test_preempting_one_rank_stops_all_at_the_same_step(recipe: Path, images: Path):
    args = ["--tag", "asked", "--opts", "PRINT_FREQ", "1", "DATA.NUM_WORKERS", "2", "TRAIN.EPOCHS", "1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command(recipe, images, *args, processes=2), cwd=REPO_ROOT, env=CPU_ONLY, **pipes) as running:
        try:
            for line in running.stdout:
                if "epoch 2.1" in line:
                    os.kill(rank_1(recipe), signal.SIGUSR1)
                    break
            output = running.stdout.read()
        finally:
            kill_all(recipe)  # leaving the block waits for torchrun, even after this test's timeout
    assert running.returncode == 0, output
    assert "stopped and saved" in output
    assert 2 * TRAIN < checkpoint(recipe, "asked")["state"]["images_seen"] < 100 * TRAIN


def rank_1(recipe: Path) -> int:
    """Returns the process of rank 1: of those with its environment, the parent, which has the lowest id."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            cmdline, environ = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            if str(recipe).encode() in cmdline and b"\0RANK=1\0" in environ:
                pids.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return min(pids)


def test_two_ranks_train_and_evaluate_like_one(recipe: Path, images: Path, job):
    """Two ranks with half the batch make the steps of one with the whole batch, up to the order of sums."""
    one = job("--tag", "one", "--opts", "TRAIN.ACCUMULATION_STEPS", "2", "DATA.BATCH_SIZE", "4")
    assert one[0] == 0, one[1]
    args = ["--tag", "two", "--batch-size", "4"]
    two = command(recipe, images, *args, processes=2)
    subprocess.run(two, check=True, capture_output=True, cwd=REPO_ROOT, env=CPU_ONLY, timeout=280)
    a, b = checkpoint(recipe, "one"), checkpoint(recipe, "two")
    assert a["state"]["images_seen"] == b["state"]["images_seen"]
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], rtol=1e-3, atol=1e-4, msg=name)
    evaluate = ["--eval", "--resume", str(run_dir(recipe, "one") / "checkpoints" / "last.pth")]
    alone = job(*evaluate)[1]
    two = command(recipe, images, *evaluate, processes=2)
    together = subprocess.run(
        two, check=True, capture_output=True, text=True, cwd=REPO_ROOT, env=CPU_ONLY, timeout=280
    ).stdout
    results = [[line for line in output.splitlines() if "top-1" in line] for output in (alone, together)]
    assert len(results[0]) == 2 and results[0] == results[1]


def test_changed_config_in_the_same_folder_is_refused(job, recipe: Path):
    short = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    assert job(*short)[0] == 0
    code, output = job(*short, "TRAIN.BASE_LR", "0.05")
    assert (
        code == 2
        and "TRAIN.BASE_LR: 0.1 there, 0.05 now" in output
        and "--allow-config-change" in output
        and "--tag" in output
    )
    longer = ["--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0"]
    code, output = job("--allow-config-change", *longer)
    assert code == 0 and "TRAIN.EPOCHS: 1 there, 2 now" in output
    assert "the learning rate of the next step is 0.00067 instead of 7.81e-08" in output
    assert checkpoint(recipe)["state"]["images_seen"] == 2 * TRAIN
    code, output = job(*longer, "TRAIN.AUTO_RESUME", "False")
    assert code == 2 and "TRAIN.AUTO_RESUME is off" in output
    (run_dir(recipe) / "config.yaml").unlink()
    assert job(*longer, "SEED", "9")[0] == 2, "the config in the checkpoint is compared"
    code, output = job("--allow-config-change", *longer, "DATA.BATCH_SIZE", "14")
    assert code == 2 and "no whole number of steps at 14 images" in output
    assert job(*longer)[0] == 0, "a refused start has changed nothing"
    code, output = job("--allow-config-change", "--optim", "sgd", *longer)
    assert code == 2 and "its optimizer is AdamW, not SGD" in output


def test_val_freq_evaluates_every_second_epoch_and_the_last(job, recipe: Path, monkeypatch):
    """The training is the same, also if it is stopped at the end of an epoch that is not evaluated."""
    assert job("--tag", "always")[0] == 0
    code, output = job("--tag", "seldom", "--opts", "VAL_FREQ", "2")
    assert code == 0 and "best top-1" in output
    epochs = [record for record in read_records(run_dir(recipe, "seldom")) if record["kind"] == "epoch"]
    assert [(record["epoch"], "acc1" in record) for record in epochs] == [(1, False), (2, True), (3, True)]
    assert all("train_loss" in record for record in epochs)
    always, seldom = checkpoint(recipe, "always"), checkpoint(recipe, "seldom")
    for name in ("model", "optimizer", "ema"):
        assert_same(always[name], seldom[name])

    steps = train_step.train_steps

    def stop_at_the_end_of_epoch_1(*args):
        for metrics in steps(*args):
            if args[2].images_seen == 6 * BATCH:
                os.kill(os.getpid(), signal.SIGTERM)
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "train_steps", stop_at_the_end_of_epoch_1)
        assert job("--tag", "stopped", "--opts", "VAL_FREQ", "2")[0] == 0
    assert checkpoint(recipe, "stopped")["state"]["images_seen"] == 6 * BATCH
    assert job("--tag", "stopped", "--opts", "VAL_FREQ", "2")[0] == 0
    assert_same(seldom | {"config": ""}, checkpoint(recipe, "stopped") | {"config": ""})
    stopped = [record["epoch"] for record in read_records(run_dir(recipe, "stopped")) if record["kind"] == "epoch"]
    assert stopped == [1, 2, 3]


def test_log_file_contains_the_error_that_ended_the_run(job, recipe: Path):
    code, output = job("--opts", "TRAIN.BASE_LR", "1e30", "TRAIN.MAX_BAD_STEPS", "2")
    assert code == 3
    log = (run_dir(recipe) / "log.txt").read_text()
    assert "ERROR" in log and "steps in a row" in log and "epoch 0." in log


def test_explicit_resume_wins_over_the_folder(job, recipe: Path):
    assert job()[0] == 0
    first = run_dir(recipe) / "checkpoints" / "epoch_0001.pth"
    code, output = job("--resume", str(first))
    assert code == 0 and f"resumed from {first}, after 48 images" in output
    assert checkpoint(recipe)["state"]["images_seen"] == 17 * BATCH
    # The same command again continues from its own last checkpoint.
    code, output = job("--resume", str(first))
    assert code == 0 and "this run is complete" in output
    # In another folder too, but only with the configuration of the checkpoint.
    code, output = job("--resume", str(first), "--tag", "copy", "--opts", "SEED", "5")
    assert code == 2 and "SEED: 0 there, 5 now" in output
    assert not (run_dir(recipe, "copy") / "config.yaml").exists()


def test_fine_tuning_on_other_classes_and_another_window(job, recipe: Path, images: Path, tmp_path: Path):
    short = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    assert job("--opts", *short)[0] == 0
    weights = run_dir(recipe) / "checkpoints" / "last.pth"
    others = tmp_path / "others"
    for split in ("train", "val"):
        for name, shade in (("a", 20), ("b", 120), ("c", 220)):
            (others / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (36, 36), (shade, shade, i)).save(others / split / name / f"{i}.jpg")
    args = ["--tag", "tuned", "--pretrained", str(weights), "--opts", *short, "MODEL.SWIN.WINDOW_SIZE", "8"]
    code, output = job(*args, data=others)
    assert code == 0, output
    assert "bicubic" in output and "head.weight" in output and "other classes: starts from zeros" in output
    assert checkpoint(recipe, "tuned")["class_names"] == ["a", "b", "c"]
    code, output = job("--eval", "--pretrained", str(weights), data=others)
    assert code == 2 and "other classes" in output
    code, output = job("--tag", "new", "--resume", str(recipe), "--opts", *short)
    assert code == 2 and "not a readable checkpoint" in output


def test_weights_without_a_run_cannot_be_resumed(job, recipe: Path, tmp_path: Path):
    assert job("--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")[0] == 0
    torch.save({"model": checkpoint(recipe)["model"]}, tmp_path / "weights.pth")
    code, output = job("--tag", "other", "--resume", str(tmp_path / "weights.pth"))
    assert code == 2 and "no run to continue" in output and "--pretrained" in output
    code, output = job("--tag", "other", "--eval", "--resume", str(tmp_path / "weights.pth"))
    assert code == 0, output


def test_divergence_stops_the_run_and_saves_only_finite_weights(job, recipe: Path):
    code, output = job("--opts", "TRAIN.BASE_LR", "1e30", "TRAIN.MAX_BAD_STEPS", "2", "SAVE_STEPS", "1")
    assert code == 3, output
    assert "not finite" in output and "last good checkpoint" in output
    model = checkpoint(recipe)["model"]
    assert all(value.isfinite().all() for value in model.values())


def test_corrupt_image_is_named(job, recipe: Path, tmp_path: Path, images: Path):
    broken = tmp_path / "broken"
    for source in images.rglob("*.jpg"):
        target = broken / source.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (broken / "train" / "blue" / "3.jpg").write_bytes(b"not an image")
    code, output = job(data=broken)
    assert code == 2 and "blue/3.jpg" in output and "DATA.MAX_BAD_IMAGES" in output
    args = ["DATA.MAX_BAD_IMAGES", "5", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    code, output = job("--opts", *args, data=broken)
    assert code == 0 and "blue/3.jpg" in output


def test_throughput_needs_no_data(recipe: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    fast = functools.partial(throughput.images_per_second, seconds=0.05, runs=3)
    monkeypatch.setattr(throughput, "images_per_second", fast)
    assert main(["--cfg", str(recipe), "--throughput", "--batch-size", "2"]) == 0
    output = capfd.readouterr().out
    for expected in ("inference", "training", "images/s", "float32", "batch 2", "GiB"):
        assert expected in output
    assert not (recipe.parent / "logs").exists()


def test_user_errors_end_with_code_2_without_traceback(job, tmp_path: Path):
    for args, expected in (
        (["--eval"], "--resume FILE or --pretrained FILE"),
        (["--opts", "TRAIN.EPOCH", "3"], "TRAIN.EPOCHS"),
        (["--opts", "MODEL.NUM_CLASSES", "5"], "MODEL.NUM_CLASSES"),
        (["--eval", "--resume", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--data-path", str(tmp_path / "none")], "no folder"),
        (["--pretrained", "weights.pth", "--resume", "run.pth"], "one of --resume and --pretrained"),
    ):
        code, output = job(*args)
        assert code == 2 and expected in output and "Traceback" not in output, (args, output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp_dtype", ["auto", "bfloat16", "float16", "float32"])
def test_main_job_on_a_gpu(job, recipe: Path, amp_dtype: str):
    args = ["--tag", amp_dtype, "--opts", "AMP_ENABLE", "True", "AMP_DTYPE", amp_dtype, "TRAIN.EPOCHS", "20"]
    code, output = job(*args)
    assert code == 0 and "cuda" in (run_dir(recipe, amp_dtype) / "starts.jsonl").read_text()
    assert checkpoint(recipe, amp_dtype)["state"]["best_metric"] > 90, output
