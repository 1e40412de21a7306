"""Swin weights of any origin: their layout recognised by the names, translated to this project's and back without loss.

All works on state dicts in memory; the layouts themselves stand in `models/pretrained/key_maps.py`.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.ops.window import relative_position_index
from models.pretrained.key_maps import (
    COORDINATES,
    DERIVED,
    HF,
    HF5,
    INDEX,
    LAYOUTS,
    ORIGINAL,
    TIMM,
    TORCHVISION,
    Layout,
    Pattern,
)
from models.swin_transformer_v2 import log_spaced_offsets
from utils.errors import UserError

__all__ = [
    "COORDINATES",
    "DERIVED",
    "LAYOUTS",
    "MIN_MATCHED_FRACTION",
    "TOP_LEVEL_KEYS",
    "ORIGINAL",
    "Layout",
    "DetectedFormat",
    "from_original",
    "detect_format",
    "matched_fraction",
    "to_original",
    "version_of",
    "strip_prefix",
]

MIN_MATCHED_FRACTION = 0.95  # of the numbers among some weights that must have a place in a model
TOP_LEVEL_KEYS = (
    "absolute_pos_embed",
    "patch_embed",
    "layers",
    "norm",
    "head",
)  # the first words of this project's names


@dataclass(frozen=True)
class DetectedFormat:
    """Weights without the prefix before their names, and how they came.

    `layout` is None where none was recognised; nothing was removed then. `prefix` does not include a layout's own.
    `outside` are those of the names that did not stand behind all of it: the classifier perhaps, or parts of a larger
    program.
    """

    weights: dict[str, Tensor]
    layout: Layout | None
    prefix: str
    outside: frozenset[str]


def version_of(names: Iterable[str]) -> int:
    """2 for the weights of a Swin V2, whose attention has a logit scale in every layout, else 1."""
    return 2 if any(name.endswith(".logit_scale") for name in names) else 1


def detect_format(names: Iterable[str]) -> tuple[Layout | None, str]:
    """The layout of weights with these names and the prefix before them, both from the names alone.

    Raises:
        UserError: there are several Swins.
    """
    names = list(names)
    anchors = {layout.anchor: layout for layout in (ORIGINAL, TORCHVISION, HF)}  # TIMM and HF5 share theirs
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
    layout, inside = anchors[anchor], {_without(prefix, name) for name in names}
    if layout is ORIGINAL:
        merging = {int(name.split(".")[1]) for name in inside if re.match(r"layers\.\d+\.downsample\.", name)}
        if "head.fc.weight" in inside or (merging and 0 not in merging):
            layout = TIMM
    elif layout is HF and "encoder.layers.0.blocks.0.attention.q_proj.weight" in inside:
        layout = HF5
    return layout, prefix


def strip_prefix(weights: Mapping[str, Tensor]) -> DetectedFormat:
    """Weights of any layout, recognised.

    Raises:
        UserError: several models, or names that become equal without their prefix.
    """
    layout, prefix = detect_format(weights)
    bare = {_without(prefix, name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        raise UserError(f"some weights are there twice, with and without the prefix {prefix!r}. Keep one of each")
    outside = frozenset(_without(prefix, name) for name in weights if not name.startswith(prefix))
    own = next((word for word in (layout.body if layout else ()) if word and prefix.endswith(word)), "")
    return DetectedFormat(bare, layout, prefix.removesuffix(own), outside)


def to_original(found: DetectedFormat) -> dict[str, Tensor]:
    """The weights in the names of this project. Names that their layout does not know stay as they are."""
    if found.layout is None or found.layout.rules is None:
        return found.weights
    table = _compiled(found.layout, version_of(found.weights), incoming=True)
    return _translated(found.weights, table)[0]


def from_original(
    weights: Mapping[str, Tensor], layout: Layout, window: int | None = None, keep_derived: bool = False
) -> dict[str, Tensor]:
    """Weights with the names of this project in another layout, ready for strict loading there.

    Args:
        window: side of the windows, in tokens; needed where the layout stores buffers that depend on it and `weights`
            lack them, and only for Swin V2: the bias tables of V1 tell.
        keep_derived: keep derived buffers that the layout does not store but has names for, as older releases of the
            libraries did.

    Raises:
        UserError: names that are not of a Swin that exists in this layout, or `window` is needed.
    """
    allowed = DERIVED if keep_derived else layout.stored
    kept = {name: value for name, value in weights.items() if _kind(name) not in DERIVED or _kind(name) in allowed}
    if layout.rules is None:
        return kept
    version = version_of(weights)
    _refuse_kinds_of_our_own(weights, version, layout)
    if INDEX in layout.stored:
        kept |= _missing_buffers(kept, version, window)
    out, left = _translated(kept, _compiled(layout, version, incoming=False))
    unknown = [name for name in left if _kind(name) not in DERIVED]
    if unknown:
        raise UserError(
            f"no model of the layout {layout.name!r} has {', '.join(unknown[:6])}{', …' if unknown[6:] else ''}: "
            "only what the models of both have in common can be converted"
        )
    out = {name: value for name, value in out.items() if name not in left}
    if "head.weight" in weights:
        body = layout.body[version - 1]
        out = {name if name.startswith(("classifier.", "head.")) else body + name: v for name, v in out.items()}
    return out


def _refuse_kinds_of_our_own(weights: Mapping[str, Tensor], version: int, layout: Layout) -> None:
    """Other libraries have neither Swin-MLP nor the paper's ablations, and would read them as something else."""
    for name, value in weights.items():
        prefix, found, _ = name.rpartition("qkv.weight")
        table = prefix + "relative_position_bias_table"
        if (
            "spatial_mlp" in name
            or (found and value.shape[0] != 3 * value.shape[1])
            or (found and version == 1 and table not in weights)
        ):
            raise UserError(
                f"{name}: this is Swin-MLP or an ablation of the paper's table 4, for which the layout {layout.name!r} "
                "has no model; Swin V1 and V2 can be converted"
            )


