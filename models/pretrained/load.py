"""Putting given weights into a model: their layout is recognised, what fits is loaded, other sizes are resized by rule,
the rest is refused.

Works on state dicts in memory; files are read elsewhere. Shapes: `nH` heads, `C` channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from models.layers import resize_grid
from models.pretrained.convert import (
    COORDINATES,
    DERIVED,
    MIN_MATCHED_FRACTION,
    ORIGINAL,
    detect_format,
    from_original,
    matched_fraction,
    strip_prefix,
    to_original,
)
from utils.errors import UserError

BIAS_TABLE = "relative_position_bias_table"
POSITIONS = "absolute_pos_embed"
FLOAT = torch.empty(0)  # what a classifier is, whether or not the model has one


@dataclass
class LoadReport:
    """What became of every tensor, by its name in the model; in brackets behind it, what was done and why.

    `layout` says whose the weights are: original (and this project's own), timm, torchvision, hf, or unknown.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    layout: str = "unknown"

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
    model: nn.Module,
    state_dict: dict[str, Tensor],
    class_names: Sequence[str] | None = None,
    source: str = "these weights",
    trained_on: Sequence[str] | None = None,
) -> LoadReport:
    """Loads `state_dict` into `model`, all of it or, where anything is unexpected, nothing.

    - Weights in another layout than the model's are translated; a prefix before their names is removed.
    - Derived buffers are dropped, whatever their size.
    - What stands beside the model in a larger program is dropped, if it is less than a twentieth of all.
    - Bias tables and absolute position embeddings made for another window or image size are resized bicubically.
    - A classifier for the 21,841 classes of ImageNet-22K becomes one for ImageNet-1K, class by class.
    - A classifier for other classes is not loaded: the model's starts from zeros.
    - A classifier that the model lacks is dropped; one that the weights lack stays as it was initialised.

    Args:
        model: changed in place.
        state_dict: name to tensor, in any layout of `models.pretrained.convert`; left as it is.
        class_names: the model's classes in the order of its outputs. ImageNet synsets ("n01440764", …) let the
            classifier of ImageNet-22K be used; without names, 1,000 outputs are taken for those of ImageNet-1K.
        source: what messages call the weights.
        trained_on: the classes that the weights were made for, where they say so. As many classes that are others make
            the classifier start from zeros too.

    Returns:
        What was loaded, resized, dropped and initialised.

    Raises:
        UserError: tensors that are missing, unknown, or of a shape that no rule above covers; names them.
    """
    own, head = model.state_dict(), _head_of(model)
    report = LoadReport()
    given, beside = _in_the_layout_of(own, state_dict, report, source)
    new: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, value in given.items():
        if name not in own and name.rpartition(".")[2] in DERIVED:
            report.dropped.append(f"{name} ({_why_derived(name, value, model)})")
        elif name not in own and name in beside:
            report.dropped.append(f"{name} (beside the model)")
        elif name not in own and name not in head:
            wrong.append(f"{name} is not in the model")
        elif not isinstance(value, Tensor) or value.is_floating_point() != own.get(name, FLOAT).is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{name} is {kind}, not a tensor of {own.get(name, FLOAT).dtype} or the like")
        elif name not in head:  # placed below, weight and bias together
            wrong.extend(_place(name, value, own[name], new, report))
    wrong.extend(f"{name} is missing" for name in own if name not in given and name not in head)
    share = matched_fraction(given, {*new, *head})
    if share < MIN_MATCHED_FRACTION:
        wrong.extend(f"{name} is not in the model" for name in given if name in beside and name not in own)
    if not wrong:
        other = bool(trained_on and class_names and list(trained_on) != list(class_names))
        wrong.extend(_place_head(head, own, given, class_names, new, report, other))
    if wrong:
        raise UserError(_refusal(source, report.layout, share, wrong))
    model.load_state_dict(new, strict=True)
    return report


