"""DropPath that computes only what it keeps, the patch embedding as a matrix product, checkpointing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from config import get_config
from models.build import build_model
from models.layers import DropPath, GeluLinearRecompute, Mlp, PatchEmbed
from models.swin_transformer import SwinTransformer


def test_skipping_has_the_expectation_of_not_skipping():
    """Over many draws the mean is x + branch(x), whichever samples are kept; and each draw keeps as many."""
    torch.manual_seed(0)
    x = torch.randn(10, 4, dtype=torch.float64)
    drop = DropPath(0.3, skip=True).train()
    total, seen = torch.zeros_like(x), set()
    for _ in range(1000):
        out = drop(x, lambda kept: seen.add(len(kept)) or kept.sin())
        changed = (out != x).any(1)
        assert changed.sum() == 7
        torch.testing.assert_close(out[changed], (x + x.sin() * 10 / 7)[changed])
        total += out
    assert seen == {7}
    # Each sample's branch is scaled by 10/7 with probability 0.7: a standard deviation of 0.0207 · |sin x| in the mean.
    torch.testing.assert_close(total / 1000, x + x.sin(), atol=0.1, rtol=0)


@pytest.mark.parametrize("case", [(8, 0.2, 6), (8, 0.05, 8), (1, 0.9, 1), (2, 0.9, 1), (128, 0.1, 115)])
def test_how_many_are_kept(case: tuple[int, float, int]):
    batch, rate, kept = case
    assert DropPath(rate, skip=True).num_kept(batch) == kept


def test_gradients_reach_the_kept_alone():
    torch.manual_seed(1)
    x = torch.randn(8, 3, requires_grad=True)
    linear = nn.Linear(3, 3)
    out = DropPath(0.5, skip=True)(x, linear)
    kept = (out != x).any(1)
    out.sum().backward()
    scaled = x.detach().clone().requires_grad_()
    (scaled[kept] + 2 * linear(scaled[kept])).sum().backward()
    torch.testing.assert_close(x.grad[kept], scaled.grad[kept])
    assert torch.equal(x.grad[~kept], torch.ones(4, 3))


def test_types_widen_as_in_a_sum():
    x = torch.ones(4, 2, dtype=torch.bfloat16)
    assert DropPath(0.5, skip=True)(x, lambda kept: kept.float()).dtype == torch.float32
    assert DropPath(0.5, skip=True)(x.float(), lambda kept: kept.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["swin", "swinv2", "swin_mlp"])
def test_the_key_reaches_every_block_and_evaluation_is_untouched(kind: str):
    section = f"MODEL.{kind.upper()}"
    opts = ["MODEL.TYPE", kind, "MODEL.DROP_PATH_RATE", 0.5, f"{section}.DEPTHS", [2], f"{section}.NUM_HEADS", [2]]
    opts += [f"{section}.EMBED_DIM", 8, f"{section}.WINDOW_SIZE", 4, "DATA.IMG_SIZE", 32, "MODEL.NUM_CLASSES", 5]
    torch.manual_seed(0)
    plain, skipping = (build_model(get_config(None, [*opts, "MODEL.DROP_PATH_SKIP", skip])) for skip in (False, True))
    skipping.load_state_dict(plain.state_dict())
    assert [m.skip for m in skipping.modules() if isinstance(m, DropPath)] == [True, True]
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain.eval()(images), skipping.eval()(images))
    calls = []
    for block in skipping.layers[0].blocks:
        block.mlp.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    skipping.train()(images).sum().backward()
    assert calls == [4, 2]


@pytest.mark.parametrize("size", [(24, 16), (21, 18)])
def test_patch_embedding_is_the_convolution(size: tuple[int, int]):
    torch.manual_seed(0)
    embed = PatchEmbed(4, 3, 10, norm=False).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
    torch.testing.assert_close(embed(images), embed.proj(padded).permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


def test_linear_of_gelu_has_its_gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.testing.assert_close(GeluLinearRecompute.apply(*inputs), F.linear(F.gelu(inputs[0]), *inputs[1:]))
    assert torch.autograd.gradcheck(GeluLinearRecompute.apply, inputs)


def held_and_found(mlp: Mlp, images: torch.Tensor, amp: bool, recompute: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the forward pass keeps; its output and all gradients."""
    held, x = set(), images.clone().requires_grad_()
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: held.add((x.data_ptr(), x.nbytes)) or x, lambda x: x)
    with keep, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = mlp(x, recompute)
    mlp.zero_grad()
    out.float().square().sum().backward()
    return sum(size for _, size in held), [out, x.grad, *(parameter.grad for parameter in mlp.parameters())]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_mlp_holds_less_and_computes_the_same_bits(amp: bool):
    torch.manual_seed(0)
    mlp, images = Mlp(16, 64), torch.randn(2, 8, 8, 16)
    less, found = held_and_found(mlp, images, amp, recompute=False)
    plainly, expected = held_and_found(mlp, images, amp, recompute=True)  # written out: for a checkpoint around it
    assert plainly - less == images.numel() * 4 * (2 if amp else 4)  # one map as wide as the hidden layer
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Products(TorchDispatchMode):
    """The widths of the matrix products with weights, in their order."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.widths.append(args[2].shape[1])
        return func(*args, **(kwargs or {}))


def test_checkpointing_computes_again_what_the_backward_pass_needs():
    """Of each branch all products but the last."""
    torch.manual_seed(0)
    arguments = {"img_size": 16, "embed_dim": 16, "depths": (1,), "num_heads": (2,), "window_size": 4, "num_classes": 0}
    plain, checkpointed = SwinTransformer(**arguments), SwinTransformer(**arguments, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    found = []
    for model in (plain, checkpointed):
        with Products() as products:
            loss = model(images).square().sum()
            forward = len(products.widths)
            loss.backward()
        assert products.widths[:forward] == [16, 48, 16, 64, 16]  # patches; qkv, proj, fc1, fc2
        found.append(products.widths[forward:])
    assert found == [[], [64, 48]]
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
