"""Merges configuration values from YAML files (with BASE), flags and --opts into one typed tree, and writes it as YAML.

A value is an `Override` until it is merged: a key, a value, and the place where it was given. Text is converted to the
type of its key, so that `1e-8` is a number for a key that takes numbers, and `2024-01-01` a name for a key that takes
names. YAML files are read as text throughout: no tag builds an object, and no Python is executed. This file knows no
keys; config.py defines them.
"""

import difflib
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.config.foreign_flags import key_named
from utils.errors import UserError
from utils.paths import REPO_ROOT, expand_user

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NONES = ("", "none", "null", "~")
NOUNS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}
PLAIN_TAGS = {f"tag:yaml.org,2002:{tag}" for tag in "str int float bool null timestamp seq map".split()}

_FIRST_NAME = re.compile(r"^  NAME: (\S+)", re.MULTILINE)  # in a recipe: MODEL.NAME

_shortened = reprlib.Repr()
_shortened.maxstring = 100


@dataclass(frozen=True)
class Override:
    """A value for a key, and where it was given: the flag as typed, "--opts", or "FILE, line 7"."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True)
class KeyType:
    """The type of a key's values: an `element` (bool, int, float, str), or a `container` (list, tuple) of elements.

    Attributes:
        optional: None is a value too.
        words: texts that are values too, such as "auto".
    """

    element: type
    container: type | None = None
    optional: bool = False
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, default: object) -> "KeyType":
        """The type of `default`, which is neither None nor an empty list."""
        if isinstance(default, list | tuple):
            return cls(type(default[0]), type(default))
        return cls(type(default))

    def __str__(self) -> str:
        noun = f"a list of {PLURALS[self.element]}" if self.container else NOUNS[self.element]
        return ", or ".join([noun, *self.words, *(["None"] if self.optional else [])])

    def convert(self, value: object) -> object:
        """Converts `value` to this type.

        Raises:
            ValueError: it has another type. Booleans, NaN and infinity are not numbers here.
        """
        if self.optional and (value is None or isinstance(value, str) and value.strip().lower() in NONES):
            return None
        if isinstance(value, str) and value.strip().lower() in self.words:
            return value.strip().lower()
        if self.container is None:
            return self._convert_element(value)
        if isinstance(value, str):
            text = value.strip()
            text = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
            value = text.strip().removesuffix(",").split(",") if text.strip() else []
        if not isinstance(value, list | tuple):
            raise ValueError
        return self.container(self._convert_element(item) for item in value)

    def _convert_element(self, value: object) -> object:
        if isinstance(value, str) and self.element is bool:
            value = BOOLEANS.get(value.strip().lower(), value)
        elif isinstance(value, str) and self.element is not str or type(value) is int and self.element is float:
            value = self.element(value)
        if type(value) is not self.element or isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value


class UnknownKey(UserError):
    """There is no key of this name."""

    def __init__(self, message: str, key: str, origin: str):
        super().__init__(message)
        self.key = key
        self.origin = origin


def flatten(config: CfgNode) -> dict[str, object]:
    """Returns the leaves of the tree by full key, such as "TRAIN.EPOCHS", in the order of declaration."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, CfgNode):
            leaves.update({f"{name}.{key}": leaf for key, leaf in flatten(value).items()})
        else:
            leaves[name] = value
    return leaves


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Guesses which of `known` was meant: the same last part in another section, else the nearest spelling."""
    known, word = list(known), word.upper()
    leaf = word.rpartition(".")[2]
    same_leaf = [name for name in known if name.upper().rpartition(".")[2] == leaf]
    by_upper = {name.upper(): name for name in same_leaf or known}
    found = difflib.get_close_matches(word, by_upper, n=1, cutoff=0.0 if same_leaf else 0.6)
    if not found:
        by_upper = {name.upper().rpartition(".")[2]: name for name in known}
        found = difflib.get_close_matches(leaf, by_upper, n=1, cutoff=0.75)
    return by_upper[found[0]] if found else None


def refuse_unknown(key: str, origin: str, schema: dict[str, KeyType]) -> None:
    """Raises UserError unless `key` is a leaf of the configuration: UnknownKey unless it is a section."""
    if key in schema:
        return
    inside = [name for name in schema if name.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{origin}: {key} is a section, not a key. Set the keys inside it, such as {inside[0]}.")
    sections = {name.rpartition(".")[0] for name in schema} - {""}
    leaf = key.rpartition(".")[2]
    is_leaf_here = any(name.rpartition(".")[2] == leaf.upper() for name in schema)
    guess = (None if is_leaf_here else key_named(leaf)) or nearest(key, [*schema, *sections])
    advice = f"Did you mean {guess}?" if guess else "config.py lists all keys, each with a comment."
    shown = key if key.isprintable() and key else repr(key)
    raise UnknownKey(f"{origin}: there is no key {shown}. {advice}", key, origin)


def parse_opts(opts: Sequence[object]) -> list[Override]:
    """Turns KEY VALUE KEY VALUE … into overrides.

    Raises:
        UserError: a key without a value.
    """
    if len(opts) % 2:
        listed = " ".join(map(str, opts))
        raise UserError(f"--opts takes pairs, KEY VALUE, with a space between, but {listed!r} has {len(opts)} words.")
    return [Override(str(key), value, "--opts") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def read_files(path: str | Path, schema: dict[str, KeyType], parents: tuple[str, ...] = ()) -> list[Override]:
    """Reads the values of a YAML file, after those of the files that its BASE names (relative to it).

    Args:
        parents: the files whose BASE led here, outermost first.

    Raises:
        UserError: missing, not YAML, malformed, empty, a duplicate key, a section instead of a value, circular BASE.
    """
    path = Path(expand_user(str(path), "--cfg"))
    chain = (*parents, os.path.realpath(path))
    if chain[-1] in parents:
        raise UserError("BASE is circular: " + " → ".join(chain) + ". Remove one of these BASE lines.")
    overrides = _read_file(path, schema)
    inherited: list[Override] = []
    for override in [override for override in overrides if override.key == "BASE"]:
        for base in filter(None, _convert(override, schema)):
            base_path = path.parent / expand_user(base, f"{override.origin}: BASE")
            if not base_path.is_file():
                raise UserError(
                    f"{override.origin}: BASE names {base}, but there is no file {base_path}. Fix the path."
                )
            inherited += read_files(base_path, schema, chain)
    return inherited + [override for override in overrides if override.key != "BASE"]


def merge(config: CfgNode, overrides: Iterable[Override], schema: dict[str, KeyType]) -> dict[str, str]:
    """Sets each key to its last override, and returns the origin of each key that was set.

    Raises:
        UserError: unknown key, section instead of a key, value of another type, BASE outside a file.
    """
    origins = {}
    for override in overrides:
        if override.key == "BASE":
            raise UserError(f"{override.origin}: BASE works only inside a YAML file. Put it there.")
        refuse_unknown(override.key, override.origin, schema)
        *sections, name = override.key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[name] = _convert(override, schema)
        origins[override.key] = override.origin
    return origins


def to_yaml(config: CfgNode) -> str:
    """Writes the whole tree as YAML: sections as blocks, lists in one line, floats with all their digits."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, width=10**6)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def _plain(value: object) -> object:
    if isinstance(value, CfgNode):
        return {name: _plain(child) for name, child in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _convert(override: Override, schema: dict[str, KeyType]) -> Any:
    key_type = schema[override.key]
    try:
        return key_type.convert(override.value)
    except (ValueError, OverflowError):
        raise UserError(
            f"{override.origin}: {override.key} takes {key_type}, not {_shortened.repr(override.value)}."
            + (" For an empty text write ''." if key_type.element is str and override.value is None else "")
        ) from None


def _read_file(path: Path, schema: dict[str, KeyType]) -> list[Override]:
    if path.suffix not in (".yaml", ".yml"):
        reason = "is Python code, which is never executed here" if path.suffix == ".py" else "is not a YAML file"
        raise UserError(f"{path} {reason}: give a file that ends in .yaml or .yml, such as configs/swin_tiny.yaml.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        advice = f"Did you mean {path.parent / near[0]}?" if near else _advise_recipe(path.stem)
        raise UserError(f"There is no file {path}. {advice}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Give a YAML file in UTF-8.") from error
    return read_text(text, str(path), schema)


def read_text(text: str, source: str, schema: dict[str, KeyType]) -> list[Override]:
    """Reads the values of a YAML text; error messages call it `source`.

    Raises:
        UserError: not YAML, malformed, empty, a duplicate key, a section instead of a value.
    """
    try:
        # Nodes know their line, and no objects are constructed from them.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"{source} is nested too deeply to be a configuration; config.py lists the keys.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}, line {mark.line + 1}"
        advice = "Check indentation, colons and brackets."
        raise UserError(f"{place}: not YAML: {error.problem or error.context}. {advice}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {error}. Save it as plain text in UTF-8.") from None
    if root is None:
        raise UserError(f"{source} is empty: write at least one key, such as MODEL.NAME.")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source} holds no keys: write `KEY: value` lines, as in configs/swin_tiny.yaml.")
    overrides = list(_walk(root, "", source, schema))
    first: dict[str, str] = {}
    for override in overrides:
        if override.key in first:
            raise UserError(f"{override.origin}: {override.key} is already set at {first[override.key]}. Keep one.")
        first[override.key] = override.origin
    return overrides


def _advise_recipe(name: str) -> str:
    """Advice on a missing file: our recipe that corresponds to the original project's file `name`."""
    recipes = {}
    for path in sorted((REPO_ROOT / "configs").glob("*.yaml")):
        if found := _FIRST_NAME.search(path.read_text(encoding="utf-8")):
            recipes[found[1]] = path.name
    near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.85)
    return f"Here that recipe is configs/{recipes[near[0]]}." if near else "Check the path given to --cfg."


