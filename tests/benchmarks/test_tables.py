"""benchmarks/: other ways to attend are what they say, tables say what was counted and measured, main.py is run."""

import copy
import csv
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ablations, architecture, paper, peers, runs, tables, timing
from benchmarks.attention import (
    WAYS,
    PaddedWindows,
    PerformerAttention,
    SlidingWindowAttention,
    attend,
    orthogonal_directions,
)
from benchmarks.speed import StageAttention
from benchmarks.timing import Stopwatch, interleaved
from config import get_config
from models.attention import WindowAttention
from models.build import build_model
from models.ops.window import ShiftedWindows
from tests._images import write_splits
from tests._swin import small, spread
from utils.errors import UserError
from utils.table import Column, Table

# Ways to attend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 48), (44, 60), (16, 48), (31, 50)])
@pytest.mark.parametrize("window", [4, 5])
def test_padding_is_the_same_function_as_the_cyclic_shift(size, window):
    model = spread(small(img_size=48, window_size=window)).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attend(copy.deepcopy(model), "shifted window (cyclic)")(images)
        assert torch.equal(expected, model(images))
        found = attend(copy.deepcopy(model), "shifted window (padding)")(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_padding_costs_a_window_more_along_each_axis():
    x = torch.randn(1, 56, 56, 2)
    cyclic, padded = ShiftedWindows((56, 56), 7, shifted=True), PaddedWindows((56, 56), 7, shifted=True)
    assert (cyclic.split(x)[0].shape[1:3], padded.split(x)[0].shape[1:3]) == ((8, 8), (9, 9))
    assert (cyclic.columns(56), padded.columns(56)) == (8, 9)
    assert torch.equal(padded.join(padded.split(x)[0], 56, 56), x)
    assert padded.margins(56, 56) == ((4, 3), (4, 3))
    unshifted = PaddedWindows((56, 56), 7, shifted=False)
    assert unshifted.split(x)[1] is None and unshifted.split(x)[0].shape[1:3] == (8, 8)


def test_without_shift_is_the_ablation_of_that_name():
    model, ablation = spread(small()).eval(), small(shift=False).eval()
    ablation.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(attend(model, "window (w/o shifting)")(images), ablation(images))


def slide_by_hand(attention: WindowAttention, x: Tensor) -> Tensor:
    """One map (H, W, C), token by token: those at most half a window away, as far as there are any."""
    height, width, dim = x.shape
    window = attention.windows.window
    q, k, v = attention.qkv(x).split(dim, dim=-1)
    out = torch.empty_like(x)
    reach = range(-(window // 2), window - window // 2)
    for i, j in itertools.product(range(height), range(width)):
        around = [(i + a, j + b) for a in reach for b in reach if 0 <= i + a < height and 0 <= j + b < width]
        rows, columns = torch.tensor(around).unbind(1)
        places = (i - rows + window - 1) * (2 * window - 1) + (j - columns + window - 1)
        for h, part in enumerate(torch.arange(dim).chunk(attention.num_heads)):
            scores = k[rows, columns][:, part] @ q[i, j, part] / math.sqrt(len(part))
            scores = scores + attention.relative_position_bias_table[places, h]
            out[i, j, part] = scores.softmax(0) @ v[rows, columns][:, part]
    return attention.proj(out)


@pytest.mark.parametrize("window", [3, 4, 7])
def test_sliding_window_by_hand(window):
    attention = spread(WindowAttention(8, 2, (9, 8), window, shifted=True))
    x = torch.randn(2, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack([slide_by_hand(attention, one) for one in x])
        torch.testing.assert_close(SlidingWindowAttention(attention)(x), expected, atol=1e-5, rtol=0)


def test_performer_approaches_softmax_attention_over_the_whole_map():
    attention = spread(WindowAttention(16, 2, (6, 6), 3, shifted=True))
    x = 0.5 * torch.randn(2, 6, 6, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        q, k, v = attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        exact = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1) @ v
        exact = attention.proj(exact.transpose(1, 2).flatten(2).unflatten(1, (6, 6)))
        errors = [
            ((PerformerAttention(attention, features)(x) - exact).norm() / exact.norm()).item()
            for features in (8, 512, 32768)
        ]
    assert errors[2] < 0.015 < errors[1] < 0.1 < 0.2 < errors[0]  # attention alike to all tokens would be 0.24 off


def test_performer_features_are_as_many_as_stated_and_orthogonal():
    assert PerformerAttention(WindowAttention(96, 3, (14, 14), 7, False)).directions.shape == (110, 32)
    directions = orthogonal_directions(16 * 400, 16)
    block = directions[16:32]
    assert torch.allclose(block @ block.T, torch.diag(block.square().sum(1)), atol=1e-4)
    # No direction is preferred: the mean of 6,400 standard normal vectors, four standard errors.
    assert directions.mean(0).abs().max() < 4 / 80 and abs(directions.square().mean() - 1) < 0.02


def test_every_row_but_the_unreleased_kernel_is_there_and_keeps_the_parameters():
    assert set(WAYS) == set(paper.TABLE5) - {"sliding window (kernel)"}
    for way in WAYS:
        model = small()
        names = {name: id(parameter) for name, parameter in model.named_parameters()}
        kept = {name: id(parameter) for name, parameter in attend(model, way).named_parameters()}
        lost = {name for name in names if "relative_position_bias_table" in name} if way == "Performer" else set()
        assert kept == {name: names[name] for name in names if name not in lost}


def test_a_stage_alone_is_the_attention_of_its_blocks():
    model = small()
    stage = StageAttention(model, 2)
    assert stage.shape == (4, 4, 32)
    x = torch.randn(1, *stage.shape)
    assert torch.equal(stage(x), model.layers[1].blocks[1].attn(model.layers[1].blocks[0].attn(x)))


# Measuring and showing -----------------------------------------------------------------------------------------------


def test_turns_are_interleaved_and_the_median_counts(monkeypatch):
    turns, rates = [], iter([10.0, 1.0, 30.0, 3.0, 20.0, 2.0])
    monkeypatch.setattr(timing.engine, "measure", lambda step, *rest, **more: (turns.append(step()), next(rates))[1])
    builders = {"a": lambda: lambda: "a", "b": lambda: lambda: "b"}
    assert interleaved(builders, 1, torch.device("cpu"), 0.1, rounds=3) == {"a": 20.0, "b": 2.0}
    assert turns == ["a", "b"] * 3


def test_what_does_not_fit_is_left_out():
    def too_large() -> None:
        raise torch.OutOfMemoryError("no room")

    rates = interleaved({"large": too_large, "small": lambda: lambda: None}, 4, torch.device("cpu"), 1e-4, rounds=2)
    assert rates["large"] is None and rates["small"] > 0


def test_a_measured_step_is_inference_in_the_format_asked_for():
    watch = Stopwatch.on("cpu", 2, 0.1, 1, "bfloat16")
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    assert watch.step(model, 4)().dtype == torch.bfloat16 and not model.training
    assert watch.slug == "cpu" and "bfloat16, 2 images at a time" in watch.notes[0]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            Stopwatch.on("cuda", 2, 0.1, 1, "float32")


def test_a_table_in_its_three_forms(tmp_path):
    columns = [Column("name"), Column("value", ".1f"), Column("count", ",d")]
    table = Table("t", "Title", columns, [["a|b", 1.25, 1000], ["c", None, 7]], ["Note."])
    assert table.terminal().splitlines() == [
        "Title",
        "",
        "name  value  count",
        "----  -----  -----",
        "a|b     1.2  1,000",
        "c         –      7",
        "",
        "Note.",
    ]
    assert "| a\\|b | 1.2 | 1,000 |" in table.markdown() and "| --- | ---: | ---: |" in table.markdown()
    markdown, values = table.save(tmp_path / "new")
    assert markdown.read_text() == table.markdown()
    assert list(csv.reader(values.open())) == [["name", "value", "count"], ["a|b", "1.25", "1000"], ["c", "", "7"]]


# The tables ----------------------------------------------------------------------------------------------------------


def test_table_1_counts_what_the_paper_counted():
    table = peers.make(["Swin-T", "RegNetY-4G", "DeiT-S"], "cpu", 1, 1, 1, "float32", True, "", "", [])
    rows = {row[0]: dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows}
    assert list(rows) == ["RegNetY-4G", "DeiT-S", "Swin-T"]
    for row in rows.values():
        assert row["parameters, M"] == pytest.approx(row["parameters, M (paper)"], abs=0.75)
        assert row["multiply-adds, G"] == pytest.approx(row["multiply-adds, G (paper)"], abs=0.051)
        assert row["images/s here"] is None and row["top-1, % here"] is None
    assert rows["Swin-T"]["parameters, M"] == 28.288354


@pytest.mark.slow
def test_all_of_table_1_counts_what_the_paper_counted():
    """Within 1 % but for EfficientNet-B4 and B5, which the paper rounds down by 5 %."""
    for row in peers.make([], "cpu", 1, 1, 1, "float32", True, "", "", []).rows:
        tolerance = 0.05 if row[0] in ("EffNet-B4", "EffNet-B5") else 0.021
        assert row[5] == pytest.approx(row[4], rel=0.03), row
        assert row[7] == pytest.approx(row[6], rel=tolerance), row


def test_rows_with_other_weights_share_a_network():
    by_name = {(peer.name, peer.pretrained, peer.pixels): peers.configuration(peer) for peer in paper.TABLE1}
    networks = {key: peers.network_of(config) for key, config in by_name.items()}
    assert networks["Swin-B", "", 384] == networks["Swin-B", "22K", 384] != networks["Swin-B", "", 224]
    assert networks["ViT-B/16", "", 384] == networks["ViT-B/16", "22K", 384] != networks["DeiT-B", "", 384]
    assert len(set(networks.values())) == 20


def test_weights_of_a_row(tmp_path):
    swin, regnet = (next(peer for peer in paper.TABLE1 if peer.name == name) for name in ("Swin-T", "RegNetY-4G"))
    assert peers.weight_file(swin, "") == swin.weights == "swin_tiny_patch4_window7_224"
    assert peers.weight_file(regnet, str(tmp_path)) is None
    (tmp_path / "regnety_040.safetensors").touch()
    (tmp_path / f"{swin.weights}.pth").touch()
    assert peers.weight_file(regnet, str(tmp_path)) == str(tmp_path / "regnety_040.safetensors")
    assert peers.weight_file(swin, str(tmp_path)) == str(tmp_path / f"{swin.weights}.pth")


def test_table_4_varies_one_thing_in_each_row():
    table = ablations.make([], "", [], "configs/swin_tiny.yaml", 1, "nowhere")
    parameters = {row[0]: row[2] for row in table.rows}
    default = parameters["rel. pos."]
    assert parameters["w/o shifting"] == parameters["shifted windows"] == default == 28.288354
    tables_of_bias = (2 * 7 - 1) ** 2 * sum(n * h for n, h in zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)) / 1e6
    positions = 56 * 56 * 96 / 1e6
    assert parameters["no pos."] == pytest.approx(default - tables_of_bias)
    assert parameters["abs. pos."] == pytest.approx(default - tables_of_bias + positions)
    assert parameters["abs.+rel. pos."] == pytest.approx(default + positions)
    dims = (96, 192, 384, 768)
    queries_and_keys = sum(n * 2 * (c * c + c) for n, c in zip((2, 2, 6, 2), dims, strict=True)) / 1e6
    assert parameters["rel. pos. w/o app."] == pytest.approx(default - queries_and_keys)
    config = get_config(None, list(paper.TABLE4[0].opts))
    assert not any(b.attn.windows.shift for layer in build_model(config).layers for b in layer.blocks)
    assert {row.name: ablations.tag(row) for row in paper.TABLE4} == {
        "w/o shifting": "table4_no_shift", "shifted windows": "table4", "no pos.": "table4_none",
        "abs. pos.": "table4_abs", "abs.+rel. pos.": "table4_abs_rel", "rel. pos. w/o app.": "table4_rel_no_app",
        "rel. pos.": "table4",
    }  # fmt: skip


def test_table_4_trains_by_main_and_shows_the_last_epoch(monkeypatch, tmp_path):
    calls = []

    def train(arguments, processes):
        calls.append((arguments, processes))
        folder = tmp_path / "swin_tiny_patch4_window7_224" / "table4_none"
        folder.mkdir(parents=True)
        records = [{"kind": "epoch", "epoch": e, "acc1": 70.0 + e, "acc5": 90.0 + e} for e in (1, 2)]
        records.append({"kind": "train", "loss": 1.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(ablations.runs, "run_main", train)
    recipe = "configs/swin_tiny.yaml"
    (row,) = ablations.make(["no pos."], "data", ["TRAIN.EPOCHS", "25"], recipe, 8, str(tmp_path)).rows
    assert calls == [
        (["--cfg", recipe, "--data-path", "data", "--output", str(tmp_path), "--tag", "table4_none",
          "--opts", "MODEL.SWIN.POSITION", "none", "TRAIN.EPOCHS", "25"], 8)
    ]  # fmt: skip
    assert row[4:] == [80.1, 72.0, 94.9, 92.0, 2]


def test_table_5_measures_stages_and_networks(tmp_path, capsys):
    ways = ["window (w/o shifting)", "sliding window (kernel)"]
    options = ["--only", *ways, "--models", "T", "--batch-size", "1", "--seconds", "1e-3", "--rounds", "1"]
    assert tables.main(["5", *options, "--device", "cpu", "--output", str(tmp_path)]) == 0
    kernel, window = csv.DictReader((tmp_path / "table5_cpu.csv").open())
    assert (kernel["attention"], kernel["S1 (paper)"], kernel["Swin-B, images/s (paper)"]) == (ways[1], "7.6", "187")
    measured = [f"S{stage}, ms per 1 images" for stage in (1, 2, 3, 4)] + ["Swin-T, images/s here"]
    assert all(float(window[name]) > 0 for name in measured) and not any(kernel[name] for name in measured)
    assert window["Swin-B, images/s here"] == ""
    text = (tmp_path / "table5_cpu.md").read_text()
    assert "Hardware: " in text and "torch " in text and "Command: `python " in text
    assert "Table 5: speed of attention" in capsys.readouterr().out


def test_table_7_is_read_off_the_models(monkeypatch):
    assert [row[-1] for row in architecture.make().rows] == ["yes"] * 4
    wrong = {**paper.TABLE7, "Swin-T": ("swin_small", paper.TABLE7["Swin-T"][1])}
    monkeypatch.setattr(architecture, "TABLE7", wrong)
    assert [row[-1] for row in architecture.make().rows] == ["yes", "yes", "NO", "yes"]


def test_mistakes_are_answered_in_a_sentence(capsys, monkeypatch, tmp_path):
    assert tables.main(["4", "--cfg", str(tmp_path / "missing.yaml"), "--output", ""]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        tables.main(["3"])


# main.py as a process ------------------------------------------------------------------------------------------------


def test_accuracy_by_main(tmp_path):
    """A model whose bias alone decides gets the images of one class right: three of four."""
    data = write_splits(tmp_path / "data", {"a": 1, "b": 1}, {"a": 1, "b": 3})
    small_swin = ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [1], "MODEL.SWIN.NUM_HEADS", [1]]
    loading = ["DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 0, "MODEL.NUM_CLASSES", 0]
    config = get_config(None, [*small_swin, *loading])
    model = build_model(config, 2)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 1.0])
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    assert runs.accuracy(config, str(tmp_path / "weights.pth"), str(data), ["DATA.BATCH_SIZE", "2"]) == 75.0
    with pytest.raises(UserError, match="(?s)--pretrained missing.pth failed:\n.*missing.pth: no such file"):
        runs.accuracy(config, "missing.pth", str(data), [])


def test_several_processes_are_started_by_torchrun(monkeypatch):
    started = []

    class Started:
        def __init__(self, command, **options):
            started.append(command)
            self.stdout, self.returncode = iter(["done\n"]), 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(runs.subprocess, "Popen", Started)
    assert runs.run_main(["--cfg", "a.yaml"], processes=8) == "done\n"
    assert started[0][:5] == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"
    ]  # fmt: skip
    assert Path(started[0][5]).name == "main.py" and started[0][6:] == ["--cfg", "a.yaml"]
