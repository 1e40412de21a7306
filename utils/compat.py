"""Private or renamed functions of torch, timm and torchvision, each with the versions for which it was checked.

The rest of the project calls these wrappers and no private function of another library.
"""

import ctypes
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torchvision.transforms._presets import ImageClassification

# Re-exported, checked with torch 2.10 to 2.14: tensors without memory, a hook below autograd, the leaves of containers.
__all__ = [
    "FakeTensorMode", "TorchDispatchMode", "add_tensors", "clear_cuda_error", "copy_tensors",
    "cpu_has_bf16", "ddp_without_buffer_sync",
    "resolve_timm_resampling", "set_inductor_freezing", "shut_down_workers", "torchvision_eval_preset_type",
    "tree_leaves",
]  # fmt: skip


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bfloat16 natively (AVX-512 BF16). Checked: torch 2.10 to 2.14."""
    return torch.cpu._is_avx512_bf16_supported()


def add_tensors(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Adds each tensor of `sources` to that of `targets`, in few kernels. Checked: torch 2.10 to 2.14."""
    torch._foreach_add_(list(targets), list(sources))


def copy_tensors(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies each tensor of `sources` into that of `targets`, in few kernels. Checked: torch 2.10 to 2.14."""
    torch._foreach_copy_(list(targets), list(sources))


def clear_cuda_error() -> None:
    """Forgets the last error of the CUDA runtime, which the next kernel launch would raise.

    torch has no function for it, but loads the runtime with global symbols. Checked: torch 2.14.
    """
    get_last_error = getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if get_last_error is not None:
        get_last_error()


def set_inductor_freezing(enabled: bool) -> None:
    """Lets torch.compile treat weights as constants where gradients are off. Checked: torch 2.10 to 2.14.

    A global setting, because `torch.compile(options=…)` does not reach the moment when inductor reads it.
    """
    torch._inductor.config.freezing = enabled


def ddp_without_buffer_sync() -> dict[str, Any]:
    """The argument of DistributedDataParallel that turns off the broadcast of buffers; torch 2.14 renamed it.

    Checked: torch 2.10 to 2.14.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def shut_down_workers(batches: Iterator) -> None:
    """Ends the worker processes of `iter(DataLoader(…))` at once. Checked: torch 2.10 to 2.14."""
    if hasattr(batches, "_shutdown_workers"):  # iterators without workers have none to end
        try:
            batches._shutdown_workers()
        finally:
            for worker in getattr(batches, "_workers", ()):
                worker.kill()  # one that is busy ignores SIGTERM, and Python would wait for it at its end


def torchvision_eval_preset_type() -> "type[ImageClassification]":
    """The class of the transforms in torchvision's `Weights.transforms()`. Checked: torchvision 0.25 to 0.29."""
    from torchvision.transforms._presets import ImageClassification

    return ImageClassification


def resolve_timm_resampling(options: dict[str, Any]) -> None:
    """Sets `resample` in the options of timm's affine operations; samples one if there are several, as timm does.

    Checked: timm 1.0.31.
    """
    from timm.data import auto_augment

    auto_augment._check_args_tf(options)
