"""Private or renamed parts of torch, timm and torchvision that the project uses, each with the versions checked."""

import inspect

from torch.nn.parallel import DistributedDataParallel


def ddp_without_buffer_sync() -> dict[str, bool]:
    """The argument of DistributedDataParallel that leaves buffers alone. torch 2.14 renamed it; torch 2.11 to 2.14."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
