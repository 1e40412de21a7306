"""Parameter groups (which parameters decay, and how fast each depth learns), the optimizers over them, and bfloat16
matrices to compute with, while the optimizer sees them in float32.
"""

import torch
from torch import nn


def decayed_parameter_names(model: nn.Module) -> set[str]:
    """The parameters that are factors of matrix products: those that decay, and those that autocast would cast."""
    exempt = model.no_weight_decay()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(".bias") and not any(part in name for part in exempt)
    }


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups the trainable parameters by weight decay and by depth.

    Vectors (norms, biases) and the parameters whose names contain one of `model.no_weight_decay()` (bias tables,
    absolute embeddings) do not decay. With `layer_decay` below 1 the rate of depth i of n is scaled by
    layer_decay^(n - 1 - i), as in BEiT and SimMIM fine-tuning; `model.get_layer_id(name)` says the depth.

    Each group carries `lr_scale`, which the loop multiplies with the schedule's learning rate.
    """
    matrices = decayed_parameter_names(model)
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name in matrices
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


def build_optimizer(config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum, over the groups above. The learning rate is set before every update.

    Both are PyTorch's fused ones: they can skip an update by a flag on the device, without waiting for it.
    """
    groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
    settings = config.TRAIN.OPTIMIZER
    if settings.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, eps=settings.EPS, betas=tuple(settings.BETAS), fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.MOMENTUM, nesterov=True, fused=True)
    # The fused SGD makes its momentum buffers uninitialised and fills them in its first update, which may be one that
    # is skipped. From zero buffers the first update gives the same values.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Bf16Params:
    """Puts bfloat16 matrices into `model` to compute with. Those that were there, in float32, stay with the optimizer:
    they learn, and they are what `model.state_dict()` gives, so that checkpoints and averages are those of float32.

    Made when the weights are loaded and before the model is wrapped or compiled. A step no longer casts weights and
    their gradients; a process alone learns the same bits as under autocast with float32 parameters, which rounds the
    same numbers each time anew. What several processes exchange is half as long, and summed in bfloat16.
    """

    def __init__(self, model: nn.Module):
        self.masters: dict[str, nn.Parameter] = {}
        self.bf16_params: list[nn.Parameter] = []
        matrices = decayed_parameter_names(model)
        for name, master in list(model.named_parameters()):
            if name in matrices and master.requires_grad:
                half = nn.Parameter(master.detach().to(torch.bfloat16))
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, half)
                self.masters[name] = master
                self.bf16_params.append(half)

        def save_masters(module: nn.Module, state: dict, prefix: str, _: object) -> None:
            state.update({prefix + name: master.detach() for name, master in self.masters.items()})

        model.register_state_dict_post_hook(save_masters)

    def accumulate_master_grads(self) -> None:
        """Adds the gradients of a micro-batch to those of the masters, in float32."""
        for master, half in zip(self.masters.values(), self.bf16_params, strict=True):
            if half.grad is None:
                continue
            if master.grad is None:
                master.grad = half.grad.float()
            else:
                master.grad += half.grad
            half.grad = None

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Gives the model what was learnt."""
        torch._foreach_copy_(self.bf16_params, list(self.masters.values()))
