"""The whole model as one graph: counted by torch._dynamo, with nothing left to Python; and what happens without a
compiler.
"""

import os
import subprocess
import sys

import pytest
import torch

from config import get_config
from engine.setup import compile_in_place, should_compile
from models.build import build_model
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.paths import REPO_ROOT

CPU = torch.device("cpu")
SHAPES = {"DEPTHS": [2], "NUM_HEADS": [2], "EMBED_DIM": 16}
WINDOWS = {"swin": 7, "swinv2": 4, "swin_mlp": 4}


def small(kind: str, **changes) -> torch.nn.Module:
    section = f"MODEL.{kind.upper()}"
    opts = ["MODEL.TYPE", kind, "DATA.IMG_SIZE", 56, "MODEL.NUM_CLASSES", 5, f"{section}.WINDOW_SIZE", WINDOWS[kind]]
    opts += [word for key, value in SHAPES.items() for word in (f"{section}.{key}", value)]
    return build_model(get_config(None, opts + [w for k, v in changes.items() for w in (k.replace("__", "."), v)]))


CASES = [
    ("swin", True, {"MODEL__DROP_PATH_RATE": 0.2}),
    ("swin", True, {"MODEL__DROP_PATH_RATE": 0.5, "MODEL__DROP_PATH_SKIP": True}),
    ("swin", True, {"TRAIN__USE_CHECKPOINT": True}),
    ("swin", False, {}),
    ("swinv2", True, {"TRAIN__USE_CHECKPOINT": True, "MODEL__DROP_PATH_RATE": 0.2}),
    ("swinv2", False, {}),
    ("swin_mlp", True, {"MODEL__DROP_PATH_RATE": 0.2}),
]


@pytest.mark.parametrize(("kind", "training", "changes"), CASES)
def test_no_graph_breaks(kind: str, training: bool, changes: dict):
    torch._dynamo.reset()
    model = small(kind, **changes).train(training)
    images = torch.randn(4, 3, 56, 56)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        counted = torch._dynamo.explain(model)(images)
    assert (counted.graph_count, counted.graph_break_count) == (1, 0), counted.break_reasons


def test_compiled_checkpointing_has_the_same_gradients():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = small("swin", MODEL__DROP_PATH_RATE=0.0)
    compiled = small("swin", MODEL__DROP_PATH_RATE=0.0, TRAIN__USE_CHECKPOINT=True)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    images = torch.randn(2, 3, 56, 56)
    for model in (plain, compiled):
        model.train()(images).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def test_one_graph_serves_every_step():
    """Training, evaluation and a last batch of another size: a graph each, and no more however often they come."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small("swin", MODEL__DROP_PATH_RATE=0.2)
    model.compile(backend=backend, dynamic=False, fullgraph=True)
    for _ in range(3):
        model.train()
        model(torch.randn(4, 3, 56, 56)).sum().backward()
        model.eval()
        for batch in (4, 3):
            with torch.inference_mode():
                model(torch.randn(batch, 3, 56, 56))
    assert len(graphs) == 3


def test_without_a_compiler_the_model_runs_as_it_is_and_says_so(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    model = torch.nn.Linear(3, 2)
    assert not compile_in_place(model, CPU)
    assert model._compiled_call_impl is None and model(torch.ones(1, 3)).shape == (1, 2)
    assert "TRAIN.COMPILE: nothing can be compiled here" in caplog.text and "No working C++ compiler" in caplog.text


@pytest.mark.slow
def test_throughput_without_a_compiler(tmp_path):
    """The real thing, with the compiler gone and nothing in the cache."""
    words = "main.py --cfg configs/demo.yaml --throughput --batch-size 2 --opts TRAIN.COMPILE True".split()
    hidden = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, *words], cwd=REPO_ROOT, capture_output=True, text=True, env=os.environ | hidden
    )
    assert ran.returncode == 0, ran.stderr
    assert "TRAIN.COMPILE: nothing can be compiled here" in ran.stdout + ran.stderr and "training" in ran.stdout


def test_cuda_graphs_without_a_gpu_have_no_effect_and_say_so(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    model = torch.nn.Linear(3, 2)
    assert compile_in_place(model, CPU, cuda_graphs=True)
    assert "TRAIN.CUDA_GRAPHS has no effect here" in caplog.text


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("TRAIN.CUDA_GRAPHS True", "TRAIN.CUDA_GRAPHS.*add TRAIN.COMPILE True"),
        ("TRAIN.CUDA_GRAPHS True TRAIN.COMPILE True TRAIN.ACCUMULATION_STEPS 2", "one of the two"),
        ("TRAIN.BF16_PARAMS True MODEL.TYPE timm MODEL.NAME resnet18", "TRAIN.BF16_PARAMS.*Leave it out"),
    ],
)
def test_keys_that_do_not_go_together(opts: str, message: str):
    with pytest.raises(UserError, match=message):
        get_config(None, opts.split())


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_training_on_a_gpu(cuda_graphs: bool):
    """Losses and gradients of three steps are those of the model that is not compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, compiled = (small("swin", MODEL__DROP_PATH_RATE=0.0).cuda() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    assert compile_in_place(compiled, torch.device("cuda"), cuda_graphs)
    for _ in range(3):
        images, found = torch.randn(4, 3, 56, 56, device="cuda"), []
        for model in (plain, compiled):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(images).float().square().mean()
            loss.backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            found.append((loss.item(), gradients.clone()))
            for parameter in model.parameters():
                parameter.grad = None
                parameter.data.mul_(0.99)
        assert found[1][0] == pytest.approx(found[0][0], rel=2e-2)
        assert (found[1][1] - found[0][1]).norm() < 5e-2 * found[0][1].norm()


@pytest.mark.parametrize(
    ("opts", "device", "compiled"),
    [
        ("", "cpu", False),
        ("", "cuda", True),
        ("EVAL_MODE True MODEL.PRETRAINED w.pth", "cuda", False),
        ("THROUGHPUT_MODE True", "cuda", True),
        ("TRAIN.COMPILE False", "cuda", False),
        ("TRAIN.COMPILE True", "cpu", True),
    ],
)
def test_auto_compiles_for_training_on_a_gpu(opts: str, device: str, compiled: bool):
    assert should_compile(get_config(None, opts.split()), DistInfo.single(torch.device(device))) is compiled


def test_auto_does_not_compile_with_fsdp():
    dist_info = DistInfo(rank=0, world_size=2, local_rank=0, local_world_size=2, device=torch.device("cuda"))
    assert not should_compile(get_config(None, ["TRAIN.PARALLEL", "fsdp"]), dist_info)
