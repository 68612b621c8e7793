"""JSON and YAML documents that Lorry did not write, or that may be damaged: plain values, or one
refusal.

    settings = read_yaml(Path("runs/people/run.yaml"))
    config = read_json_document(Path("model/config.json"), error=ModelError, nonfinite=True)

The rule: **no file that came from elsewhere, or lay in a run directory, is parsed by anything
else.** A parser of the standard library waits for ever at a FIFO, expands a few hundred bytes of
YAML aliases into gigabytes, recurses until Python's stack ends, raises ValueError for an integer of
5,000 digits, and keeps the last of two equal keys. Here each of these is a refusal in one line that
opens with ``file:line``:

    not a regular file (FIFO, device, directory), or larger than ``most_bytes``; not UTF-8 or half a character
    two equal keys in one object; nested deeper than ``DEEPEST_NESTING``; a YAML tag; an alias of what it lies in
    YAML aliases that stand for more than ``MOST_NODES`` values; an integer above ``largest``
    a float beyond what a float holds, NaN and the infinities, unless ``nonfinite`` lets them pass

A refusal is ``error`` (a LorryError of the caller's choice: DataError, ModelError, ConfigError).
What the disk itself says (absent, no right, input/output error) is not damage of the document: it
stays OSError. ``read_object`` makes two answers of it: ``error`` where nothing has that name,
DiskError (exit code 74) where the disk does not answer. Who takes the first for an empty document
may never do so with the second: what was not read still exists.

YAML is read by the 1.2 core rules, so ``no`` and ``on`` are words, ``1e-3`` is a number and
2024-01-01 is text.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import yaml

from lorry.disk.durable import DiskError
from lorry.errors import DataError, LorryError

MOST_BYTES = 16 << 20  # of a JSON document: its values take some thirty times as much memory
MOST_YAML = 2 << 20  # bytes; PyYAML reads a few hundred thousand a second
# objects and lists inside each other; what walks the values afterwards may recurse
DEEPEST_NESTING = 64
MOST_NODES = 1 << 18  # values of a YAML document, each alias counted as all that it stands for
LARGEST_INTEGER_READ = 2**63 - 1  # what every other program holds an integer in
# Python converts no longer integer: the time grows with the square of the digits
MOST_DIGITS = 4300
YAML_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
YAML_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
YAML_CORE_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
}
# errno of a name that leads to no file
ABSENT_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
NOT_REGULAR = "is not a regular file (a directory, a FIFO or a device)"

RefusalType = type[LorryError]


def read_bytes(path: Path, most_bytes: int = MOST_BYTES, error: RefusalType = DataError) -> bytes:
    """The content of a regular file of bounded size, opened without waiting. Raises ``error`` and
    OSError.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for ever
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device without a driver
            raise error(f"{path} {NOT_REGULAR}") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise error(f"{path} {NOT_REGULAR}")
        # the descriptor that was looked at is the one that is read: the name may lead elsewhere by
        # now
        with open(file, "rb", closefd=False) as opened:
            # one byte more than allowed, so that a file that grows meanwhile is noticed, too
            raw = opened.read(most_bytes + 1)
    finally:
        os.close(file)
    if len(raw) > most_bytes:
        raise error(f"{path} is larger than {most_bytes} bytes, the largest that is read")
    return raw


def read_text(path: Path, most_bytes: int = MOST_YAML, error: RefusalType = DataError) -> str:
    """UTF-8 text of a regular file; a byte order mark is left out. Raises ``error`` and OSError."""
    return _decode_document(read_bytes(path, most_bytes, error), str(path), 1, error)


def read_json_document(
    path: Path,
    *,
    error: RefusalType = DataError,
    most_bytes: int = MOST_BYTES,
    nonfinite: bool = False,
    largest: int = LARGEST_INTEGER_READ,
) -> Any:
    """The value of a JSON file. Raises ``error`` and OSError, FileNotFoundError among them."""
    raw = read_bytes(path, most_bytes, error)
    return parse_json(raw, str(path), error=error, nonfinite=nonfinite, largest=largest)


