"""DropPath that skips dropped samples, the patch embedding as a matrix product, the MLP, checkpointing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from config import get_config
from models.build import build_model
from models.layers import DropPath, GeluLinearRecompute, Mlp, PatchEmbed
from models.swin_transformer import SwinTransformer


def test_drop_path_skip_keeps_the_expectation():
    """Over many draws the mean is x + branch(x), and each draw keeps the same number of samples."""
    torch.manual_seed(0)
    x = torch.randn(10, 4, dtype=torch.float64)
    drop = DropPath(0.3, skip=True).train()
    total, batch_sizes = torch.zeros_like(x), set()
    for _ in range(1000):
        out = drop(x, lambda kept: batch_sizes.add(len(kept)) or kept.sin())
        changed = (out != x).any(1)
        assert changed.sum() == 7
        torch.testing.assert_close(out[changed], (x + x.sin() * 10 / 7)[changed])
        total += out
    assert batch_sizes == {7}
    # Each sample's branch is scaled by 10/7 with probability 0.7: a standard deviation of 0.0207 · |sin x| in the mean.
    torch.testing.assert_close(total / 1000, x + x.sin(), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("batch_size", "rate", "kept"), [(8, 0.2, 6), (8, 0.05, 8), (1, 0.9, 1), (2, 0.9, 1), (128, 0.1, 115)]
)
def test_drop_path_num_kept(batch_size: int, rate: float, kept: int):
    assert DropPath(rate, skip=True).num_kept(batch_size) == kept


def test_drop_path_skip_gradients():
    torch.manual_seed(1)
    x = torch.randn(8, 3, requires_grad=True)
    linear = nn.Linear(3, 3)
    out = DropPath(0.5, skip=True)(x, linear)
    kept = (out != x).any(1)
    out.sum().backward()
    by_hand = x.detach().clone().requires_grad_()
    (by_hand[kept] + 2 * linear(by_hand[kept])).sum().backward()
    torch.testing.assert_close(x.grad[kept], by_hand.grad[kept])
    assert torch.equal(x.grad[~kept], torch.ones(4, 3))


def test_drop_path_promotes_dtypes_as_a_sum():
    x = torch.ones(4, 2, dtype=torch.bfloat16)
    assert DropPath(0.5, skip=True)(x, lambda kept: kept.float()).dtype == torch.float32
    assert DropPath(0.5, skip=True)(x.float(), lambda kept: kept.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["swin", "swinv2", "swin_mlp"])
def test_drop_path_skip_reaches_every_block_and_leaves_evaluation_unchanged(kind: str):
    section = f"MODEL.{kind.upper()}"
    opts = ["MODEL.TYPE", kind, "MODEL.DROP_PATH_RATE", 0.5, f"{section}.DEPTHS", [2], f"{section}.NUM_HEADS", [2]]
    opts += [f"{section}.EMBED_DIM", 8, f"{section}.WINDOW_SIZE", 4, "DATA.IMG_SIZE", 32, "MODEL.NUM_CLASSES", 5]
    torch.manual_seed(0)
    plain, skipping = (build_model(get_config(None, [*opts, "MODEL.DROP_PATH_SKIP", skip])) for skip in (False, True))
    skipping.load_state_dict(plain.state_dict())
    assert [m.skip for m in skipping.modules() if isinstance(m, DropPath)] == [True, True]
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain.eval()(images), skipping.eval()(images))
    batch_sizes = []
    for block in skipping.blocks():
        block.mlp.register_forward_hook(lambda module, args, out: batch_sizes.append(len(out)))
    skipping.train()(images).sum().backward()
    assert batch_sizes == [4, 2]


@pytest.mark.parametrize("size", [(24, 16), (21, 18)])
def test_patch_embed_equals_the_convolution(size: tuple[int, int]):
    torch.manual_seed(0)
    embed = PatchEmbed(4, 3, 10, norm=False).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
    torch.testing.assert_close(embed(images), embed.proj(padded).permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


def test_gelu_linear_recompute_gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.testing.assert_close(GeluLinearRecompute.apply(*inputs), F.linear(F.gelu(inputs[0]), *inputs[1:]))
    assert torch.autograd.gradcheck(GeluLinearRecompute.apply, inputs)


def saved_bytes_and_results(
    mlp: Mlp, images: torch.Tensor, amp: bool, recompute: bool
) -> tuple[int, list[torch.Tensor]]:
    """Returns the bytes that the forward pass saves; the output and all gradients."""
    saved, x = set(), images.clone().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add((x.data_ptr(), x.nbytes)) or x, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = mlp(x, recompute)
    mlp.zero_grad()
    out.float().square().sum().backward()
    return sum(size for _, size in saved), [out, x.grad, *(parameter.grad for parameter in mlp.parameters())]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_mlp_saves_less_memory_and_is_bitwise_equal(amp: bool):
    torch.manual_seed(0)
    mlp, images = Mlp(16, 64), torch.randn(2, 8, 8, 16)
    fewer_bytes, actual = saved_bytes_and_results(mlp, images, amp, recompute=False)
    bytes_without, expected = saved_bytes_and_results(mlp, images, amp, recompute=True)  # without GeluLinearRecompute
    assert bytes_without - fewer_bytes == images.numel() * 4 * (2 if amp else 4)  # one map of the hidden width
    for value, expected_value in zip(actual, expected, strict=True):
        assert torch.equal(value, expected_value)


class ProductRecorder(TorchDispatchMode):
    """Records the output widths of the matrix products with weights, in order."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.widths.append(args[2].shape[1])
        return func(*args, **(kwargs or {}))


def test_checkpointing_recomputes_only_what_the_backward_pass_needs():
    """All products of each branch but the last."""
    torch.manual_seed(0)
    arguments = {"img_size": 16, "embed_dim": 16, "depths": (1,), "num_heads": (2,), "window_size": 4, "num_classes": 0}
    plain, checkpointed = SwinTransformer(**arguments), SwinTransformer(**arguments, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    recomputed = []
    for model in (plain, checkpointed):
        with ProductRecorder() as products:
            loss = model(images).square().sum()
            forward = len(products.widths)
            loss.backward()
        assert products.widths[:forward] == [16, 48, 16, 64, 16]  # patches; qkv, proj, fc1, fc2
        recomputed.append(products.widths[forward:])
    assert recomputed == [[], [64, 48]]
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
