"""The Triton kernels compiled ahead of time, without a GPU: that they compile, and the resources that they need."""

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
MODEL_DTYPE = ("qkv_ptr", "out_ptr", "grad_out_ptr", "grad_qkv_ptr")  # in the model's dtype; others are float32
FLOAT32 = ("bias_ptr", "scales_ptr", "grad_bias_ptr", "grad_scales_ptr", "stats_ptr")


def compile_kernel(
    kernel: str, capability: int, dtype: torch.dtype, window: int, head_dim: int, cosine: bool, shifted: bool
):
    """Compiles the kernel as `triton_attention.launch` does, for GPUs of `capability` 80 or 90."""
    function = getattr(triton_kernels, kernel)
    constants = triton_attention.constexprs(kernel, window, head_dim, shifted=shifted, cosine=cosine)
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | {"scale": "fp32"}
    types |= {name: NAMES[dtype] for name in MODEL_DTYPE} | dict.fromkeys(FLOAT32, "*fp32")
    signature = {name: types[name] for name in function.arg_names}
    aligned = [name for name in signature if signature[name][0] == "*" or name == "C"]  # to 16
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    tile = triton_attention.tile_config(kernel, window**2)
    return triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def resources(binary: bytes, path: Path) -> dict[str, int]:
    """Returns the resources of a compiled kernel: REG, registers per thread, and STACK, bytes spilled per thread."""
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", shown)}


def programs_that_fit(used: dict[str, int], shared: int, num_warps: int) -> int:
    """Returns how many programs a multiprocessor of capability 9.0 runs at the same time (CUDA's occupancy rules)."""
    registers = -(-used["REG"] // 8) * 8 * 32 * num_warps
    return min(65536 // registers, 228 * 1024 // (shared + 1024), 64 // num_warps)


def check(
    kernel: str, capability: int, window: int, head_dim: int, cosine: bool, dtype: torch.dtype, folder: Path,
    shifted: bool = True,
) -> None:  # fmt: skip
    binary = compile_kernel(kernel, capability, dtype, window, head_dim, cosine, shifted)
    used = resources(binary.asm["cubin"], folder / "kernel.cubin")
    assert binary.metadata.shared <= SHARED[capability]
    assert 0 < used["REG"] <= 255
    hopper = capability == 90 and window in (7, 8) and dtype != torch.float32  # its wgmma takes 64 rows at a time
    assert ("wgmma.mma_async" if hopper else "mma") in binary.asm["ptx"]
    if head_dim == 32 and dtype != torch.float32:
        assert used["STACK"] <= 128, used  # almost no registers are spilled
        if capability == 90 and (window, cosine) in ((7, False), (8, True), (12, False), (16, True)):  # of recipes
            fitting = programs_that_fit(used, binary.metadata.shared, binary.metadata.num_warps)
            assert fitting == triton_attention.resident_programs(kernel, window**2, shifted), used


@pytest.mark.parametrize(("kernel", "capability"), [("forward", 90), ("backward_queries", 80)])
def test_compiles_without_a_gpu(kernel: str, capability: int, tmp_path: Path):
    check(kernel, capability, 7, 32, False, torch.bfloat16, tmp_path)


def test_windows_inside_are_computed_without_a_mask():
    """Of the two loops of a shifted kernel, the first has about as many instructions as the loop without shift."""
    plain, shifted = (
        loop_lengths(compile_kernel("forward", 90, torch.bfloat16, 7, 32, False, shift).asm["ptx"])
        for shift in (False, True)
    )
    assert len(plain) == 1 and len(shifted) == 2
    assert shifted[0] < 1.1 * plain[0] and shifted[1] > 1.2 * plain[0]


def loop_lengths(ptx: str) -> list[int]:
    """Returns the number of lines of each loop: from a label to the last branch back to it."""
    lines = ptx.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L__BB\d+_\d+):", line))}
    branches = [
        (i, found[1]) for i, line in enumerate(lines) if (found := re.search(r"bra\S*\s+(\$L__BB\d+_\d+)", line))
    ]
    ends = {target: i for i, target in branches if labels[target] < i}
    return [end - labels[target] for target, end in sorted(ends.items(), key=lambda item: labels[item[0]])]


@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_maps_of_every_size_share_a_compiled_kernel(kernel: str):
    """Triton compiles a variant for an integer of 1 and for multiples of 16, unless told not to."""
    parameters = {parameter.name: parameter for parameter in getattr(triton_kernels, kernel).params}
    geometry = ("B", "rows", "columns", "shift_h", "shift_w")
    assert all(parameters[name].do_not_specialize for name in geometry)
    assert not parameters["C"].do_not_specialize  # a multiple of 16 lets it load 16 bytes at a time


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
@pytest.mark.parametrize(
    ("window", "head_dim", "dtype"),
    [
        *((window, 32, torch.bfloat16) for window in (4, 7, 8, 12, 16)),
        *((7, head_dim, torch.float16) for head_dim in (16, 24, 32, 48, 64)),
        (7, 32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_every_kernel_compiles(kernel, capability, window, head_dim, dtype, cosine, tmp_path):
    if kernel == "backward_keys" and window <= 8:
        pytest.skip("windows of up to 64 tokens need no second kernel")
    check(kernel, capability, window, head_dim, cosine, dtype, tmp_path)