def _missing_buffers(weights: Mapping[str, Tensor], version: int, window: int | None) -> dict[str, Tensor]:
    """The relative position indices, and V2's tables of offsets, of those attention modules that lack them."""
    made: dict[str, Tensor] = {}
    for name in weights:
        prefix, found, _ = name.rpartition("qkv.weight")
        if not found or prefix + INDEX in weights:
            continue
        if version == 1:
            window = (math.isqrt(weights[prefix + "relative_position_bias_table"].shape[0]) + 1) // 2
        elif window is None:
            raise UserError(
                "the window cannot be read off the weights of a Swin V2, and this layout stores tables that depend on "
                "it: say it with --window-size (8 in torchvision's own models)"
            )
        else:
            side = 2 * window - 1
            made[prefix + COORDINATES] = log_spaced_offsets(window, 0).reshape(1, side, side, 2)
        made[prefix + INDEX] = relative_position_index(window)
    return made


def matched_fraction(weights: Mapping[str, object], names: Collection[str]) -> float:
    """Which share of the numbers in `weights`, not counting what is derived, stands under one of `names`."""
    sizes = {
        name: value.numel()
        for name, value in weights.items()
        if isinstance(value, Tensor) and _kind(name) not in DERIVED
    }
    return sum(size for name, size in sizes.items() if name in names) / max(sum(sizes.values()), 1)


@functools.cache
def _compiled(layout: Layout, version: int, incoming: bool) -> list[tuple[list[Pattern], list[Pattern], Callable]]:
    """The rules for one version of Swin and one direction: patterns to read, patterns to write, what is done."""
    table = []
    for rule in layout.rules:
        if rule.version in (0, version):
            ours, theirs = [Pattern(text) for text in rule.ours], [Pattern(text) for text in rule.theirs]
            table.append((theirs, ours, rule.to_ours) if incoming else (ours, theirs, rule.to_theirs))
    return table


def _translated(weights: Mapping[str, Tensor], table: list) -> tuple[dict[str, Tensor], list[str]]:
    """Each name by its rule; and the names that no rule knows, or whose rule lacks its other tensors: these stay."""
    left: list[str] = []
    groups: dict[tuple, dict[int, str]] = {}  # (rule, place) to names, by their position in the rule
    for name in weights:
        found = _find(name, table)
        if found is None:
            left.append(name)
        else:
            number, position, place = found
            groups.setdefault((number, place), {})[position] = name
    out: dict[str, Tensor] = {}
    for (number, place), names in groups.items():
        read, write, transform = table[number]
        values = [weights[names[k]] if k in names else None for k in range(len(read))]
        try:
            if any(value is None and pattern.required for value, pattern in zip(values, read, strict=True)):
                raise ValueError("incomplete")
            made = transform(values)
        except (ValueError, RuntimeError):  # their shapes do not go together: whoever loads them says what is missing
            left.extend(names.values())
        else:
            out.update({p.name(place): value for p, value in zip(write, made, strict=True) if value is not None})
    return out | {name: weights[name] for name in left}, left


def _find(name: str, table: list) -> tuple[int, int, tuple[int, int, str]] | None:
    """The rule of a name, its position in it, and the place; None if there is none."""
    for number, (read, _, _) in enumerate(table):
        for position, pattern in enumerate(read):
            place = pattern.place(name)
            if place is not None:
                return number, position, place
    return None


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _without(prefix: str, name: str) -> str:
    """`name` without the prefix, or without as many of its first words as `name` has."""
    words = prefix.split(".")[:-1]
    for count in range(len(words), 0, -1):
        start = ".".join(words[:count]) + "."
        if name.startswith(start):
            return name[len(start) :]
    return name
