"""Counts, without a GPU, the memory that a training step's forward pass holds and the bytes that it moves:

    python -m benchmarks.footprint                          Swin-T, here and in other libraries, with gradients
    python -m benchmarks.footprint --models swin_base --batch-size 64

The model runs on fake tensors, which have shapes but no contents, on a device that need not exist, under autocast to
bfloat16 as on a GPU (norms and softmax in float32). Held: what the forward pass saves for the backward pass. Moved:
what each operation reads and writes, without caches and fusion, as in eager PyTorch.
"""

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import get_config
from models.build import architecture_of, build_model
from models.ops import dispatch as ops
from models.other_libraries import LIBRARIES, Logits, build_with
from utils.cli import CliParser, number, run_cli, user_path
from utils.errors import UserError
from utils.paths import REPO_ROOT
from utils.table import Column, Table, circumstances

CLASSES = 1000


class MemoryTracker(TorchDispatchMode):
    """Counts bytes of the tensors created inside the context.

    Attributes:
        live: bytes alive now.
        peak: the maximum of `live`.
        moved: bytes read and written, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.moved: Counter[str] = Counter()
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A view shares its input's storage: nothing moved, unless the operation wrote there.
        input_storages = {id(leaf.untyped_storage()) for leaf in inputs}
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if outputs and (writes or not all(id(leaf.untyped_storage()) in input_storages for leaf in outputs)):
            self.moved[func._schema.name] += sum(map(_num_bytes, [*inputs, *outputs]))
        for leaf in outputs:
            if id(leaf.untyped_storage()) not in input_storages:
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def on_free(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, on_free)
        self.live += size
        self.peak = max(self.peak, self.live)


def _num_bytes(tensor: torch.Tensor) -> int:
    """The distinct bytes of `tensor`: an expanded row counts once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class EfficientAttentionMode(TorchFunctionMode):
    """Replaces scaled_dot_product_attention with the kernel that PyTorch selects on a GPU if there is a bias: the
    memory-efficient one, with the bias materialised for every window and padded to rows of 8.
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        bias = kwargs.get("attn_mask")
        if bias is not None:
            length = bias.shape[-1]
            bias = F.pad(bias, (0, -length % 8))[..., :length].expand(*q.shape[:-1], k.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, kwargs.get("dropout_p", 0.0), False, scale=kwargs.get("scale"))[0]


def count_forward(model: nn.Module, batch_size: int, img_size: int) -> tuple[int, Counter[str]]:
    """Bytes that a training step's forward pass saves for the backward pass, and that each operation moves.

    Under a GPU's autocast to bfloat16; the casts of the weights are counted as held, the weights themselves are not.
    """
    with FakeTensorMode():
        tensors = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=requires_grad)
            for values, requires_grad in ((model.named_buffers(), False), (model.named_parameters(), True))
            for name, value in values
        }
        images = torch.empty(batch_size, 3, img_size, img_size, device="cuda")
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for the GPU
        try:
            # The Triton kernels are counted as if a GPU supported them: there is none here to ask.
            supported = mock.patch.dict(ops.UNSUPPORTED_REASON, triton=lambda spec: "")
            with supported, MemoryTracker() as tracker, EfficientAttentionMode():
                out = functional_call(model.train(), tensors, (images,))
            torch.clear_autocast_cache()
            held = tracker.live
            del out  # its autograd graph holds what is counted
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)
            torch.clear_autocast_cache()
    return held, tracker.moved


def make_table(
    models: Sequence[str], batch_size: int, variants: Mapping[str, Sequence[str]], libraries: Sequence[str]
) -> Table:
    """A row for each variant of each recipe here, and for each library that has the model."""
    columns = [
        Column("model"), Column("implementation"), Column("held, MB an image", ".1f"), Column("over the least", ".2f"),
        Column("moved, MB an image", ".0f"), Column("most moved by"),
    ]  # fmt: skip
    table = Table("footprint", "What the forward pass of a training step holds and moves, counted", columns)
    for name in models:
        path = REPO_ROOT / "configs" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"--models {name}: there is no configs/{name}.yaml; ls configs/ lists the recipes")
        config = get_config(path)
        built: dict[str, nn.Module | None] = {
            variant: build_model(get_config(path, opts), CLASSES) for variant, opts in variants.items()
        }
        built |= {library: build_with(library, architecture_of(config, CLASSES)) for library in libraries}
        counts = {
            key: count_forward(Logits(model), batch_size, config.DATA.IMG_SIZE) for key, model in built.items() if model
        }
        least = min((held for key, (held, _) in counts.items() if key in libraries), default=None)
        megabytes = batch_size * 1e6
        for key, (held, moved) in counts.items():
            top = [f"{op.rpartition(':')[2]} {size / megabytes:.0f}" for op, size in moved.most_common(6)]
            total = sum(moved.values()) / megabytes
            table.rows.append([name, key, held / megabytes, least and held / least, total, ", ".join(top)])
    table.notes.append(f"Counted for {batch_size} images at a time, bfloat16 as a GPU's autocast does it, no compiler.")
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = CliParser(
        prog="python -m benchmarks.footprint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["swin_tiny"], metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument(
        "--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help="images at a time (64)"
    )
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME KEY VALUE")
    parser.add_argument("--output", type=user_path, metavar="DIR", help="also write footprint.md and .csv there")
    return parser


def run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    variants = {"here": []} | {f"here {name}": opts for name, *opts in args.variant}
    table = make_table(args.models, args.batch_size, variants, args.libraries)
    table.notes += circumstances()
    print(table.terminal())
    if args.output:
        table.save(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
