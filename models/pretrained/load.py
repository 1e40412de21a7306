"""Loads given weights into a model: detects their format, resizes position tables, and refuses what does not fit.

Works on state dicts in memory; `utils.checkpoint.io` reads the files. Shapes: `nH` heads, `C` channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from models.layers import resize_grid
from models.pretrained.convert import (
    MIN_MATCHED_FRACTION,
    detect_format,
    format_and_prefix,
    from_original,
    matched_fraction,
    to_original,
)
from models.pretrained.key_maps import COORDINATES, DERIVED, ORIGINAL
from utils.config.rules import IMAGENET_22K_CLASSES
from utils.errors import UserError

BIAS_TABLE = "relative_position_bias_table"
POSITIONS = "absolute_pos_embed"
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # by DDP, torch.compile and training programs, before every name
_FLOAT = torch.empty(0)  # compared with the classifier's dtype if the model has no classifier


@dataclass
class LoadReport:
    """What became of every tensor: lists of its name in the model and, in brackets, what was done and why.

    `format` is the origin of the weights: original (also this project's own), timm, torchvision, hf, or unknown.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    format: str = "unknown"

    def table(self) -> str:
        """For the log: one line per group, and one per tensor that was not simply loaded."""
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
    """Loads `state_dict` into `model`. If anything is unexpected, nothing is loaded.

    - Weights in another format than the model's are converted; a prefix of their names is removed.
    - Derived buffers are dropped, whatever their size.
    - Tensors of a larger model around this one are dropped if they have less than a twentieth of all values.
    - Bias tables and absolute position embeddings made for another window or image size are resized bicubically.
    - A classifier for the 21,841 classes of ImageNet-22K becomes one for ImageNet-1K, class by class.
    - A classifier for other classes is not loaded: the model's classifier starts from zeros.
    - A classifier that the model lacks is dropped; one that the weights lack stays as it was initialised.

    Args:
        model: changed in place.
        state_dict: name to tensor, in any format of `models.pretrained.key_maps`; not modified.
        class_names: the model's classes in the order of its outputs. ImageNet synsets ("n01440764", …) allow the
            classifier of ImageNet-22K to be used; without names, 1,000 outputs are taken as those of ImageNet-1K.
        source: the name of the weights in messages.
        trained_on: the classes that the weights were trained on, if known. If they differ from `class_names`, the
            classifier starts from zeros even if their number is the same.

    Returns:
        Which tensors were loaded, resized, dropped and initialised.

    Raises:
        UserError: tensors that are missing, unknown, or of a shape that no rule above covers; names them.
    """
    own, report = model.state_dict(), LoadReport()
    weights, outside = _convert_to_format_of(own, state_dict, report, source)
    loading = _Loading(own, weights, _head_names(model), report)
    loading.add_all(outside, dict(model.named_buffers()))
    fraction = matched_fraction(weights, {*loading.new, *loading.head_names})
    if fraction < MIN_MATCHED_FRACTION:
        loading.problems.extend(f"{n} is not in the model" for n in weights if n in outside and n not in own)
    if not loading.problems:
        other_classes = bool(trained_on and class_names and list(trained_on) != list(class_names))
        loading.add_heads(class_names, other_classes)
    if loading.problems:
        raise UserError(_refusal(source, report.format, fraction, loading.problems))
    model.load_state_dict(loading.new, strict=True)
    return report


def num_outputs(state_dict: dict[str, Tensor]) -> int | None:
    """The number of outputs of the classifier in weights of any format; None if none is recognised."""
    try:
        weights = to_original(detect_format(state_dict))
    except UserError:  # `load_weights` will say what is wrong
        return None
    for name in ("head.weight", "head.fc.weight", "classifier.weight", "fc.weight"):
        value = weights.get(name)
        if isinstance(value, Tensor) and value.ndim in (2, 4):
            return len(value)
    return None


def _head_names(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each classifier's weight and bias; models of timm have them in their configuration.

    Distilled models have two classifiers, whose outputs are averaged.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    return [(f"{name}.weight", f"{name}.bias") for name in ([names] if isinstance(names, str) else names or ())]


def _convert_to_format_of(
    own: dict[str, Tensor], state_dict: dict[str, Tensor], report: LoadReport, source: str
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Converts `state_dict` to the format of `own`, and records its format.

    Returns:
        The converted weights, and the names among them that may belong to a larger model around this one.
    """
    try:
        detected = detect_format(state_dict)
        target, _ = format_and_prefix(own)
        weights = detected.weights
        if detected.format is None:
            weights = _without_wrappers(weights, own)
        else:
            report.format = detected.format.origin
            if target is not None and target is not detected.format:
                weights = to_original(detected)
                weights = weights if target is ORIGINAL else from_original(weights, target)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return weights, detected.outside


def _without_wrappers(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes what wrappers put before every name, from weights of a model that is no Swin."""
    while weights and not weights.keys() & own.keys():
        wrapper = next((each for each in _WRAPPERS if all(name.startswith(each) for name in weights)), None)
        if wrapper is None:
            break
        weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
    return weights


@dataclass
class _Loading:
    """Tensors on their way into a model: those to load are collected in `new`, reasons to refuse in `problems`.

    Attributes:
        own: the model's state dict.
        weights: the given weights, in the model's format.
        heads: names of each classifier's weight and bias.
    """

    own: dict[str, Tensor]
    weights: dict[str, Tensor]
    heads: list[tuple[str, str]]
    report: LoadReport
    new: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def head_names(self) -> set[str]:
        return {name for head in self.heads for name in head}

    def add_all(self, outside: frozenset[str], buffers: dict[str, Tensor]) -> None:
        """Adds all tensors except the classifier's. `buffers`: the model's, including the non-persistent ones."""
        head_names = self.head_names
        for name, value in self.weights.items():
            reference = self.own.get(name, _FLOAT)
            if name not in self.own and name.rpartition(".")[2] in DERIVED:
                self.report.dropped.append(f"{name} ({_why_dropped(name, value, buffers.get(name))})")
            elif name not in self.own and name in outside:
                self.report.dropped.append(f"{name} (outside the model)")
            elif name not in self.own and name not in head_names:
                self.problems.append(f"{name} is not in the model")
            elif not isinstance(value, Tensor) or value.is_floating_point() != reference.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                self.problems.append(f"{name} is {kind}, not a tensor of {reference.dtype} or the like")
            elif name not in head_names:
                self._add(name, value, reference)
        missing = (name for name in self.own if name not in self.weights and name not in head_names)
        self.problems.extend(f"{name} is missing" for name in missing)

    def _add(self, name: str, value: Tensor, own: Tensor) -> None:
        if value.shape == own.shape:
            self.new[name] = value
            self.report.loaded.append(name)
        elif (resized := _resize(name, value, own)) is not None:
            self.new[name] = resized
            self.report.resized.append(f"{name} ({_shape(value)} -> {_shape(resized)}, bicubic)")
        else:
            self.problems.append(f"{name} has shape {_shape(value)}, the model has {_shape(own)}")

    def add_heads(self, class_names: Sequence[str] | None, other_classes: bool) -> None:
        """Adds each classifier. `other_classes`: the weights are known to be for other classes than the model's."""
        for names in self.heads:
            self._add_head(names, class_names, other_classes)

    def _add_head(self, names: tuple[str, str], class_names: Sequence[str] | None, other_classes: bool) -> None:
        own_names = [name for name in names if name in self.own]  # some classifiers have no bias
        present = [name for name in names if name in self.weights]
        if not own_names:
            self.report.dropped.extend(f"{name} (the model has no such classifier)" for name in present)
            return
        if not present:
            self.new.update({name: self.own[name] for name in own_names})
            reason = "not among the weights, left as it was initialised"
            self.report.initialised.extend(f"{name} ({reason})" for name in own_names)
            return
        if present != own_names:
            lacking = [name for name in own_names if name not in present]
            self.problems.extend(f"{present[0]} comes without {name}" for name in lacking)
            self.problems.extend(f"{name} is not in the model" for name in present if name not in own_names)
            return
        given, own = ({name: values[name] for name in own_names} for values in (self.weights, self.own))
        classes, own_classes = (values[own_names[0]].shape[0] for values in (given, own))
        if any(
            given[name].shape[:1] != (classes,) or given[name].shape[1:] != own[name].shape[1:] for name in own_names
        ):
            shapes = " and ".join(f"{name} {_shape(value)}" for name, value in given.items())
            self.problems.append(f"{shapes} do not fit {' and '.join(_shape(value) for value in own.values())}")
        elif classes == own_classes and not other_classes:
            self.new.update(given)
            self.report.loaded.extend(own_names)
        else:
            rows = None
            if classes == IMAGENET_22K_CLASSES and own_classes == 1000:  # by synset, even if `other_classes`
                rows = imagenet_22k_rows(class_names or ImageNetInfo("imagenet-1k").label_names())
            self._add_converted_head(own_names, rows)

    def _add_converted_head(self, names: list[str], rows: list[int] | None) -> None:
        """Adds these rows of the given classifier or, if None, a classifier of zeros."""
        for name in names:
            change = f"{_shape(self.weights[name])} -> {_shape(self.own[name])}"
            if rows is None:
                self.new[name] = torch.zeros_like(self.own[name])
                self.report.initialised.append(f"{name} ({change}, other classes: starts from zeros)")
            else:
                self.new[name] = self.weights[name][rows]
                self.report.resized.append(f"{name} ({change}, the rows of ImageNet-1K's classes in ImageNet-22K)")


def _why_dropped(name: str, value: object, own: Tensor | None) -> str:
    """The reason for dropping a derived entry. Reports a different window, which no other tensor of V2 shows."""
    if name.endswith(".k_bias"):
        return "cosine attention has no key bias: it had no effect"
    if name.endswith(COORDINATES) and own is not None and isinstance(value, Tensor) and value.numel() != own.numel():
        given_window, own_window = ((math.isqrt(table.numel() // 2) + 1) // 2 for table in (value, own))
        return (
            f"made for windows of {given_window}, the model has {own_window}: the continuous bias needs no resizing; "
            "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES sets the window that its coordinates are scaled by"
        )
    return "derived from the configuration"


def imagenet_22k_rows(class_names: Sequence[str]) -> list[int] | None:
    """The rows of a released 21,841-class head for `class_names`; None if these are not ImageNet-1K's synsets.

    The released heads follow timm's sorted list of ImageNet-22K's synsets, ranks counted from 0, with three
    exceptions: rows are one later from rank 9,211 on, two later from rank 15,730 on, and n04399382, which timm's list
    lacks, is row 5,564.
    """
    if sorted(class_names) != sorted(ImageNetInfo("imagenet-1k").label_names()):
        return None
    ranks = {synset: rank for rank, synset in enumerate(sorted(ImageNetInfo("imagenet-22k").label_names()))}
    rows = {synset: rank + (rank >= 9211) + (rank >= 15730) for synset, rank in ranks.items()}
    rows["n04399382"] = 5564
    return [rows[name] for name in class_names]


def _resize(name: str, value: Tensor, own: Tensor) -> Tensor | None:
    """`value` resized to the shape of `own`, both on square grids; None if no rule applies."""
    kind = name.rpartition(".")[2]
    if kind == BIAS_TABLE and value.ndim == 2 and value.shape[1] == own.shape[1]:  # (old * old, nH)
        old, new = math.isqrt(value.shape[0]), math.isqrt(own.shape[0])
    elif kind == POSITIONS and value.ndim == 3 and value.shape[::2] == own.shape[::2]:  # (1, old * old, C)
        old, new = math.isqrt(value.shape[1]), math.isqrt(own.shape[1])
    else:
        return None
    grid = value.reshape(-1, value.shape[-1])
    if grid.shape[0] != old**2:
        return None
    return resize_grid(grid.float(), (old, old), (new, new)).reshape(own.shape)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _refusal(source: str, weight_format: str, fraction: float, problems: list[str]) -> str:
    shown = [f"  {line}" for line in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"  … and {len(problems) - len(shown)} more")
    return "\n".join(
        [
            f"{source} (format: {weight_format}): do not fit the model; nothing was loaded. {fraction:.1%} of the "
            "parameters have a place in it. The first differences:",
            *shown,
            "Set MODEL.TYPE and the keys of the architecture (MODEL.SWIN.* or MODEL.SWINV2.*: EMBED_DIM, DEPTHS, "
            "NUM_HEADS, APE, …) to the model that the weights were made for, or give other weights to --pretrained or "
            "--resume.",
        ]
    )
