"""The position bias gathered from a table, and its gradient, against plain indexing."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from models.ops.position_bias import GatherBias, pairs_by_offset, relative_position_index


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_relative_position_index(window: int):
    index = relative_position_index(window)
    positions = list(itertools.product(range(window), repeat=2))
    for (n, (i, j)), (m, (y, x)) in itertools.product(enumerate(positions), repeat=2):
        assert index[n, m] == (i - y + window - 1) * (2 * window - 1) + (j - x + window - 1)


def gather(table: Tensor, window: int) -> Tensor:
    return GatherBias.apply(table, relative_position_index(window), pairs_by_offset(window))


def gather_plainly(table: Tensor, window: int) -> Tensor:
    index = relative_position_index(window)
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()


def table_and_gradient(window: int, num_heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * window - 1) ** 2, num_heads, generator=generator, dtype=dtype)
    return table.requires_grad_(), torch.randn(num_heads, window**2, window**2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_pairs_by_offset_inverts_the_index(window: int):
    index, pairs = relative_position_index(window).flatten(), pairs_by_offset(window)
    for offset, row in enumerate(pairs):
        assert torch.equal(row[row < window**4].long(), (index == offset).nonzero()[:, 0])


@pytest.mark.parametrize(("window", "num_heads"), [(1, 3), (2, 2), (7, 3), (7, 24), (12, 4)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_same_bits_as_plain_indexing_with_one_thread(window: int, num_heads: int, num_threads: int):
    """With several threads, plain indexing may add in any order."""
    table, gradient = table_and_gradient(window, num_heads)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = gather_plainly(table, window)
        (expected_gradient,) = torch.autograd.grad(expected, table, gradient)
        torch.set_num_threads(num_threads)
        bias = gather(table, window)
        assert torch.equal(bias, expected) and bias.is_contiguous()
        for _ in range(3):
            assert torch.equal(torch.autograd.grad(gather(table, window), table, gradient)[0], expected_gradient)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_over_the_list_equal_plain_indexing(dtype: torch.dtype, monkeypatch):
    """The way of a GPU and of compiled code. Here its order of summation differs from plain indexing."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    table, gradient = table_and_gradient(7, 3, dtype)
    exact, exact_gradient = table.detach().double().requires_grad_(), gradient.double()
    (expected,) = torch.autograd.grad(gather_plainly(exact, 7), exact, exact_gradient)
    (actual,) = torch.autograd.grad(gather(table, 7), table, gradient)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert actual.dtype == dtype
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize("compiling", [False, True])
def test_gradcheck(compiling: bool, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    table, _ = table_and_gradient(3, 2, torch.float64)
    assert torch.autograd.gradcheck(functools.partial(gather, window=3), table)
    assert torch.autograd.gradgradcheck(functools.partial(gather, window=3), table)


def test_compiled_gradient_has_no_scatter():
    table, gradient = table_and_gradient(4, 2)
    operators: set[str] = set()

    def note_operators(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    backend = aot_autograd(fw_compiler=note_operators, bw_compiler=note_operators)
    compiled = torch.compile(GatherBias.apply, fullgraph=True, backend=backend)
    bias = compiled(table, relative_position_index(4), pairs_by_offset(4))
    (actual,) = torch.autograd.grad(bias, table, gradient)
    assert torch.equal(bias, gather_plainly(table, 4))
    torch.testing.assert_close(actual, torch.autograd.grad(gather_plainly(table, 4), table, gradient)[0])
    assert {"aten.index.Tensor", "aten.index_select.default"} <= operators
    assert not [name for name in operators if "index_put" in name or "index_add" in name or "scatter" in name]
