"""Parameter groups and the optimizers' behaviour when an update is skipped."""

import torch
from torch import nn
from yacs.config import CfgNode

from optimizer import build_optimizer, parameter_groups


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    num_layer_ids = 3

    def no_weight_decay(self) -> set[str]:
        return {"absolute_pos_embed"}

    def get_layer_id(self, name: str) -> int:
        return 0 if name.startswith(("embed", "absolute")) else 1 if name.startswith("norm") else 2


def config_for(name: str) -> CfgNode:
    return CfgNode(
        {
            "TRAIN": {
                "WEIGHT_DECAY": 0.05,
                "LAYER_DECAY": 1.0,
                "OPTIMIZER": {"NAME": name, "EPS": 1e-8, "BETAS": (0.9, 0.999), "MOMENTUM": 0.9},
            }
        }
    )


def test_norms_biases_and_embeddings_do_not_decay():
    groups = parameter_groups(Tiny(), 0.05)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {
        "absolute_pos_embed": 0.0,
        "embed.weight": 0.05,
        "embed.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.05,
        "head.bias": 0.0,
    }
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_layer_decay_scales_by_depth():
    groups = parameter_groups(Tiny(), 0.05, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["embed.weight"] == 0.25 and scales["norm.weight"] == 0.5 and scales["head.bias"] == 1.0


def test_update_skipped_by_a_flag_leaves_everything_as_it_was():
    for name in ("adamw", "sgd"):
        torch.manual_seed(0)
        one, two = Tiny(), Tiny()
        two.load_state_dict(one.state_dict())
        for model, skip_first in ((one, False), (two, True)):
            optimizer = build_optimizer(config_for(name), model)
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for skip in (True, False, False) if skip_first else (False, False):
                for p in model.parameters():
                    p.grad = torch.full_like(p, float("nan") if skip else 0.5)
                optimizer.found_inf = torch.tensor(float(skip))
                optimizer.step()
        for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)


def test_sgd_is_plain_sgd_with_nesterov_momentum():
    torch.manual_seed(0)
    ours, plain = Tiny(), Tiny()
    plain.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(config_for("sgd"), ours)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in parameter_groups(plain, 0.05)]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(3):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            p.grad = torch.full_like(p, 0.1 * (step + 1))
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
