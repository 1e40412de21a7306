"""What a step holds in memory and moves through it, counted without a GPU:

    python -m benchmarks.footprint                          Swin-T, here and by the peers, with gradients
    python -m benchmarks.footprint --models swin_base --batch-size 64

The model runs on tensors that have shapes and no contents, on a device that need not be there, under autocast to
bfloat16 as a GPU does it (norms and softmax in float32). Held: what the forward pass leaves for the backward pass.
Moved: what each operation reads and writes, as if no cache helped and nothing were fused: what eager PyTorch does.
"""

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
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
from utils.errors import UserError
from utils.table import Column, Table, circumstances

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CLASSES = 1000


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered: alive now, at most, and moved by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.moved: Counter[str] = Counter()
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # An operation whose result lies in what it read moved nothing, unless it wrote there.
        shared = {id(leaf.untyped_storage()) for leaf in read}
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if made and (writes or not all(id(leaf.untyped_storage()) in shared for leaf in made)):
            self.moved[func._schema.name] += sum(map(_bytes, [*read, *made]))
        for leaf in made:
            if id(leaf.untyped_storage()) not in shared:
                self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()
        if number in self._known:
            return

        def gone(_: weakref.ref) -> None:
            del self._known[number]
            self.live -= size

        self._known[number] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _bytes(tensor: torch.Tensor) -> int:
    """What there is to read of `tensor`: a repeated row is there once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class FusedAttention(TorchFunctionMode):
    """Has scaled_dot_product_attention taken for what PyTorch takes on a GPU where scores are added: its
    memory-efficient kernel, with the scores written out for every window and padded to rows of 8.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        added = kwargs.get("attn_mask")
        if added is not None:
            length = added.shape[-1]
            added = F.pad(added, (0, -length % 8))[..., :length].expand(*q.shape[:-1], k.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, added, True, kwargs.get("dropout_p", 0.0), False, scale=kwargs.get("scale"))[0]


def forward(model: nn.Module, batch_size: int, img_size: int) -> tuple[int, Counter[str]]:
    """Bytes that a training step's forward pass holds for the backward pass, and that each operation moves.

    Under a GPU's autocast to bfloat16; the casts of the weights are held too, the weights themselves not counted.
    """
    with FakeTensorMode():
        tensors = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=learnt)
            for values, learnt in ((model.named_buffers(), False), (model.named_parameters(), True))
            for name, value in values
        }
        images = torch.empty(batch_size, 3, img_size, img_size, device="cuda")
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for the GPU
        try:
            # The Triton kernels are counted as on a GPU that they run on: nobody can ask one here.
            with mock.patch.dict(ops.UNSUPPORTED_REASON, triton=lambda case: ""), Ledger() as ledger, FusedAttention():
                out = functional_call(model.train(), tensors, (images,))
            torch.clear_autocast_cache()
            held = ledger.live
            del out  # until here its graph held what is counted
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)
            torch.clear_autocast_cache()
    return held, ledger.moved


def make(
    models: Sequence[str], batch_size: int, variants: dict[str, list[str]], other_libraries: Sequence[str]
) -> Table:
    """A row for each variant of each recipe here, and for each library that has it."""
    columns = [
        Column("model"), Column("implementation"), Column("held, MB an image", ".1f"), Column("over the least", ".2f"),
        Column("moved, MB an image", ".0f"), Column("most moved by"),
    ]  # fmt: skip
    table = Table("footprint", "What the forward pass of a training step holds and moves, counted", columns)
    for name in models:
        path = CONFIGS / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"--models {name}: there is no configs/{name}.yaml; ls configs/ shows what there is")
        config = get_config(path)
        built = {variant: build_model(get_config(path, opts), CLASSES) for variant, opts in variants.items()}
        built |= {library: build_with(library, architecture_of(config, CLASSES)) for library in other_libraries}
        counted = {
            key: forward(Logits(model), batch_size, config.DATA.IMG_SIZE) for key, model in built.items() if model
        }
        least = min((held for key, (held, _) in counted.items() if key in other_libraries), default=None)
        for key, (held, moved) in counted.items():
            most = [f"{what.rpartition(':')[2]} {size / batch_size / 1e6:.0f}" for what, size in moved.most_common(6)]
            held, total = held / batch_size / 1e6, sum(moved.values()) / batch_size / 1e6
            table.rows.append([name, key, held, least and held * batch_size * 1e6 / least, total, ", ".join(most)])
    table.notes.append(f"Counted for {batch_size} images at a time, bfloat16 as a GPU's autocast does it, no compiler.")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["swin_tiny"], metavar="RECIPE", help="of configs/ (swin_tiny)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME KEY VALUE")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write footprint.md and .csv too")
    args = parser.parse_args(argv)
    try:
        variants = {"here": []} | {f"here {name}": opts for name, *opts in args.variant}
        table = make(args.models, args.batch_size, variants, args.other_libraries)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table.notes += circumstances()
    print(table.terminal())
    if args.output:
        table.save(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
