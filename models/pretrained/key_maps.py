"""Formats of Swin weights: for each, one table of rules between this project's parameter names and that format's.

This project's names are those of the original code. `models.pretrained.convert` reads a table from right to left to
import weights, and from left to right to export them.

Shapes: `N` tokens in a window.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Entries of weight files that are not learned, by the last part of their name: buffers that follow from the
# configuration, and the key bias of Swin V2, which torchvision stores and does not use.
INDEX, MASK, COORDINATES, KEY_BIAS = "relative_position_index", "attn_mask", "relative_coords_table", "k_bias"
DERIVED = (INDEX, MASK, COORDINATES, KEY_BIAS)

Tensors = list[Tensor]  # the tensors of one rule, in its order

# Converts the tensors of one rule; None for an optional one that is absent. A conversion says by its own type whether
# there are optional ones.
Conversion = Callable[[list[Any]], Sequence[Tensor | None]]

# Stage numbers in patterns: the number written for stage i is factor * i + offset.
_STAGE = {"i": (1, 0), "i+1": (1, 1), "2i+1": (2, 1), "2i+2": (2, 2)}


class KeyPosition(NamedTuple):
    """Values of a pattern's placeholders. Stages and blocks count from 0; -1 or "" if the pattern has no such part."""

    stage: int
    block: int
    rest: str


class KeyPattern:
    """A family of names, such as `layers.{i}.blocks.{j}.norm1.{rest}`. A trailing `?` marks an optional tensor.

    `parse` and `format` are inverse to each other.
    """

    def __init__(self, text: str):
        self.required = not text.endswith("?")
        self.parts = re.split(r"\{(.+?)\}", text.removesuffix("?"))  # literal, placeholder, literal, …
        groups = {"rest": "(?P<rest>.+)", "j": r"(?P<j>\d+)"}
        expression = "".join(
            groups.get(part, r"(?P<i>\d+)") if k % 2 else re.escape(part) for k, part in enumerate(self.parts)
        )
        self.expression = re.compile(expression)
        self.factor, self.offset = next((_STAGE[part] for part in self.parts[1::2] if part in _STAGE), (1, 0))

    def parse(self, name: str) -> KeyPosition | None:
        """The placeholders' values in `name`, or None if the pattern does not match."""
        match = self.expression.fullmatch(name)
        if match is None:
            return None
        groups = match.groupdict()
        stage, remainder = divmod(int(groups["i"]) - self.offset, self.factor) if "i" in groups else (-1, 0)
        if remainder or ("i" in groups and stage < 0):
            return None
        return KeyPosition(stage, int(groups.get("j", -1)), groups.get("rest", ""))

    def format(self, position: KeyPosition) -> str:
        """The name at `position`."""
        stage, block, rest = position
        values = {"j": str(block), "rest": rest, **{key: str(f * stage + o) for key, (f, o) in _STAGE.items()}}
        return "".join(values[part] if k % 2 else part for k, part in enumerate(self.parts))


@dataclass(frozen=True)
class Rule:
    """Patterns in this project's names (`ours`) and in the format's (`theirs`), and the conversion between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Conversion = list
    to_theirs: Conversion = list
    version: int = 0  # the Swin version it applies to, 1 or 2; 0 for both


@dataclass(frozen=True)
class WeightFormat:
    """One way to name and split the weights of a Swin.

    Args:
        name: shown in messages, and the value of `tools.convert_weights --to`.
        origin: the library that writes this format. Weights of one that is not in utils.origins.ORIGINS are evaluated
            like the original code's.
        anchor: a name that every file in this format has, after any prefix.
        rules: the first rule that matches a name applies. None for this project's own format.
        stored: the entries of `DERIVED` that a file contains.
        computed: the versions of Swin for which stored entries are computed where they are missing.
        body_prefixes: for Swin V1 and V2, the prefix of all names except the classifier's, in files with a classifier.
    """

    name: str
    origin: str
    anchor: str
    rules: tuple[Rule, ...] | None
    stored: tuple[str, ...] = ()
    computed: tuple[int, ...] = (1, 2)
    body_prefixes: tuple[str, str] = ("", "")


def _renames(*pairs: tuple[str, str], version: int = 0) -> tuple[Rule, ...]:
    return tuple(Rule((ours,), (theirs,), version=version) for ours, theirs in pairs)


def _join_qkv(parts: Tensors) -> Tensors:
    return [torch.cat(parts)]


def _split_qkv(joined: Tensors) -> Tensors:
    return list(joined[0].chunk(3))


def _split_qkv_bias(joined: Tensors) -> list[Tensor | None]:
    """Biases of queries, keys and values. A key bias of zeros, as in a new model, is omitted."""
    queries, keys, values = _split_qkv(joined)
    return [queries, keys if keys.any() else None, values]


def _join_qkv_bias(parts: list[Tensor | None]) -> Tensors:
    """The inverse, but a new model's bias gets its zeros back."""
    known = next(part for part in parts if part is not None)
    return [torch.cat([torch.zeros_like(known) if part is None else part for part in parts])]


