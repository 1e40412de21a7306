"""Generates docs/CONFIG.md from config.py and its comments:

python -m utils.config.docs
"""

import re

from utils.config.rules import NO_EFFECT
from utils.files import write_text
from utils.paths import REPO_ROOT

CONFIG_MD = REPO_ROOT / "docs" / "CONFIG.md"
_KEY = re.compile(r"^_C\.(?P<key>\S+) = (?P<default>.*?)  # (?P<meaning>.*)$", re.MULTILINE)
_HEAD = """# Configuration keys

Generated from `config.py` by `python -m utils.config.docs`; edit the comments there.

Set a key in a YAML file (`--cfg FILE`), with a flag (`python main.py --help` lists them), or with `--opts KEY VALUE`.
The last one wins: defaults, files named by `BASE`, `--cfg`, the other flags, `--opts`. Names and defaults are those of
the original Swin Transformer code.
"""


def config_markdown() -> str:
    """Returns the text of docs/CONFIG.md: a table of keys, defaults and meanings for each section of config.py."""
    source = (REPO_ROOT / "config.py").read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for match in _KEY.finditer(source):
        key, default, meaning = match["key"], match["default"].replace('"', "'"), match["meaning"]
        if key in NO_EFFECT:
            meaning = f"no effect: {NO_EFFECT[key]}"
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"| `{name}` | `{default}` | {meaning.replace(' | ', ', ')} |")
    tables = [
        "\n".join([f"## {section or 'General'}", "", "| key | default | meaning |", "| --- | --- | --- |", *rows, ""])
        for section, rows in sections.items()
    ]
    return "\n".join([_HEAD, *tables])


if __name__ == "__main__":
    write_text(CONFIG_MD, config_markdown())