def read_object(
    path: Path,
    *,
    error: RefusalType = DataError,
    nonfinite: bool = False,
    largest: int = LARGEST_INTEGER_READ,
    absent: str = "",
) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ``error``, also where nothing has that name
    (``absent``: what that means, in place of the system's words), and DiskError where it cannot be
    read.
    """
    try:
        value = read_json_document(path, error=error, nonfinite=nonfinite, largest=largest)
    except OSError as e:
        if e.errno in ABSENT_ERRNOS:
            raise error(
                f"{path} {absent}" if absent else f"{path}: cannot be read ({e.strerror})"
            ) from e
        raise DiskError(e.errno, e.strerror, str(path)) from e
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_yaml(path: Path, *, error: RefusalType = DataError, most_bytes: int = MOST_YAML) -> Any:
    """The value of a YAML file, None of an empty one. Raises ``error`` and OSError,
    FileNotFoundError among them.
    """
    return parse_yaml(read_text(path, most_bytes, error), str(path), error=error)[0]


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value that was read is a number to compare or to calculate with: true and false,
    NaN and infinity are not.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, None when each is there once. Linear: a stranger's file
    has as many as it likes.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def parse_json(
    raw: bytes | str,
    where: str,
    *,
    line: int = 1,
    error: RefusalType = DataError,
    nonfinite: bool = False,
    largest: int = LARGEST_INTEGER_READ,
) -> Any:
    """The value of a JSON text that begins in ``line`` of the file ``where``. Raises ``error``."""
    text = _decode_document(raw, where, line, error) if isinstance(raw, bytes) else raw

    def refuse(reason: str, at: int = 0) -> NoReturn:
        raise error(f"{where}:{line + text.count(chr(10), 0, at)}: not JSON ({reason})") from None

    decoder = _DECODERS.get((nonfinite, largest)) or _DECODERS.setdefault(
        (nonfinite, largest), _strict_decoder(nonfinite, largest)
    )
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as e:
        refuse(f"{e.msg}, column {e.colno}", e.pos)
    except _NotStrictError as e:
        refuse(e.reason, max(text.rfind(e.token) if e.last else text.find(e.token), 0))
    except RecursionError:
        refuse("nested too deeply")
    # A value is walked only where its text may hold what is looked for: that costs more than
    # parsing a short line. Decoded bytes hold no half character unless one is escaped.
    deep, escaped = (
        text.count("[") + text.count("{") > DEEPEST_NESTING,
        "\\u" in text,
    )
    if (deep or escaped or not (isinstance(raw, bytes) or text.isascii())) and (
        reason := _describe_unsound(value)
    ):
        refuse(reason)
    return value


class _NotStrictError(Exception):
    """Raised inside the JSON decoder; ``token`` is what to look for in the text, its ``last`` or
    its first place.
    """

    def __init__(self, reason: str, token: str, last: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.token, self.last = reason, token, last


# by (nonfinite, largest): building a decoder takes longer than decoding a line of metrics.jsonl
_DECODERS: dict[tuple[bool, int], json.JSONDecoder] = {}


def _strict_decoder(nonfinite: bool, largest: int) -> json.JSONDecoder:
    """A decoder that raises _NotStrictError for what Python's own passes over. It holds nothing of a
    text, so it is shared.
    """

    def parse_integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS or abs(value := int(digits)) > largest:
            raise _NotStrictError(f"{_shorten(digits)} is too large for an integer", digits)
        return value

    def parse_float_strictly(digits: str) -> float:
        # Python reads 1e999 as inf without a word
        value = float(digits)
        if math.isinf(value):
            raise _NotStrictError(f"{_shorten(digits)} is too large for a float", digits)
        return value

    def parse_constant_strictly(name: str) -> float:
        if not nonfinite:
            raise _NotStrictError(f"{name} is not a JSON number", name)
        return float(name)

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated = first_repeated(key for key, _ in pairs)
            raise _NotStrictError(
                f"{_shorten(repr(repeated))} is given twice in one object; keep one",
                json.dumps(repeated),
                last=True,
            )
        return values

    # Python's own float is faster, and metrics.jsonl has many
    float_parser = None if nonfinite else parse_float_strictly
    return json.JSONDecoder(
        parse_int=parse_integer,
        parse_float=float_parser,
        parse_constant=parse_constant_strictly,
        object_pairs_hook=unique_keys,
    )


def parse_yaml(
    text: str, where: str, *, error: RefusalType = DataError
) -> tuple[Any, yaml.Node | None]:
    """(the value, the node it was made from, whose marks know the lines) of a YAML text. Raises
    ``error``.
    """
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        refuse_node(node, where, error)
        # composed first and checked as a graph of nodes, where an alias still costs nothing; only
        # then are values made of it
        return loader.construct_document(node), node
    # PyYAML's own text shows the line of the file, which may be long or private; its problem is
    # enough
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise error(
            f"{where}:{mark.line + 1 if mark else 1}: not YAML: {e.problem or e.context}"
        ) from None
    except yaml.YAMLError as e:
        raise error(f"{where}: not YAML: {str(e).splitlines()[0]}") from None
    except RecursionError:
        raise error(f"{where}: nested too deeply") from None


def refuse_node(root: yaml.Node, where: str, error: RefusalType) -> None:
    """Refuse, before any value is made of it, a composed YAML document whose values would not be
    plain and few.
    """
    sizes: dict[int, int] = {}  # by id of a node: all that stands below it, aliases written out
    open_nodes: set[int] = set()

    def refuse(node: yaml.Node, reason: str) -> NoReturn:
        raise error(f"{where}:{node.start_mark.line + 1}: {reason}")

    def measure(node: yaml.Node, depth: int) -> int:
        if id(node) in open_nodes:
            refuse(node, "an alias is inside the value that it names")
        # measured once however often it is named, so a document of aliases takes linear time
        if id(node) in sizes:
            return sizes[id(node)]
        if depth > DEEPEST_NESTING:
            refuse(node, "nested too deeply")
        if node.tag not in YAML_CORE_TAGS:
            refuse(
                node,
                (f"the tag {_shorten(repr(node.tag))} is not allowed; settings are plain values"),
            )
        open_nodes.add(id(node))
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(measure(item, depth + 1) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            _refuse_keys(node, refuse)
            size += sum(measure(value, depth + 1) for _, value in node.value)
        if size > MOST_NODES:
            refuse(node, f"its aliases expand to more than {MOST_NODES} values")
        # closed only after its children: whoever meets it while it is open has found a circle
        open_nodes.discard(id(node))
        sizes[id(node)] = size
        return size

    measure(root, 0)


def _refuse_keys(node: yaml.MappingNode, refuse: Callable[[yaml.Node, str], NoReturn]) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        # 1, null or a list as a key would be another key after a round trip through JSON
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            refuse(key, "a key must be text")
        if key.value in first:
            refuse(
                key,
                f"{_shorten(repr(key.value))} is given twice (first in line {first[key.value]}); keep one",
            )
        first[key.value] = key.start_mark.line + 1


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the YAML 1.2 core schema."""

    # empty: those of YAML 1.1 (no as false, 1_000, dates) would be inherited otherwise
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, PyYAML's own class attribute


def _scalar_error(node: yaml.ScalarNode, reason: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def _construct_integer(loader: _YamlLoader, node: yaml.ScalarNode) -> int:
    if not YAML_INTEGER.fullmatch(node.value):
        raise _scalar_error(node, f"{_shorten(repr(node.value))} is not an integer")
    if (
        len(node.value) > MOST_DIGITS
        or abs(value := int(node.value, 10 if node.value.lstrip("+-").isdigit() else 0))
        > LARGEST_INTEGER_READ
    ):
        raise _scalar_error(node, f"{_shorten(node.value)} is too large for an integer")
    return value


def _construct_float(loader: _YamlLoader, node: yaml.ScalarNode) -> float:
    if not YAML_FLOAT.fullmatch(node.value) or math.isinf(value := float(node.value)):
        raise _scalar_error(
            node, f"{_shorten(repr(node.value))} is too large for a float, or not a number"
        )
    return value


def _construct_bool(loader: _YamlLoader, node: yaml.ScalarNode) -> bool:
    if node.value.lower() not in ("true", "false"):
        raise _scalar_error(node, "a boolean has to be true or false")
    return bool(node.value.lower() == "true")


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_integer)
_YamlLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_YamlLoader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", YAML_INTEGER.pattern, list("-+0123456789")),
    ("float", YAML_FLOAT.pattern, list("-+.0123456789")),
):
    _YamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _decode_document(raw: bytes, where: str, line: int, error: RefusalType) -> str:
    try:
        # -sig: editors on Windows put a byte order mark before the text, which JSON refuses
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        broken = line + raw.count(b"\n", 0, e.start)
        raise error(f"{where}:{broken}: not UTF-8 text") from None


def _describe_unsound(root: Any) -> str:
    """Why a value of JSON is none that can be worked with, "" where it is: too deep, or half a
    character in a text.
    """
    # breadth first, without recursion: the value may be deeper than Python's stack
    level, depth = [root], 0
    while level:
        if depth > DEEPEST_NESTING:
            return "nested too deeply"
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif (
                isinstance(item, str) and not item.isascii() and re.search("[\ud800-\udfff]", item)
            ):
                return "half a character: a lone surrogate"
        level, depth = below, depth + 1
    return ""


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