def _to_square(flat: Tensors) -> Tensors:
    """(N * N,) to (N, N)."""
    side = math.isqrt(flat[0].numel())
    return [flat[0].reshape(side, side)]


def _flatten(square: Tensors) -> Tensors:
    return [square[0].flatten()]


ORIGINAL = WeightFormat("original", "original", "layers.0.blocks.0.norm1.weight", None, stored=DERIVED)

_BLOCK = "layers.{i}.blocks.{j}."

TIMM = WeightFormat(
    "timm",
    "timm",
    "layers.0.blocks.0.norm1.weight",
    _renames(
        # timm merges patches at the start of the next stage, and wraps the classifier in a module.
        ("layers.{i}.downsample.{rest}", "layers.{i+1}.downsample.{rest}"),
        ("head.{rest}", "head.fc.{rest}"),
        (_BLOCK + "{rest}", _BLOCK + "{rest}"),
        ("patch_embed.{rest}", "patch_embed.{rest}"),
        ("norm.{rest}", "norm.{rest}"),
    ),
)

_TV_BLOCK = "features.{2i+1}.{j}."

TORCHVISION = WeightFormat(
    "torchvision",
    "torchvision",
    "features.1.0.norm1.weight",
    (
        Rule((_BLOCK + "attn." + INDEX,), (_TV_BLOCK + "attn." + INDEX,), _to_square, _flatten),
        Rule(
            (_BLOCK + "attn.q_bias", _BLOCK + "attn.k_bias?", _BLOCK + "attn.v_bias"),
            (_TV_BLOCK + "attn.qkv.bias",),
            _split_qkv_bias,
            _join_qkv_bias,
            version=2,
        ),
        *_renames(
            (_BLOCK + "mlp.fc1.{rest}", _TV_BLOCK + "mlp.0.{rest}"),
            (_BLOCK + "mlp.fc2.{rest}", _TV_BLOCK + "mlp.3.{rest}"),
            (_BLOCK + "attn.{rest}", _TV_BLOCK + "attn.{rest}"),
            (_BLOCK + "norm1.{rest}", _TV_BLOCK + "norm1.{rest}"),
            (_BLOCK + "norm2.{rest}", _TV_BLOCK + "norm2.{rest}"),
            ("layers.{i}.downsample.{rest}", "features.{2i+2}.{rest}"),
            ("patch_embed.proj.{rest}", "features.0.0.{rest}"),
            ("patch_embed.norm.{rest}", "features.0.2.{rest}"),
            ("norm.{rest}", "norm.{rest}"),
            ("head.{rest}", "head.{rest}"),
        ),
    ),
    stored=(INDEX, COORDINATES, KEY_BIAS),
)

_HF_BLOCK = "encoder.layers.{i}.blocks.{j}."
_HF_SELF = _HF_BLOCK + "attention.self."


def _hf_qkv(kind: str, version: int = 0) -> Rule:
    theirs = tuple(f"{_HF_SELF}{part}.{kind}" for part in ("query", "key", "value"))
    return Rule((f"{_BLOCK}attn.qkv.{kind}",), theirs, _join_qkv, _split_qkv, version)


