"""Parameter groups (weight decay, layer-wise learning rates), the optimizers over them, and bfloat16 parameters."""

from collections.abc import Callable, Iterator, Set
from typing import Protocol

import torch
from torch import nn
from yacs.config import CfgNode

from utils.compat import add_tensors, copy_tensors


class ParamGroupModel(Protocol):
    """What a model tells the optimizer about its parameters."""

    num_layer_ids: int

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def no_weight_decay(self) -> Set[str]:
        """Parts of names: parameters whose names contain one of them do not decay."""

    def get_layer_id(self, name: str, /) -> int:
        """The depth of a parameter: 0 for the patch embedding, `num_layer_ids - 1` for the head."""


class Bf16Model(ParamGroupModel, Protocol):
    """What `Bf16Params` needs of a model besides that."""

    def get_submodule(self, target: str) -> nn.Module: ...

    def register_state_dict_post_hook(self, hook: Callable[[nn.Module, dict, str, object], None]) -> object: ...


def decayed_parameter_names(model: ParamGroupModel) -> set[str]:
    """Returns the names of the parameters that are factors of matrix products: they decay, and autocast casts them."""
    exempt = model.no_weight_decay()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(".bias") and not any(part in name for part in exempt)
    }


def parameter_groups(model: ParamGroupModel, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups the trainable parameters by weight decay and by layer.

    Vectors (norms, biases) and the parameters of `model.no_weight_decay()` (bias tables, absolute embeddings) do not
    decay. With `layer_decay` below 1 the learning rate of layer i of n is scaled by layer_decay^(n - 1 - i), as in BEiT
    and SimMIM fine-tuning.

    Returns:
        Groups for a torch optimizer. The training loop multiplies the schedule's rate with a group's `lr_scale`.
    """
    decayed = decayed_parameter_names(model)
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name in decayed
        scale = 1.0
        if layer_decay != 1.0:
            scale = layer_decay ** (model.num_layer_ids - 1 - model.get_layer_id(name))
        group = groups.setdefault(
            (scale, decays),
            {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(config: CfgNode, model: ParamGroupModel) -> torch.optim.Optimizer:
    """Builds AdamW, or SGD with Nesterov momentum. `engine.train_step.train_steps` sets the learning rate.

    Both are PyTorch's fused ones, which skip a step if a tensor on the device says so, without waiting for it.
    """
    groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
    settings = config.TRAIN.OPTIMIZER
    if settings.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, eps=settings.EPS, betas=tuple(settings.BETAS), fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.MOMENTUM, nesterov=True, fused=True)
    # Fused SGD leaves its momentum buffers uninitialised until the first step, which may be skipped. The first step
    # gives the same values from buffers of zeros.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Bf16Params:
    """The optimizer keeps float32 masters; the model computes with bfloat16 copies; `state_dict()` returns the masters.

    Built after the weights are loaded and before the model is compiled or wrapped. A step no longer casts weights and
    their gradients. A single rank learns the same bits as under autocast with float32 parameters, which rounds the same
    numbers at each step. Several ranks exchange half the bytes, and sum them in bfloat16.
    """

    def __init__(self, model: Bf16Model):
        self.masters: dict[str, nn.Parameter] = {}
        self.bf16_params: list[nn.Parameter] = []
        decayed = decayed_parameter_names(model)
        for name, master in list(model.named_parameters()):
            if name in decayed and master.requires_grad:
                copy = nn.Parameter(master.detach().to(torch.bfloat16))
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, copy)
                self.masters[name] = master
                self.bf16_params.append(copy)

        def save_masters(module: nn.Module, state: dict, prefix: str, _: object) -> None:
            state.update({prefix + name: master.detach() for name, master in self.masters.items()})

        model.register_state_dict_post_hook(save_masters)

    @torch.no_grad()
    def accumulate_master_grads(self) -> None:
        """Adds the gradients of a micro-batch to those of the masters, in float32."""
        pairs = zip(self.masters.values(), self.bf16_params, strict=True)
        masters, grads = [], []
        for master, copy in pairs:
            if copy.grad is not None:
                masters.append(master)
                grads.append(copy.grad)
                copy.grad = None
        # A copy casts all tensors in few kernels; a sum of two types would take one for each.
        casts = [torch.empty_like(master) for master in masters]
        copy_tensors(casts, grads)
        summed = [(master.grad, cast) for master, cast in zip(masters, casts, strict=True) if master.grad is not None]
        if summed:
            add_tensors(*zip(*summed, strict=True))
        for master, cast in zip(masters, casts, strict=True):
            if master.grad is None:
                master.grad = cast

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Copies the masters into the model after a step."""
        copy_tensors(self.bf16_params, list(self.masters.values()))
