"""The header of a GGUF file, checked against the file's size before anybody else opens it.

GGUF readers have trusted sizes and offsets from the file (CVE-2026-27940, CVE-2025-53630,
CVE-2026-33298). Here every count, length and offset must fit into the bytes that are really there,
every key and every tensor has a name of its own, and no two tensors share bytes. Little-endian GGUF
versions 2 and 3. What becomes of the tensors is `models.gguf.tensors`' matter.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorry.errors import ModelError

# value type -> struct's
SCALAR_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING_TYPE, ARRAY_TYPE = 8, 9
MAX_STRING_BYTES = 4096  # bytes of a string that is kept
GgufValue = int | float | bool | str
# far above any real file; a larger count would only keep the reader busy
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_NAME_BYTES = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file: its shape as torch has it, its element type, where its bytes begin."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """values: {key: number or string} of the metadata, arrays and long strings left out; tensors by
    name.
    """

    values: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]


@dataclass
class _BoundedReader:
    """Reads from a file and refuses to pass its end."""

    file: BinaryIO
    path: Path
    size: int

    def take(self, count: int, what: str) -> bytes:
        self._check(count, what)
        return self.file.read(count)

    def skip(self, count: int, what: str) -> None:
        self._check(count, what)
        self.file.seek(count, 1)

    def _check(self, count: int, what: str) -> None:
        # before read(): a claimed length would be allocated first
        left = self.size - self.file.tell()
        if count > left:
            raise ModelError(
                f"{self.path}: {what} claims {count} bytes where {left} are left; the file is truncated or hostile"
            )

    def number(self, kind: str, what: str) -> int:
        return int(self.scalar(kind, what))

    def scalar(self, kind: str, what: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(
            f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what)
        )[0]
        return value

    def text(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode("utf-8", "replace")


def check_gguf(path: Path) -> GgufHeader:
    """Walk the header. Raises ModelError when anything lies outside the file, or a key or a tensor
    is there twice.
    """
    with path.open("rb") as file:
        reader = _BoundedReader(file, path, path.stat().st_size)
        if reader.take(4, "the magic number") != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        version = reader.number("I", "the version")
        if version not in (2, 3):
            raise ModelError(
                f"{path}: GGUF version {version}; versions 2 and 3 (little-endian) are read"
            )
        tensors, keys = (
            reader.number("Q", "the number of tensors"),
            reader.number("Q", "the number of keys"),
        )
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise ModelError(
                f"{path}: claims {tensors} tensors and {keys} keys; truncated or hostile"
            )
        values: dict[str, GgufValue] = {}
        seen: set[str] = set()
        for _ in range(keys):
            name = reader.text("a key")
            if name in seen:
                raise ModelError(f"{path}: its header holds the key {name!r} twice")
            seen.add(name)
            value = _read_value(reader, reader.number("I", name), name)
            if value is not None:
                values[name] = value
        # 32 is the format's default
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{path}: general.alignment is {alignment}, not a power of two")
        return GgufHeader(values, _check_tensors(reader, tensors, alignment))


def _read_value(reader: _BoundedReader, kind: int, name: str) -> GgufValue | None:
    """A number or a short string; anything else is walked over."""
    if kind in SCALAR_FORMATS:
        return reader.scalar(SCALAR_FORMATS[kind], name)
    if kind == STRING_TYPE:
        size = reader.number("Q", name)
        if size <= MAX_STRING_BYTES:
            return reader.take(size, name).decode("utf-8", "replace")
        reader.skip(size, name)
        return None
    _skip_value(reader, kind, name)
    return None


def _skip_value(reader: _BoundedReader, kind: int, name: str, depth: int = 0) -> None:
    if kind in SCALAR_FORMATS:
        reader.skip(struct.calcsize(f"<{SCALAR_FORMATS[kind]}"), name)
    elif kind == STRING_TYPE:
        reader.skip(reader.number("Q", name), name)
    elif kind == ARRAY_TYPE and depth < 4:
        inner, count = reader.number("I", name), reader.number("Q", name)
        if inner in SCALAR_FORMATS:
            reader.skip(struct.calcsize(f"<{SCALAR_FORMATS[inner]}") * count, name)
        else:
            # bytes of the shortest entry: a length (8), or a type and a count (12)
            smallest = 8 if inner == STRING_TYPE else 12
            if count * smallest > reader.size:
                raise ModelError(
                    f"{reader.path}: {name} claims {count} entries; truncated or hostile"
                )
            for _ in range(count):
                _skip_value(reader, inner, name, depth + 1)
    else:
        raise ModelError(f"{reader.path}: {name} has the unknown value type {kind}")


def _check_tensors(reader: _BoundedReader, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Tensor descriptions, then each one's bytes against the end of the file and against the
    others'.
    """
    described = []
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = reader.text("a tensor's name")
        if not 0 < len(name) <= MAX_NAME_BYTES:
            raise ModelError(f"{reader.path}: a tensor's name is {len(name)} characters long")
        dims = reader.number("I", name)
        if dims > 4:
            raise ModelError(f"{reader.path}: {name} has {dims} dimensions")
        shape = [reader.number("Q", name) for _ in range(dims)]
        kind, offset = reader.number("I", name), reader.number("Q", name)
        if kind not in list(GGMLQuantizationType):
            raise ModelError(f"{reader.path}: {name} has the unknown element type {kind}")
        described.append((name, shape, GGMLQuantizationType(kind), offset))
    start = -(-reader.file.tell() // alignment) * alignment
    spans = []
    for name, shape, quantisation, offset in described:
        block, bytes_per_block = GGML_QUANT_SIZES[quantisation]
        numel = 1
        for n in shape:
            numel *= n
        # quantised along the first (fastest) dimension, in whole blocks
        if not numel or numel % block or (shape and shape[0] % block):
            raise ModelError(
                f"{reader.path}: {name} of shape {shape} does not divide into blocks of {block}"
            )
        end = offset + numel // block * bytes_per_block
        if offset % alignment or start + end > reader.size:
            raise ModelError(
                f"{reader.path}: {name} lies outside the file (offset {offset}); truncated or hostile"
            )
        if name in tensors:
            raise ModelError(
                f"{reader.path}: its header holds the tensor {name!r} twice; "
                "readers differ in which one they use"
            )
        # GGUF lists the fastest dimension first, torch last
        tensors[name] = GgufTensor(tuple(reversed(shape)), quantisation, start + offset)
        spans.append((offset, end, name))
    for (_, end, tensor_name), (begin, _, other) in pairwise(sorted(spans)):
        if begin < end:
            raise ModelError(
                f"{reader.path}: {tensor_name} and {other} share bytes of the file; "
                "truncated or hostile"
            )
    return tensors
