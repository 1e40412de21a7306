"""Putting given weights into a model: what fits is loaded, other sizes are resized by rule, the rest is refused.

Works on state dicts in memory; files are read elsewhere. Shapes: `nH` heads, `C` channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from models.layers import resize_grid
from utils.errors import UserError

DERIVED = ("relative_position_index", "attn_mask", "relative_coords_table")  # computed from the configuration
BIAS_TABLE = "relative_position_bias_table"
POSITIONS = "absolute_pos_embed"
HEAD = ("head.weight", "head.bias")


@dataclass
class LoadReport:
    """What became of every tensor, by name; beside the name, in brackets, what was done and why."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)

    def table(self) -> str:
        """One line for each group and, but for those that were simply loaded, one for each tensor. For the log."""
        lines = []
        for name in ("loaded", "resized", "dropped", "initialised"):
            entries = getattr(self, name)
            lines.append(f"{name:<12}{len(entries):>5}")
            if name != "loaded":
                lines.extend(f"    {entry}" for entry in entries)
        return "\n".join(lines)


def load_weights(
    model: nn.Module, state_dict: dict[str, Tensor], class_names: Sequence[str] | None = None
) -> LoadReport:
    """Loads `state_dict` into `model`, all of it or, where anything is unexpected, nothing.

    - Derived buffers are dropped, whatever their size.
    - Bias tables and absolute position embeddings made for another window or image size are resized bicubically.
    - A classifier for the 21,841 classes of ImageNet-22K becomes one for ImageNet-1K, class by class.
    - A classifier for other classes is not loaded: the model's starts from zeros.
    - A classifier that the model lacks is dropped; one that the weights lack stays as it was initialised.

    Args:
        model: has the names of the released checkpoints; changed in place.
        state_dict: name to tensor; left as it is.
        class_names: the model's classes in the order of its outputs. ImageNet synsets ("n01440764", …) let the
            classifier of ImageNet-22K be used; without names, 1,000 outputs are taken for those of ImageNet-1K.

    Returns:
        What was loaded, resized, dropped and initialised.

    Raises:
        UserError: tensors that are missing, unknown, or of a shape that no rule above covers; names them.
    """
    own = model.state_dict()
    report = LoadReport()
    new: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, value in state_dict.items():
        if name.rpartition(".")[2] in DERIVED:
            report.dropped.append(f"{name} (derived from the configuration)")
        elif name not in own and name not in HEAD:
            wrong.append(f"{name} is not in the model")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{name} is {kind}, not a tensor of floating-point numbers")
        elif name in HEAD:
            continue  # placed below, weight and bias together
        elif value.shape == own[name].shape:
            new[name] = value
            report.loaded.append(name)
        else:
            resized = _resize(name, value, own[name])
            if resized is None:
                wrong.append(f"{name} has shape {_shape(value)}, the model has {_shape(own[name])}")
            else:
                new[name] = resized
                report.resized.append(f"{name} ({_shape(value)} -> {_shape(resized)}, bicubic)")
    wrong.extend(f"{name} is missing" for name in own if name not in state_dict and name not in HEAD)
    if not wrong:
        wrong.extend(_place_head(own, state_dict, class_names, new, report))
    if wrong:
        raise UserError(_refusal(wrong))
    model.load_state_dict(new, strict=True)
    return report


def imagenet_22k_rows(class_names: Sequence[str]) -> list[int] | None:
    """The rows of a released 21,841-class head that mean `class_names`; None if those are not ImageNet-1K's synsets.

    The released heads follow timm's sorted list of ImageNet-22K's synsets, ranks counted from 0, but for three things:
    rows are one later from rank 9,211 on, two later from rank 15,730 on, and n04399382, which timm's list lacks, is
    row 5,564.
    """
    if sorted(class_names) != sorted(ImageNetInfo("imagenet-1k").label_names()):
        return None
    ranks = {synset: rank for rank, synset in enumerate(sorted(ImageNetInfo("imagenet-22k").label_names()))}
    rows = {synset: rank + (rank >= 9211) + (rank >= 15730) for synset, rank in ranks.items()}
    rows["n04399382"] = 5564
    return [rows[name] for name in class_names]


def _resize(name: str, value: Tensor, own: Tensor) -> Tensor | None:
    """`value` resampled to the shape of `own`, or None where no rule says how. Both lie on square grids."""
    kind = name.rpartition(".")[2]
    if kind == BIAS_TABLE and value.ndim == 2 and value.shape[1] == own.shape[1]:  # (places, nH)
        old, new = math.isqrt(value.shape[0]), math.isqrt(own.shape[0])
    elif kind == POSITIONS and value.ndim == 3 and value.shape[::2] == own.shape[::2]:  # (1, places, C)
        old, new = math.isqrt(value.shape[1]), math.isqrt(own.shape[1])
    else:
        return None
    places = value.reshape(-1, value.shape[-1])
    if places.shape[0] != old**2:
        return None
    return resize_grid(places.float(), (old, old), (new, new)).reshape(own.shape)


def _place_head(
    own: dict[str, Tensor],
    given: dict[str, Tensor],
    class_names: Sequence[str] | None,
    new: dict[str, Tensor],
    report: LoadReport,
) -> list[str]:
    """Adds to `new` and `report` what becomes of the classifier. Returns what is wrong with it, if anything."""
    present = [name for name in HEAD if name in given]
    if HEAD[0] not in own:
        report.dropped.extend(f"{name} (the model has no classifier)" for name in present)
        return []
    if not present:
        new.update({name: own[name] for name in HEAD})
        report.initialised.extend(f"{name} (not among the weights, left as it was initialised)" for name in HEAD)
        return []
    if len(present) == 1:
        return [f"{present[0]} comes without the other of {' and '.join(HEAD)}"]
    weight, bias = (given[name] for name in HEAD)
    classes = own[HEAD[0]].shape[0]
    if weight.ndim != 2 or weight.shape[1] != own[HEAD[0]].shape[1] or bias.shape != weight.shape[:1]:
        return [f"head.weight {_shape(weight)} and head.bias {_shape(bias)} do not fit {_shape(own[HEAD[0]])}"]
    if weight.shape[0] == classes:
        new.update({name: given[name] for name in HEAD})
        report.loaded.extend(HEAD)
        return []
    rows = None
    if weight.shape[0] == 21841 and classes == 1000:
        rows = imagenet_22k_rows(class_names or ImageNetInfo("imagenet-1k").label_names())
    for name in HEAD:
        change = f"{_shape(given[name])} -> {_shape(own[name])}"
        if rows is None:
            new[name] = torch.zeros_like(own[name])
            report.initialised.append(f"{name} ({change}, other classes: starts from zeros)")
        else:
            new[name] = given[name][rows]
            report.resized.append(f"{name} ({change}, the rows of ImageNet-1K's classes in ImageNet-22K)")
    return []


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _refusal(wrong: list[str]) -> str:
    shown = [f"  {line}" for line in wrong[:20]]
    if len(wrong) > len(shown):
        shown.append(f"  … and {len(wrong) - len(shown)} more")
    return "\n".join(
        [
            "These weights do not fit the model; nothing was loaded:",
            *shown,
            "Set MODEL.TYPE and MODEL.SWIN.* (EMBED_DIM, DEPTHS, NUM_HEADS, APE, …) to the model that the weights were "
            "made for, or give other weights to --pretrained or --resume.",
        ]
    )
