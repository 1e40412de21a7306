"""Parameter groups (which parameters decay, and how fast each depth learns) and the optimizers over them."""

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups the trainable parameters by weight decay and by depth.

    Vectors (norms, biases) and the parameters whose names contain one of `model.no_weight_decay()` (bias tables,
    absolute embeddings) do not decay. With `layer_decay` below 1 the rate of depth i of n is scaled by
    layer_decay^(n - 1 - i), as in BEiT and SimMIM fine-tuning; `model.layer_depth(name)` says the depth.

    Each group carries `lr_scale`, which the loop multiplies with the schedule's learning rate.
    """
    exempt = model.no_weight_decay()
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and not any(part in name for part in exempt)
        scale = 1.0
        if layer_decay != 1.0:
            scale = layer_decay ** (model.num_layer_depths - 1 - model.layer_depth(name))
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
