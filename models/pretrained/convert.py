"""Detects the format of Swin weights by their names, and converts them to this project's format and back, losslessly.

All functions work on state dicts in memory. The formats are defined in `models/pretrained/key_maps.py`.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.ops.position_bias import relative_position_index
from models.pretrained.key_maps import (
    COORDINATES,
    DERIVED,
    HF,
    HF5,
    INDEX,
    MMPRETRAIN,
    ORIGINAL,
    TIMM,
    TORCHVISION,
    Conversion,
    KeyPattern,
    KeyPosition,
    WeightFormat,
)
from models.swin_transformer_v2 import log_spaced_offsets
from utils.errors import UserError

MIN_MATCHED_FRACTION = 0.95  # of the values in a state dict: with fewer in the model, the weights are refused
TOP_LEVEL_KEYS = ("absolute_pos_embed", "patch_embed", "layers", "norm", "head")  # of this project's names

# A compiled rule: patterns to read, patterns to write, and the conversion of the tensors.
_CompiledRule = tuple[list[KeyPattern], list[KeyPattern], Conversion]


@dataclass(frozen=True)
class DetectedFormat:
    """Weights without their prefix, with their format.

    Attributes:
        weights: name without prefix to tensor.
        format: None if it was not recognized; then no prefix was removed.
        prefix: the removed prefix, without the part that belongs to the format.
        outside: those of the names that did not start with the whole prefix, for example a classifier next to a
            backbone, or parts of a larger model.
    """

    weights: dict[str, Tensor]
    format: WeightFormat | None
    prefix: str
    outside: frozenset[str]


def swin_version(names: Iterable[str]) -> int:
    """2 for weights of Swin V2, whose attention has a logit scale in every format; otherwise 1."""
    return 2 if any(name.endswith(".logit_scale") for name in names) else 1


def format_and_prefix(names: Iterable[str]) -> tuple[WeightFormat | None, str]:
    """Detects the format of a state dict and the prefix of its names, from the names alone.

    Raises:
        UserError: the names contain several Swins.
    """
    names = list(names)
    anchors = {weight_format.anchor: weight_format for weight_format in (ORIGINAL, TORCHVISION, HF, MMPRETRAIN)}
    found = [
        (anchor, name.removesuffix(anchor))
        for name in names
        for anchor in anchors
        if name == anchor or name.endswith("." + anchor)
    ]
    if not found:
        return None, ""
    if len(found) > 1:
        prefixes = " and ".join(repr(prefix) for _, prefix in found)
        raise UserError(f"there are several models, under {prefixes}. Save the one to use in a file of its own")
    anchor, prefix = found[0]
    weight_format, unprefixed = anchors[anchor], {_remove_prefix(prefix, name) for name in names}
    if weight_format is ORIGINAL:  # TIMM has the same anchor
        merging = {int(name.split(".")[1]) for name in unprefixed if re.match(r"layers\.\d+\.downsample\.", name)}
        if "head.fc.weight" in unprefixed or (merging and 0 not in merging):
            weight_format = TIMM
    elif weight_format is HF and "encoder.layers.0.blocks.0.attention.q_proj.weight" in unprefixed:
        weight_format = HF5  # with the same anchor
    return weight_format, prefix


def detect_format(weights: Mapping[str, Tensor]) -> DetectedFormat:
    """Detects the format of `weights` and removes the prefix of their names.

    Raises:
        UserError: several models, or names that become equal without their prefix.
    """
    weight_format, prefix = format_and_prefix(weights)
    unprefixed = {_remove_prefix(prefix, name): value for name, value in weights.items()}
    if len(unprefixed) < len(weights):
        raise UserError(f"some weights occur twice, with and without the prefix {prefix!r}. Keep one of each")
    outside = frozenset(_remove_prefix(prefix, name) for name in weights if not name.startswith(prefix))
    body_prefixes = weight_format.body_prefixes if weight_format else ()
    of_format = next((part for part in body_prefixes if part and prefix.endswith(part)), "")
    return DetectedFormat(unprefixed, weight_format, prefix.removesuffix(of_format), outside)


def to_original(detected: DetectedFormat) -> dict[str, Tensor]:
    """Converts weights to this project's names. Names that their format does not have stay unchanged."""
    if detected.format is None or detected.format.rules is None:
        return detected.weights
    rules = _compile(detected.format, swin_version(detected.weights), to_ours=True)
    return _convert(detected.weights, rules)[0]


def from_original(
    weights: Mapping[str, Tensor], target: WeightFormat, window: int | None = None, keep_derived: bool = False
) -> dict[str, Tensor]:
    """Converts weights with this project's names to the format `target`, complete for strict loading there.

    Args:
        window: side of the windows in tokens. Needed only for Swin V2, if `target` stores buffers that depend on it
            and `weights` lacks them; the bias tables of V1 imply it.
        keep_derived: keep derived buffers that `target` does not store but has names for, as older releases of the
            libraries did.

    Raises:
        UserError: a name that no Swin of this format has, or `window` is missing.
    """
    allowed = DERIVED if keep_derived else target.stored
    kept = {n: value for n, value in weights.items() if _last_part(n) not in DERIVED or _last_part(n) in allowed}
    if target.rules is None:
        return kept
    version = swin_version(weights)
    _refuse_unsupported_variants(weights, version, target)
    if INDEX in target.stored and version in target.computed:
        kept |= _missing_buffers(kept, version, window)
    converted, unmatched = _convert(kept, _compile(target, version, to_ours=False))
    unknown = [name for name in unmatched if _last_part(name) not in DERIVED]
    if unknown:
        raise UserError(
            f"no model of the format {target.name!r} has {', '.join(unknown[:6])}{', …' if unknown[6:] else ''}: "
            "only parameters that both models have can be converted"
        )
    converted = {name: value for name, value in converted.items() if name not in unmatched}
    if "head.weight" in weights:
        body = target.body_prefixes[version - 1]
        heads = ("classifier.", "head.")
        converted = {n if n.startswith(heads) else body + n: value for n, value in converted.items()}
    return converted


