"""Run descriptions on disk: YAML and JSON in with line numbers, YAML out that reads back to the
same thing.

What is refused, and the rules of YAML that are followed, stand in disk/documents.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorry.disk.documents import YAML_FLOAT, YAML_INTEGER, parse_json, parse_yaml, read_text
from lorry.errors import ConfigError

# a text, or a comment, each up to the end where it is not closed: looked for once, in linear time
JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|//[^\n]*|/\*.*?(?:\*/|\Z)', re.DOTALL)
LARGEST_DESCRIPTION = 1 << 18  # bytes; a longer run description is a mistake or an attack


class _YamlDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something other than text."""

    # anchors (&id001) in a file for people would be a riddle, and settings are small
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _YamlDumper, text: str) -> yaml.ScalarNode:
    """Line breaks of every kind are escaped: PyYAML folds some of them (U+0085) so that they do not
    come back.
    """
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    )


_YamlDumper.add_representer(str, _represent_text)
_YamlDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{YAML_FLOAT.pattern})$"), list("-+.0123456789")
)
_YamlDumper.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"^(?:{YAML_INTEGER.pattern})$"), list("-+0123456789")
)


@dataclass(frozen=True)
class DescriptionFile:
    """A file's settings as nested plain values, and the line of each key (``lora``, ``lora.r``,
    ``jobs.0.lora.r``).
    """

    values: dict[str, Any]
    lines: dict[str, int]


def read_scalar(text: str) -> Any:
    """A command-line value as YAML: number, switch, null, list, map or text. Raises ValueError when
    it is none of these.
    """
    try:
        return parse_yaml(text, "value", error=ConfigError)[0]
    except ConfigError as error:
        raise ValueError(f"{text[:80]!r} is not a YAML value ({error})") from error


def read_description_file(
    path: Path, expected: str = "a run description is a map of settings, such as 'model: DIR'"
) -> DescriptionFile:
    """Read a .yaml, .yml or .json description. Raises ConfigError with file:line. ``expected``: what
    a file is to be, for the error of one that is no map.
    """
    try:
        text = read_text(path, LARGEST_DESCRIPTION, ConfigError)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".json":
        text = blank_comments(text)
        # JSON is YAML but for escapes and tabs; read as what it is called
        values = parse_json(text, str(path), error=ConfigError)
        lines = _json_lines(values, text) if isinstance(values, dict) else {}
    else:
        values, node = parse_yaml(text, str(path), error=ConfigError)
        values = {} if node is None else values
        lines = dict(_key_lines(node)) if isinstance(node, yaml.MappingNode) else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {expected}")
    return DescriptionFile(values, lines)


def blank_comments(text: str) -> str:
    """JSON with spaces in the place of `// ...` and `/* ... */`, so that every other character stays
    where it was and errors name its line."""

    def blank(part: re.Match[str]) -> str:
        return part[0] if part[0].startswith('"') else re.sub(r"[^\n]", " ", part[0])

    return JSON_PART.sub(blank, text)


def _key_lines(node: yaml.MappingNode) -> list[tuple[str, int]]:
    """(``lora.r``, line) of every key; ``jobs.0.r`` is a key of the first map in a list."""
    lines, seen = list[tuple[str, int]](), set[int]()

    def walk(prefix: str, inner: yaml.Node) -> None:
        if id(inner) in seen:  # an anchor, met again: its keys stand where they were written first
            return
        seen.add(id(inner))
        if isinstance(inner, yaml.MappingNode):
            for key, value in inner.value:
                lines.append((f"{prefix}{key.value}", key.start_mark.line + 1))
                walk(f"{prefix}{key.value}.", value)
        elif isinstance(inner, yaml.SequenceNode):
            for number, item in enumerate(inner.value):
                lines.append((f"{prefix}{number}", item.start_mark.line + 1))
                walk(f"{prefix}{number}.", item)

    walk("", node)
    return lines


def _json_lines(values: dict[str, Any], text: str) -> dict[str, int]:
    """Lines of the keys that occur only once in the text; of the others the line would be a guess."""
    lines_by_key: dict[str, list[int]] = {}
    line, counted_to = 1, 0
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', text):
        # counted on from the last key: counting from the start each time takes quadratic time
        line += text.count("\n", counted_to, match.start())
        counted_to = match.start()
        lines_by_key.setdefault(match[1], []).append(line)
    keys = [(key, key) for key in values]
    keys += [
        (f"{key}.{inner}", inner)
        for key, value in values.items()
        if isinstance(value, dict)
        for inner in value
    ]
    return {
        dotted: lines_by_key[key][0] for dotted, key in keys if len(lines_by_key.get(key, [])) == 1
    }


def write_yaml(values: dict[str, Any]) -> str:
    """YAML text of nested plain values, keys in order."""
    return yaml.dump(values, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, width=120)
