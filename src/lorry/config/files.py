"""Run descriptions on disk: YAML and JSON in with line numbers, YAML out that reads back to the same thing.

YAML is read by the 1.2 core rules, so ``no`` and ``on`` are words, ``1e-3`` is a number and 2024-01-01 is text; tags such as
``!!python/object`` and duplicate keys are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorry.errors import ConfigError

LARGEST = 1 << 18  # bytes; a longer run description is a mistake or an attack
WHOLE = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
CORE = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, PyYAML's own class attribute


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks of every kind are escaped: PyYAML folds some of them (U+0085) so that they do not come back."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 10 if node.value.lstrip("+-").isdigit() else 0)


def _real(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value)


def _switch(loader: _Loader, node: yaml.ScalarNode) -> bool:
    if node.value.lower() not in ("true", "false"):
        raise yaml.constructor.ConstructorError(None, None, "a switch is true or false", node.start_mark)
    return bool(node.value.lower() == "true")


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)
_Loader.add_constructor("tag:yaml.org,2002:bool", _switch)
for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", WHOLE.pattern, list("-+0123456789")),
    ("float", REAL.pattern, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{REAL.pattern})$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{WHOLE.pattern})$"), list("-+0123456789"))


@dataclass(frozen=True)
class Described:
    """A file's settings as nested plain values, and the line of each key (``lora``, ``lora.r``, ``jobs.0.lora.r``)."""

    values: dict[str, Any]
    lines: dict[str, int]


def read_scalar(text: str) -> Any:
    """A command-line value as YAML: number, switch, null, list, map or text. Raises ValueError when it is none of these."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse(node, "value")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not a YAML value") from error


def read_file(path: Path) -> Described:
    """Read a .yaml, .yml or .json description. Raises ConfigError with file:line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > LARGEST:
        raise ConfigError(f"{path}: {len(raw)} bytes is too long for a run description (at most {LARGEST})")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8 text") from None
    try:
        return _read_json(text, path) if path.suffix == ".json" else _read_yaml(text, path)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a run description") from None


def _read_yaml(text: str, path: Path) -> Described:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Described({}, {})
        _refuse(node, str(path))
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: a run description is a map of settings, such as 'model: DIR'")
        return Described(loader.construct_document(node), dict(_key_lines(node)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {str(error).splitlines()[0][:200]}") from None


def _key_lines(node: yaml.MappingNode) -> list[tuple[str, int]]:
    """(``lora.r``, line) of every key; ``jobs.0.r`` is a key of the first map in a list."""
    found, seen = list[tuple[str, int]](), set[int]()

    def walk(prefix: str, below: yaml.Node) -> None:
        if id(below) in seen:  # an anchor, met again: its keys stand where they were written first
            return
        seen.add(id(below))
        if isinstance(below, yaml.MappingNode):
            for key, value in below.value:
                found.append((f"{prefix}{key.value}", key.start_mark.line + 1))
                walk(f"{prefix}{key.value}.", value)
        elif isinstance(below, yaml.SequenceNode):
            for number, item in enumerate(below.value):
                found.append((f"{prefix}{number}", item.start_mark.line + 1))
                walk(f"{prefix}{number}.", item)

    walk("", node)
    return found


def _refuse(root: yaml.Node, source: str) -> None:
    """Refuse tags, keys that are not text and duplicate keys anywhere below a node; anchors are walked once."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag not in CORE:
            raise ConfigError(f"{source}:{node.start_mark.line + 1}: the tag {node.tag!r} is refused; settings are plain values")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            _refuse_keys(node, source)
            waiting += [value for _, value in node.value]


def _refuse_keys(node: yaml.MappingNode, source: str) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{source}:{line}: a key must be text")
        if key.value in first:
            raise ConfigError(f"{source}:{line}: {key.value!r} is given twice (first in line {first[key.value]}); keep one")
        first[key.value] = line


def _read_json(text: str, path: Path) -> Described:
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except ValueError as error:  # a duplicate key, or a number of more than 4,300 digits
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run description is a map of settings, such as {{'model': 'DIR'}}")
    return Described(values, _json_lines(values, text))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{key!r} is given twice; keep one")
        seen[key] = value
    return seen


def _json_lines(values: dict[str, Any], text: str) -> dict[str, int]:
    """Lines of the keys that occur only once in the text; of the others the line would be a guess."""
    places: dict[str, list[int]] = {}
    line, done = 1, 0
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', text):
        line += text.count("\n", done, match.start())
        done = match.start()
        places.setdefault(match[1], []).append(line)
    keys = [(key, key) for key in values]
    keys += [(f"{key}.{inner}", inner) for key, value in values.items() if isinstance(value, dict) for inner in value]
    return {dotted: places[key][0] for dotted, key in keys if len(places.get(key, [])) == 1}


def write_yaml(values: dict[str, Any]) -> str:
    """YAML text of nested plain values, keys in order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
