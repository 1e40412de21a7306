"""Counts the parameters and the multiply-adds of a model, from the model itself."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Returns the number of learnt values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int, in_chans: int = 3) -> int:
    """Counts the multiply-adds of the matrix products and convolutions for one image of img_size × img_size pixels.

    The papers call them FLOPs in their tables. Norms, softmax and other elementwise work are not counted. The count is
    the cost of one more image, so work that is done once per batch (the position bias of Swin V2) is not counted
    either. Nothing is computed: the model runs on the meta device, with the shapes of its parameters.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    flops = []
    for batch_size in (2, 3):  # not 1, which batch norm refuses in training
        images = torch.empty(batch_size, in_chans, img_size, img_size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, (images,))
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) // 2
