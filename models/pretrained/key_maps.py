"""One table of rules for each layout in which Swin weights exist: on the left the names of this project, which are the
original's, on the right those of the layout. `models.pretrained.convert` reads them from right to left for weights that come in,
and from left to right for weights that go out.

Shapes: `N` tokens in a window.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What files hold beside what is learnt, by the last word of its name: buffers that follow from the configuration, and
# the key bias of Swin V2, which torchvision keeps in its files and does not use.
INDEX, MASK, COORDINATES, KEY_BIAS = "relative_position_index", "attn_mask", "relative_coords_table", "k_bias"
DERIVED = (INDEX, MASK, COORDINATES, KEY_BIAS)

Tensors = list[Tensor | None]  # those of one rule, in its order; None where an optional one is absent

# What the names of a pattern's numbers mean: of stage i, written factor · i + offset.
_STAGE = {"i": (1, 0), "i+1": (1, 1), "2i+1": (2, 1), "2i+2": (2, 2)}


class Pattern:
    """Names of one kind, such as `layers.{i}.blocks.{j}.norm1.{rest}`; with `?` behind it, of a tensor that may lack.

    A name and its place, (stage, block, rest), determine each other. Stages count from 0; what a pattern does not
    mention is -1 or "".
    """

    def __init__(self, text: str):
        self.required = not text.endswith("?")
        self.words = re.split(r"\{(.+?)\}", text.removesuffix("?"))  # literal, number, literal, …
        groups = {"rest": "(?P<rest>.+)", "j": r"(?P<j>\d+)"}
        expression = "".join(
            groups.get(word, r"(?P<i>\d+)") if k % 2 else re.escape(word) for k, word in enumerate(self.words)
        )
        self.expression = re.compile(expression)
        self.factor, self.offset = next((_STAGE[word] for word in self.words[1::2] if word in _STAGE), (1, 0))

    def place(self, name: str) -> tuple[int, int, str] | None:
        """Where `name` belongs, or None where it is not of this kind."""
        match = self.expression.fullmatch(name)
        if match is None:
            return None
        found = match.groupdict()
        stage, left = divmod(int(found["i"]) - self.offset, self.factor) if "i" in found else (-1, 0)
        if left or ("i" in found and stage < 0):
            return None
        return stage, int(found.get("j", -1)), found.get("rest", "")

    def name(self, place: tuple[int, int, str]) -> str:
        stage, block, rest = place
        values = {"j": str(block), "rest": rest, **{key: str(f * stage + o) for key, (f, o) in _STAGE.items()}}
        return "".join(values[word] if k % 2 else word for k, word in enumerate(self.words))


@dataclass(frozen=True)
class Rule:
    """`ours` ↔ `theirs`: patterns, one or several on each side, and what is done to the tensors on the way."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = list
    to_theirs: Callable[[Tensors], Tensors] = list
    version: int = 0  # of Swin, 1 or 2, where it holds; 0 for both


@dataclass(frozen=True)
class Layout:
    """One way to name and cut the weights of a Swin.

    Args:
        name: for people, and what `tools.convert_weights --to` takes.
        origin: whose models are saved like this; the same as `name` but for further spellings.
        anchor: a name that every file has, behind any prefix.
        rules: the first that matches a name is its rule. None for the layout of this project.
        stored: those of `DERIVED` that are part of a file.
        body: for Swin V1 and V2, what stands before all names but the classifier's, where there is a classifier.
    """

    name: str
    origin: str
    anchor: str
    rules: tuple[Rule, ...] | None
    stored: tuple[str, ...] = ()
    body: tuple[str, str] = ("", "")


def _same(*pairs: tuple[str, str], version: int = 0) -> tuple[Rule, ...]:
    return tuple(Rule((ours,), (theirs,), version=version) for ours, theirs in pairs)


def _concatenated(parts: Tensors) -> Tensors:
    return [torch.cat(parts)]


def _in_three(whole: Tensors) -> Tensors:
    return list(whole[0].chunk(3))


def _bias_in_three(whole: Tensors) -> Tensors:
    """To biases of queries, keys and values; without that of the keys where it is zero, as it is in a fresh model."""
    queries, keys, values = _in_three(whole)
    return [queries, keys if keys.any() else None, values]


def _bias_of_three(parts: Tensors) -> Tensors:
    queries, keys, values = parts
    return [torch.cat([queries, torch.zeros_like(queries) if keys is None else keys, values])]


def _square(flat: Tensors) -> Tensors:
    """(N·N,) to (N, N)."""
    side = math.isqrt(flat[0].numel())
    return [flat[0].reshape(side, side)]


def _flat(square: Tensors) -> Tensors:
    return [square[0].flatten()]


ORIGINAL = Layout("original", "original", "layers.0.blocks.0.norm1.weight", None, stored=DERIVED)

_BLOCK = "layers.{i}.blocks.{j}."

TIMM = Layout(
    "timm",
    "timm",
    "layers.0.blocks.0.norm1.weight",
    _same(
        # Patches are merged at the start of the next stage, and the classifier is wrapped.
        ("layers.{i}.downsample.{rest}", "layers.{i+1}.downsample.{rest}"),
        ("head.{rest}", "head.fc.{rest}"),
        (_BLOCK + "{rest}", _BLOCK + "{rest}"),
        ("patch_embed.{rest}", "patch_embed.{rest}"),
        ("norm.{rest}", "norm.{rest}"),
    ),
)

_TV_BLOCK = "features.{2i+1}.{j}."

TORCHVISION = Layout(
    "torchvision",
    "torchvision",
    "features.1.0.norm1.weight",
    (
        Rule((_BLOCK + "attn." + INDEX,), (_TV_BLOCK + "attn." + INDEX,), _square, _flat),
        Rule(
            (_BLOCK + "attn.q_bias", _BLOCK + "attn.k_bias?", _BLOCK + "attn.v_bias"),
            (_TV_BLOCK + "attn.qkv.bias",),
            _bias_in_three,
            _bias_of_three,
            version=2,
        ),
        *_same(
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


def _hf_joined(kind: str, version: int = 0) -> Rule:
    theirs = tuple(f"{_HF_SELF}{part}.{kind}" for part in ("query", "key", "value"))
    return Rule((f"{_BLOCK}attn.qkv.{kind}",), theirs, _concatenated, _in_three, version)


# Files of transformers: the names of its models up to release 4; release 5 still writes them.
HF = Layout(
    "hf",
    "hf",
    "encoder.layers.0.blocks.0.layernorm_before.weight",
    (
        _hf_joined("weight"),
        _hf_joined("bias", version=1),
        *_same(
            (_BLOCK + "attn.q_bias", _HF_SELF + "query.bias"),
            (_BLOCK + "attn.v_bias", _HF_SELF + "value.bias"),
            version=2,
        ),
        *_same(
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
    body=("swin.", "swinv2."),
)

# How the modules of Swin V1 are called in release 5: `state_dict()` has these names, `save_pretrained` undoes them.
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


HF5 = Layout(
    "hf5",
    "hf",
    HF.anchor,
    tuple(
        Rule(rule.ours, tuple(map(_hf5_name, rule.theirs)), rule.to_ours, rule.to_theirs, rule.version)
        for rule in HF.rules
    ),
    body=HF.body,
)

LAYOUTS = {layout.name: layout for layout in (ORIGINAL, TIMM, TORCHVISION, HF, HF5)}