# Files of transformers have the names of its models up to release 4; release 5 still writes these names.
HF = WeightFormat(
    "hf",
    "hf",
    "encoder.layers.0.blocks.0.layernorm_before.weight",
    (
        _hf_qkv("weight"),
        _hf_qkv("bias", version=1),
        *_renames(
            (_BLOCK + "attn.q_bias", _HF_SELF + "query.bias"),
            (_BLOCK + "attn.v_bias", _HF_SELF + "value.bias"),
            version=2,
        ),
        *_renames(
            (_BLOCK + "attn.proj.{rest}", _HF_BLOCK + "attention.output.dense.{rest}"),
            (_BLOCK + "attn.cpb_mlp.{rest}", _HF_SELF + "continuous_position_bias_mlp.{rest}"),
            (_BLOCK + "attn.logit_scale", _HF_SELF + "logit_scale"),
            (_BLOCK + "attn.relative_position_bias_table", _HF_SELF + "relative_position_bias_table"),
            (_BLOCK + "attn." + INDEX, _HF_SELF + INDEX),
            (_BLOCK + "attn." + COORDINATES, _HF_SELF + COORDINATES),
            (_BLOCK + "norm1.{rest}", _HF_BLOCK + "layernorm_before.{rest}"),
            (_BLOCK + "norm2.{rest}", _HF_BLOCK + "layernorm_after.{rest}"),
            (_BLOCK + "mlp.fc1.{rest}", _HF_BLOCK + "intermediate.dense.{rest}"),
            (_BLOCK + "mlp.fc2.{rest}", _HF_BLOCK + "output.dense.{rest}"),
            ("layers.{i}.downsample.{rest}", "encoder.layers.{i}.downsample.{rest}"),
            ("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
            ("patch_embed.norm.{rest}", "embeddings.norm.{rest}"),
            ("absolute_pos_embed", "embeddings.position_embeddings"),
            ("norm.{rest}", "layernorm.{rest}"),
            ("head.{rest}", "classifier.{rest}"),
        ),
    ),
    body_prefixes=("swin.", "swinv2."),
)

# Module names of Swin V1 in release 5, as in `state_dict()`; `save_pretrained` writes the older names.
_HF5 = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.self.relative_position": "attention.relative_position_bias.relative_position",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _hf5_name(pattern: str) -> str:
    old = next((part for part in _HF5 if part in pattern), None)
    return pattern if old is None else pattern.replace(old, _HF5[old])


HF5 = replace(
    HF, name="hf5", rules=tuple(replace(rule, theirs=tuple(map(_hf5_name, rule.theirs))) for rule in HF.rules or ())
)

# Patches that are merged, in the original's order: (row, column) 00, 10, 01, 11, each with all of its channels.
_ROW_MAJOR = [0, 2, 1, 3]  # the same list reorders there and back


def _channels_first(merged: list[Tensor]) -> list[Tensor]:
    """Reorders the last dimension of 4 · C: from the original's patches of C channels to C channels of 4 patches.

    mmpretrain unfolds the map, which yields the patches row by row within each channel.
    """
    values = merged[0].unflatten(-1, (4, -1))
    return [values[..., _ROW_MAJOR, :].transpose(-1, -2).flatten(-2)]


def _patches_first(merged: list[Tensor]) -> list[Tensor]:
    """The inverse of `_channels_first`."""
    values = merged[0].unflatten(-1, (-1, 4)).transpose(-1, -2)
    return [values[..., _ROW_MAJOR, :].flatten(-2)]


_MM_BLOCK = "stages.{i}.blocks.{j}."


def _mm_merging(ours: str, theirs: str, version: int) -> Rule:
    return Rule((ours,), (theirs,), _patches_first, _channels_first, version)


# OpenMMLab's mmpretrain and mmdetection. Their Swins have four stages, and name the last norm after the last stage.
MMPRETRAIN = WeightFormat(
    "mmpretrain",
    "mmpretrain",
    "stages.0.blocks.0.attn.w_msa.qkv.weight",
    (
        # Swin V2 merges patches at the start of the next stage, and normalizes them after the reduction.
        _mm_merging("layers.{i}.downsample.reduction.weight", "stages.{i}.downsample.reduction.weight", 1),
        _mm_merging("layers.{i}.downsample.norm.{rest}", "stages.{i}.downsample.norm.{rest}", 1),
        _mm_merging("layers.{i}.downsample.reduction.weight", "stages.{i+1}.downsample.reduction.weight", 2),
        *_renames(("layers.{i}.downsample.norm.{rest}", "stages.{i+1}.downsample.norm.{rest}"), version=2),
        *_renames(
            (_BLOCK + "attn.{rest}", _MM_BLOCK + "attn.w_msa.{rest}"),
            (_BLOCK + "mlp.fc1.{rest}", _MM_BLOCK + "ffn.layers.0.0.{rest}"),
            (_BLOCK + "mlp.fc2.{rest}", _MM_BLOCK + "ffn.layers.1.{rest}"),
            (_BLOCK + "norm1.{rest}", _MM_BLOCK + "norm1.{rest}"),
            (_BLOCK + "norm2.{rest}", _MM_BLOCK + "norm2.{rest}"),
            ("patch_embed.proj.{rest}", "patch_embed.projection.{rest}"),
            ("patch_embed.norm.{rest}", "patch_embed.norm.{rest}"),
            ("absolute_pos_embed", "absolute_pos_embed"),
            ("norm.{rest}", "norm3.{rest}"),
            ("head.{rest}", "head.fc.{rest}"),
        ),
    ),
    # mmpretrain computes the buffers of V2 anew when it loads them.
    stored=(INDEX, COORDINATES),
    computed=(1,),
    body_prefixes=("backbone.", "backbone."),
)

FORMATS = {weight_format.name: weight_format for weight_format in (ORIGINAL, TIMM, TORCHVISION, HF, HF5, MMPRETRAIN)}
