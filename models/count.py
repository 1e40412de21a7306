"""Counts the parameters and the multiply-adds of a model, and checks its inputs, by running it without computing."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import UserError


def count_parameters(model: nn.Module) -> int:
    """Returns the number of learnt values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int, in_chans: int = 3) -> int:
    """Counts the multiply-adds of the matrix products and convolutions for one image of img_size × img_size pixels.

    The papers call them FLOPs in their tables. Norms, softmax and other elementwise work are not counted. The count is
    the cost of one more image, so work that is done once per batch (the position bias of Swin V2) is not counted
    either. Nothing is computed: the model runs on the meta device, with the shapes of its parameters.
    """
    flops = []
    for batch_size in (2, 3):  # not 1, which batch norm refuses in training
        with FlopCounterMode(display=False) as counter:
            _run_on_meta(model, batch_size, img_size, in_chans)
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) // 2


def check_inputs(model: nn.Module, name: str, batch_size: int, img_size: int, in_chans: int = 3) -> None:
    """Runs the model, which is called `name`, in its present mode, on inputs of these sizes. Nothing is computed.

    Raises:
        UserError: it cannot take such images, or a batch of a single one.
    """
    try:
        _run_on_meta(model, max(2, batch_size), img_size, in_chans)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"{name} cannot take images of {img_size} pixels ({_first_line(error)}). Give a larger DATA.IMG_SIZE"
        ) from error
    if batch_size == 1:
        try:
            _run_on_meta(model, 1, img_size, in_chans)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{name} normalises over the images of a batch ({_first_line(error)}). DATA.BATCH_SIZE (--batch-size), "
                "the images of a process and micro-batch, must be at least 2; fewer --accumulation-steps keep the "
                "global batch size"
            ) from error


def _run_on_meta(model: nn.Module, batch_size: int, img_size: int, in_chans: int) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    images = torch.empty(batch_size, in_chans, img_size, img_size, device="meta")
    with torch.no_grad():
        functional_call(model, shapes, (images,))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