def _refuse_unsupported_variants(weights: Mapping[str, Tensor], version: int, target: WeightFormat) -> None:
    """Refuses Swin-MLP and the paper's ablations, which other libraries lack and would read as another model."""
    for name, value in weights.items():
        prefix, qkv, _ = name.rpartition("qkv.weight")
        table = prefix + "relative_position_bias_table"
        if (
            "spatial_mlp" in name
            or (qkv and value.shape[0] != 3 * value.shape[1])
            or (qkv and version == 1 and table not in weights)
        ):
            raise UserError(
                f"{name}: this is Swin-MLP or an ablation of the paper's table 4, for which the format {target.name!r} "
                "has no model; Swin V1 and V2 can be converted"
            )


def _missing_buffers(weights: Mapping[str, Tensor], version: int, window: int | None) -> dict[str, Tensor]:
    """Computes relative position indices, and V2's tables of offsets, for the attention modules that lack them."""
    buffers: dict[str, Tensor] = {}
    for name in weights:
        prefix, qkv, _ = name.rpartition("qkv.weight")
        if not qkv or prefix + INDEX in weights:
            continue
        if version == 1:
            window = (math.isqrt(weights[prefix + "relative_position_bias_table"].shape[0]) + 1) // 2
        elif window is None:
            raise UserError(
                "the weights of a Swin V2 do not imply its window size, and this format stores tables that depend on "
                "it: give it with --window-size (8 in torchvision's own models)"
            )
        else:
            side = 2 * window - 1
            buffers[prefix + COORDINATES] = log_spaced_offsets(window, 0).reshape(1, side, side, 2)
        buffers[prefix + INDEX] = relative_position_index(window)
    return buffers


def matched_fraction(weights: Mapping[str, object], names: Collection[str]) -> float:
    """The fraction of the values in `weights` whose name is in `names`. Derived buffers are not counted."""
    sizes = {
        name: value.numel()
        for name, value in weights.items()
        if isinstance(value, Tensor) and _last_part(name) not in DERIVED
    }
    return sum(size for name, size in sizes.items() if name in names) / max(sum(sizes.values()), 1)


@functools.cache
def _compile(weight_format: WeightFormat, version: int, to_ours: bool) -> list[_CompiledRule]:
    """Compiles the rules of a format for one version of Swin and one direction."""
    compiled = []
    for rule in weight_format.rules or ():
        if rule.version in (0, version):
            ours, theirs = [KeyPattern(text) for text in rule.ours], [KeyPattern(text) for text in rule.theirs]
            compiled.append((theirs, ours, rule.to_ours) if to_ours else (ours, theirs, rule.to_theirs))
    return compiled


def _convert(weights: Mapping[str, Tensor], rules: list[_CompiledRule]) -> tuple[dict[str, Tensor], list[str]]:
    """Applies `rules`. Also returns the unmatched names: those without a rule, or whose rule lacks other tensors.

    Unmatched tensors are in the result under their old names.
    """
    unmatched: list[str] = []
    groups: dict[tuple[int, KeyPosition], dict[int, str]] = {}  # (rule, position) to names, by index in the rule
    for name in weights:
        match = _find_rule(name, rules)
        if match is None:
            unmatched.append(name)
        else:
            number, index, position = match
            groups.setdefault((number, position), {})[index] = name
    converted: dict[str, Tensor] = {}
    for (number, position), names in groups.items():
        read, write, convert = rules[number]
        values = [weights[names[k]] if k in names else None for k in range(len(read))]
        complete = all(value is not None or not pattern.required for value, pattern in zip(values, read, strict=True))
        try:
            results = convert(values) if complete else None
        except (ValueError, RuntimeError, IndexError):  # the shapes do not match: loading will name the missing tensor
            results = None
        if results is None:
            unmatched.extend(names.values())
        else:
            pairs = zip(write, results, strict=True)
            converted.update({pattern.format(position): value for pattern, value in pairs if value is not None})
    return converted | {name: weights[name] for name in unmatched}, unmatched


def _find_rule(name: str, rules: list[_CompiledRule]) -> tuple[int, int, KeyPosition] | None:
    """The number of the rule that matches `name`, the index of the pattern in it, and the position."""
    for number, (read, _, _) in enumerate(rules):
        for index, pattern in enumerate(read):
            position = pattern.parse(name)
            if position is not None:
                return number, index, position
    return None


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _remove_prefix(prefix: str, name: str) -> str:
    """`name` without the longest of its leading parts that is also the start of `prefix`."""
    parts = prefix.split(".")[:-1]
    for count in range(len(parts), 0, -1):
        start = ".".join(parts[:count]) + "."
        if name.startswith(start):
            return name[len(start) :]
    return name
