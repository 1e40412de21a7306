"""The Triton kernels compiled ahead of time for GPUs that are not there: that they compile, and what they then need."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops import triton_attention, triton_kernels

NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have, by compute capability
OF_THE_DATA = ("qkv", "out", "gradient", "grad_qkv")  # in the model's type; all other tensors are float32
OF_FLOAT32 = ("bias", "scales", "grad_bias", "grad_scales", "statistics")


def compiled(kernel: str, capability: int, dtype: torch.dtype, window: int, width: int, masked: bool, cosine: bool):
    """The kernel as `triton_attention.launch` would have it compiled, for GPUs of `capability` 80 or 90."""
    function = getattr(triton_kernels, kernel)
    constants = triton_attention.constants(kernel, window, width, masked, cosine)
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | {"factor": "fp32"}
    types |= {name: NAMES[dtype] for name in OF_THE_DATA} | dict.fromkeys(OF_FLOAT32, "*fp32")
    signature = {name: types[name] for name in function.arg_names}
    aligned = [name for name in signature if signature[name][0] == "*" or name == "C"]  # to 16
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    cut = triton_attention.tiles(kernel, window**2)
    return triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": cut.warps, "num_stages": cut.stages},
    )


def resources(binary: bytes, path: Path) -> dict[str, int]:
    """What a program of a compiled kernel takes: REG for each thread, and STACK, bytes that found no register."""
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", shown)}


def check(kernel: str, capability: int, window: int, width: int, cosine: bool, dtype: torch.dtype, place: Path) -> None:
    made = compiled(kernel, capability, dtype, window, width, True, cosine)
    used = resources(made.asm["cubin"], place / "kernel.cubin")
    assert made.metadata.shared <= SHARED[capability]
    assert 0 < used["REG"] <= 255
    hopper = capability == 90 and window in (7, 8) and dtype != torch.float32  # its units take 64 rows at a time
    assert ("wgmma.mma_async" if hopper else "mma") in made.asm["ptx"]
    if width == 32 and dtype != torch.float32:
        assert used["STACK"] <= 128, used  # bytes of a thread that are spilled: next to nothing


@pytest.mark.parametrize(("kernel", "capability"), [("forward", 90), ("backward_queries", 80)])
def test_compiles_for_gpus_that_are_not_there(kernel: str, capability: int, tmp_path: Path):
    check(kernel, capability, 7, 32, False, torch.bfloat16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
@pytest.mark.parametrize(
    ("window", "width", "dtype"),
    [
        *((window, 32, torch.bfloat16) for window in (4, 7, 8, 12, 16)),
        *((7, width, torch.float16) for width in (16, 24, 32, 48, 64)),
        (7, 32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_every_kernel_compiles(kernel, capability, window, width, dtype, cosine, tmp_path):
    if kernel == "backward_keys" and window <= 8:
        pytest.skip("windows of up to 64 tokens need no second kernel")
    check(kernel, capability, window, width, cosine, dtype, tmp_path)