def _head_of(model: nn.Module) -> tuple[str, str]:
    """Names of the classifier's weight and bias; timm's models say theirs."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    return f"{name}.weight", f"{name}.bias"


def _in_the_layout_of(
    own: dict[str, Tensor], state_dict: dict[str, Tensor], report: LoadReport, source: str
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The weights by the names that `own` has for them, and the names that may not belong to them; notes the layout."""
    try:
        found = strip_prefix(state_dict)
        wanted, _ = detect_format(own)
        given = found.weights
        if found.layout is not None:
            report.layout = found.layout.origin
            if wanted is not None and wanted is not found.layout:
                given = to_original(found)
                given = given if wanted is ORIGINAL else from_original(given, wanted)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return given, found.outside


def _place(name: str, value: Tensor, own: Tensor, new: dict[str, Tensor], report: LoadReport) -> list[str]:
    """Adds to `new` and `report` what becomes of one tensor. Returns what is wrong with it, if anything."""
    if value.shape == own.shape:
        new[name] = value
        report.loaded.append(name)
        return []
    resized = _resize(name, value, own)
    if resized is None:
        return [f"{name} has shape {_shape(value)}, the model has {_shape(own)}"]
    new[name] = resized
    report.resized.append(f"{name} ({_shape(value)} -> {_shape(resized)}, bicubic)")
    return []


def _why_derived(name: str, value: object, model: nn.Module) -> str:
    """Why a tensor that no model learns is dropped; and that windows differ, where nothing else tells."""
    here = dict(model.named_buffers()).get(name)
    if name.endswith(".k_bias"):
        return "cosine attention has no key bias: it had no effect"
    if name.endswith(COORDINATES) and here is not None and isinstance(value, Tensor) and value.numel() != here.numel():
        there, ours = ((math.isqrt(table.numel() // 2) + 1) // 2 for table in (value, here))
        return (
            f"windows of {there} there, {ours} here: the continuous bias needs no resizing, "
            "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES says in which units it is read"
        )
    return "derived from the configuration"


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
    head: tuple[str, str],
    own: dict[str, Tensor],
    given: dict[str, Tensor],
    class_names: Sequence[str] | None,
    new: dict[str, Tensor],
    report: LoadReport,
    other_classes: bool,
) -> list[str]:
    """Adds to `new` and `report` what becomes of the classifier. Returns what is wrong with it, if anything."""
    present = [name for name in head if name in given]
    if head[0] not in own:
        report.dropped.extend(f"{name} (the model has no classifier)" for name in present)
        return []
    if not present:
        new.update({name: own[name] for name in head})
        report.initialised.extend(f"{name} (not among the weights, left as it was initialised)" for name in head)
        return []
    if len(present) == 1:
        return [f"{present[0]} comes without the other of {' and '.join(head)}"]
    weight, bias = (given[name] for name in head)
    classes = own[head[0]].shape[0]
    if weight.shape[1:] != own[head[0]].shape[1:] or bias.shape != weight.shape[:1]:
        return [f"{head[0]} {_shape(weight)} and {head[1]} {_shape(bias)} do not fit {_shape(own[head[0]])}"]
    if weight.shape[0] == classes and not other_classes:
        new.update({name: given[name] for name in head})
        report.loaded.extend(head)
        return []
    rows = None
    if weight.shape[0] == 21841 and classes == 1000:  # also when the weights name their classes: by synset
        rows = imagenet_22k_rows(class_names or ImageNetInfo("imagenet-1k").label_names())
    for name in head:
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


def _refusal(source: str, layout: str, share: float, wrong: list[str]) -> str:
    shown = [f"  {line}" for line in wrong[:20]]
    if len(wrong) > len(shown):
        shown.append(f"  … and {len(wrong) - len(shown)} more")
    return "\n".join(
        [
            f"{source} (layout: {layout}): do not fit the model; nothing was loaded. {share:.1%} of the parameters "
            "have a place in it. The first differences:",
            *shown,
            "Set MODEL.TYPE and the keys of the architecture (MODEL.SWIN.* or MODEL.SWINV2.*: EMBED_DIM, DEPTHS, "
            "NUM_HEADS, APE, …) to the model that the weights were made for, or give other weights to --pretrained or "
            "--resume.",
        ]
    )
