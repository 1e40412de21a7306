"""How configuration values travel: from YAML files (with BASE), flags and --opts into one typed tree, and back out.

Every value is an `Override` until it is merged: a key, a value, and who gave it. A value that arrives as text, which is
what YAML files are read as, is understood by what its key takes: `1e-8` is a number where a number is meant, and
`2024-01-01` a name where a name is meant. Files are only parsed: no YAML tag builds an object, no Python is executed.
Which keys exist and what they may be is not known here, but in config.py.
"""

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from yacs.config import CfgNode

from models.pretrained import registry
from utils.errors import UserError

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NONES = ("", "none", "null", "~")
NOUNS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}
PLAIN_TAGS = {f"tag:yaml.org,2002:{tag}" for tag in "str int float bool null timestamp seq map".split()}

_shortened = reprlib.Repr()
_shortened.maxstring = 100


@dataclass(frozen=True)
class Override:
    """A value for a key and who gave it: a flag as it was typed, "--opts", or "FILE, line 7"."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True)
class KeyType:
    """What a key takes: an `element` (bool, int, float, str) or a `container` (list, tuple) of them; or None."""

    element: type
    container: type | None = None
    optional: bool = False

    @classmethod
    def of(cls, default: object) -> "KeyType":
        """The kind of a key whose default says it all: not None and not an empty list."""
        if isinstance(default, list | tuple):
            return cls(type(default[0]), type(default))
        return cls(type(default))

    def __str__(self) -> str:
        noun = f"a list of {PLURALS[self.element]}" if self.container else NOUNS[self.element]
        return f"{noun}, or None" if self.optional else noun

    def convert(self, value: object) -> object:
        """`value` as this kind.

        Raises:
            ValueError: it is something else. A bool is not a number here, and neither NaN nor infinity is one.
        """
        if self.optional and (value is None or isinstance(value, str) and value.strip().lower() in NONES):
            return None
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
    """There is no key of this name; who gave it is told too."""

    def __init__(self, message: str, key: str, origin: str):
        super().__init__(message)
        self.key = key
        self.origin = origin


def flatten(config: CfgNode) -> dict[str, object]:
    """The leaves of the tree by their full key, in the order of declaration."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, CfgNode):
            leaves.update({f"{name}.{key}": leaf for key, leaf in flatten(value).items()})
        else:
            leaves[name] = value
    return leaves


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most likely meant one of `known`: the same last part in another section, else a near spelling."""
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
    """Raises UserError unless `key` is a leaf of the configuration; a section or a misspelt key gets its own advice.

    For what is neither key nor section it is `UnknownKey`.
    """
    if key in schema:
        return
    inside = [name for name in schema if name.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{origin}: {key} is a section, not a key. Set the keys inside it, such as {inside[0]}.")
    sections = {name.rpartition(".")[0] for name in schema} - {""}
    guess = nearest(key, [*schema, *sections])
    advice = f"Did you mean {guess}?" if guess else "All keys stand in config.py, each with a comment."
    shown = key if key.isprintable() and key else repr(key)
    raise UnknownKey(f"{origin}: there is no key {shown}. {advice}", key, origin)


def parse_opts(opts: Sequence[object]) -> list[Override]:
    """KEY VALUE KEY VALUE … as overrides.

    Raises:
        UserError: a key without a value.
    """
    if len(opts) % 2:
        listed = " ".join(map(str, opts))
        raise UserError(f"--opts takes pairs, KEY VALUE, with a space between, but {listed!r} has {len(opts)} words.")
    return [Override(str(key), value, "--opts") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def read_files(path: str | Path, schema: dict[str, KeyType], below: tuple[str, ...] = ()) -> list[Override]:
    """The values of a YAML file, preceded by those of the files its BASE names (relative to it), theirs first.

    Args:
        below: the files whose BASE led here, outermost first.

    Raises:
        UserError: missing, not YAML, malformed, empty, a key twice, a section in place of a value, BASE in a circle.
    """
    path = Path(path)
    chain = (*below, os.path.realpath(path))
    if chain[-1] in below:
        raise UserError("BASE goes round in a circle: " + " → ".join(chain) + ". Remove one of these BASE lines.")
    overrides = _read_file(path, schema)
    inherited: list[Override] = []
    for override in [override for override in overrides if override.key == "BASE"]:
        for base in filter(None, _converted(override, schema)):
            if not (path.parent / base).is_file():
                raise UserError(
                    f"{override.origin}: BASE names {base}, but there is no file {path.parent / base}. Mend the path."
                )
            inherited += read_files(path.parent / base, schema, chain)
    return inherited + [override for override in overrides if override.key != "BASE"]


def merge(config: CfgNode, overrides: Iterable[Override], schema: dict[str, KeyType]) -> dict[str, str]:
    """Sets each key to the last value given for it, and returns for each key set where that value came from.

    Raises:
        UserError: unknown key, section instead of a key, value of another kind, BASE outside a file.
    """
    origins = {}
    for override in overrides:
        if override.key == "BASE":
            raise UserError(f"{override.origin}: BASE has a meaning only inside a YAML file. Put it there.")
        refuse_unknown(override.key, override.origin, schema)
        *sections, name = override.key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[name] = _converted(override, schema)
        origins[override.key] = override.origin
    return origins


def to_yaml(config: CfgNode) -> str:
    """YAML of the whole tree: sections as blocks, lists in one line, floats with all the digits they need."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, width=10**6)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def _plain(value: object) -> object:
    if isinstance(value, CfgNode):
        return {name: _plain(child) for name, child in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _converted(override: Override, schema: dict[str, KeyType]) -> object:
    kind = schema[override.key]
    try:
        return kind.convert(override.value)
    except (ValueError, OverflowError):
        raise UserError(
            f"{override.origin}: {override.key} takes {kind}, not {_shortened.repr(override.value)}."
            + (" For an empty text write ''." if kind.element is str and override.value is None else "")
        ) from None


def _read_file(path: Path, schema: dict[str, KeyType]) -> list[Override]:
    if path.suffix not in (".yaml", ".yml"):
        what = "is Python code, which is never executed here" if path.suffix == ".py" else "is not a YAML file"
        raise UserError(f"{path} {what}: give a file that ends in .yaml or .yml, such as configs/swin_tiny.yaml.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        advice = f"Did you mean {path.parent / near[0]}?" if near else _recipe_for(path.stem)
        raise UserError(f"There is no file {path}. {advice}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Give a configuration, which is a text in UTF-8.") from error
    return read_text(text, str(path), schema)


def read_text(text: str, source: str, schema: dict[str, KeyType]) -> list[Override]:
    """The values of a YAML text, which errors call `source`.

    Raises:
        UserError: not YAML, malformed, empty, a key twice, a section in place of a value.
    """
    try:
        # Composing stops at nodes that know their line; nothing is constructed from them.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"{source} is nested too deeply to be a configuration; the keys stand in config.py.") from None
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        advice = "Check indentation, colons and brackets."
        raise UserError(f"{source}, line {line}: not YAML: {error.problem or error.context}. {advice}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {error}. Write it as plain text in UTF-8.") from None
    if root is None:
        raise UserError(f"{source} is empty: write at least one key, such as MODEL.NAME.")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source} holds no keys: write `KEY: value` lines, as in configs/swin_tiny.yaml.")
    overrides = list(_walk(root, "", source, schema))
    first: dict[str, str] = {}
    for override in overrides:
        if override.key in first:
            raise UserError(f"{override.origin}: {override.key} stands already at {first[override.key]}. Keep one.")
        first[override.key] = override.origin
    return overrides


def _recipe_for(name: str) -> str:
    """What to say of a file that is not there: which of ours the original project's file of that name is here."""
    recipes = {release.name: release.recipe for release in registry.RELEASES if release.origin == "original"}
    near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.85)
    return f"Here that recipe is configs/{recipes[near[0]]}.yaml." if near else "Check the path given to --cfg."


