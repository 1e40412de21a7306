"""How large a model is and how much it computes, counted from the model itself."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """The number of learnt values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int, in_chans: int = 3) -> int:
    """Multiply-adds of the matrix products and convolutions for one image of img_size × img_size pixels.

    That is what the papers call FLOPs in their tables. Norms, softmax and other work per element are not counted, nor
    what is computed once however many images there are (the position bias of Swin V2): it is what one more image costs.
    Nothing is computed: the model runs on the meta device, on the shapes of its parameters alone.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    flops = []
    for images in (2, 3):  # not 1, of which a batch norm in training would have nothing to say
        batch = torch.empty(images, in_chans, img_size, img_size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, (batch,))
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) // 2