def _walk(node: yaml.MappingNode, prefix: str, source: str, schema: dict[str, KeyType]) -> Iterator[Override]:
    for key_node, value_node in node.value:
        origin = f"{source}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{origin}: a key must be a name, such as TRAIN.")
        key = prefix + key_node.value
        _refuse_tag(value_node, key, origin)
        if not isinstance(value_node, yaml.MappingNode):
            yield Override(key, _read_value(value_node, key, origin), origin)
        elif key in schema:
            raise UserError(f"{origin}: {key} takes {schema[key]}, not a section with keys of its own.")
        elif any(name.startswith(f"{key}.") for name in schema):
            yield from _walk(value_node, f"{key}.", source, schema)
        else:
            refuse_unknown(key, origin, schema)


def _read_value(node: yaml.Node, key: str, origin: str) -> str | list[str | None] | None:
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise UserError(f"{origin}: {key} contains a list or a section. Write a flat list: [2, 2, 6, 2].")
        for item in node.value:
            _refuse_tag(item, key, origin)
        return [_read_scalar(item) for item in node.value]
    return _read_scalar(node)


def _read_scalar(node: yaml.Node) -> str | None:
    return None if node.tag.endswith(":null") else node.value


def _refuse_tag(node: yaml.Node, key: str, origin: str) -> None:
    if node.tag not in PLAIN_TAGS:
        raise UserError(f"{origin}: {key} has the YAML tag {node.tag}. Tags are not used here: write the plain value.")
