"""benchmarks/loader*.py: the command with and without images, what it measures, mistakes."""

import csv
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import jpegs, loader, loader_system
from benchmarks.loader_pipelines import RunningPipeline, count_equal_eval_images, cpu_seconds, own_eval, own_train
from tests._images import draw, encode

SMALL = ["--limit", "6", "--rounds", "1", "--batches", "1", "--batch-size", "2", "--workers", "1"]


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return jpegs.write_folder(tmp_path / "images", [encode(draw(i, (300, 280))) for i in range(4)])


def test_stages_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert loader.main([*SMALL, "--only", "stages", "--output", str(tmp_path)]) == 0
    assert "synthetic JPEGs (none were given), on average 500 × 375 pixels" in capsys.readouterr().out
    (written,) = tmp_path.glob("loader-*.csv")
    with open(written, newline="") as file:
        rows = list(csv.DictReader(file))
    stages = {(row["row"], row["column"]): row["value"] for row in rows if row["table"] == "stages"}
    assert {"Pillow", "torchvision", "timm (Pillow)"} <= set(stages.values())
    assert all(float(value) > 0 for (_, column), value in stages.items() if column == "ms an image")
    text = written.with_suffix(".md").read_text()
    assert "python" in text and "Hardware:" in text and "medians of 1 rounds" in text


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path):
    """The parts that are fast without a GPU, with images from a zip."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"{i}.JPEG", encode(draw(i, (320, 280))))
    words = ["--images", str(tmp_path / "images.zip"), "--only", "pipelines", "scaling", "memory", "start"]
    assert loader.main([*SMALL, *words, "--output", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("loader-*.md")
    text = written.read_text()
    assert "## Training" in text and "## Evaluation" in text and "## Scaling" in text and "1,281,167" in text
    assert "| 6 |" in text and "1,281,168" in text  # in the index
    assert "packed at 400 pixels" in text and "6 JPEGs of images.zip" in text


def test_evaluation_images_are_bitwise_equal_to_the_original(root: Path):
    equal, total = count_equal_eval_images(root)
    assert equal == total == 4


def test_pipelines_do_not_end(root: Path):
    with own_train(root, "auto")(2, 0) as batches:
        assert [len(next(batches)["target"]) for _ in range(5)] == [2] * 5
    with own_eval(root, "reference")(3, 0) as batches:
        targets = [label for _ in range(4) for label in next(batches)["target"].tolist()]
    assert targets == [0, 1, 2, 3] * 3


def test_cpu_seconds_agrees_with_process_time():
    before, clock = cpu_seconds(os.getpid()), time.process_time()
    sum(range(10**6))
    assert cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - clock, abs=0.01)


def test_turn_counts_cpu_time_of_worker_and_main_process(monkeypatch: pytest.MonkeyPatch):
    clock = {"worker": 10.0, "main": 1.0}

    def batches() -> Iterator[dict]:
        while True:
            clock["worker"] += 0.3
            clock["main"] += 0.1
            yield {}

    monkeypatch.setattr(RunningPipeline, "cpu_seconds_used", lambda self: clock["worker"])
    monkeypatch.setattr("benchmarks.loader_pipelines.time.process_time", lambda: clock["main"])
    assert RunningPipeline(batches(), 0).turn(5, 4) == pytest.approx(4 / (0.3 + 0.1))


def test_training_from_files_is_compared_with_one_batch(root: Path):
    """The GPU measurement, with a small model on the CPU."""
    small = ["DATA.BATCH_SIZE", 2, "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [1, 1, 1, 1],
             "MODEL.SWIN.NUM_HEADS", [1, 1, 1, 1], "AMP_ENABLE", False]  # fmt: skip
    backends = ["reference", "gpu"]
    table = loader_system.train_throughput(root, backends, 1, 1, *small)
    assert [row[0] for row in table.rows] == backends
    for row in table.rows:
        assert row[1] > 0 and row[2] > 0 and 0 <= row[3] < 1 and 0 <= row[4] < 1
    assert table.rows[0][5] is None and table.rows[1][5] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere.zip"], "--images nowhere.zip cannot be read"),
        (["--rounds", "0"], "--rounds: '0' is no number from 1"),
        (["--only", "nothing"], "invalid choice"),
        (["--image", "x"], "--image"),
    ],
)
def test_mistakes_end_with_code_2(capsys: pytest.CaptureFixture, words: list[str], message: str):
    assert loader.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_zip_without_valid_jpegs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, content, message in (("a.txt", b"", "has no JPEGs"), ("a.jpg", b"no image", "a.jpg: not an image")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr(name, content)
        assert loader.main(["--images", str(tmp_path / "x.zip")]) == 2
        assert message in capsys.readouterr().err