def _walk(node: yaml.MappingNode, prefix: str, source: str, schema: dict[str, KeyType]) -> Iterator[Override]:
    for key_node, value_node in node.value:
        origin = f"{source}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{origin}: a key must be a name, such as TRAIN.")
        key = prefix + key_node.value
        _refuse_tag(value_node, key, origin)
        if not isinstance(value_node, yaml.MappingNode):
            yield Override(key, _value(value_node, key, origin), origin)
        elif key in schema:
            raise UserError(f"{origin}: {key} takes {schema[key]}, not a section with keys of its own.")
        elif any(name.startswith(f"{key}.") for name in schema):
            yield from _walk(value_node, f"{key}.", source, schema)
        else:
            refuse_unknown(key, origin, schema)


def _value(node: yaml.Node, key: str, origin: str) -> str | list[str | None] | None:
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise UserError(f"{origin}: {key} has a list or a section in its list. Write a flat one: [2, 2, 6, 2].")
        for item in node.value:
            _refuse_tag(item, key, origin)
        return [_value(item, key, origin) for item in node.value]
    return None if node.tag.endswith(":null") else node.value


def _refuse_tag(node: yaml.Node, key: str, origin: str) -> None:
    if node.tag not in PLAIN_TAGS:
        raise UserError(f"{origin}: {key} has the YAML tag {node.tag}. Tags are not used here: write the plain value.")
