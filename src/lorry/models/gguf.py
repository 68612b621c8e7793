"""The header of a GGUF file, checked against the file's size before anybody else opens it.

GGUF readers have trusted sizes and offsets from the file (CVE-2026-27940, CVE-2025-53630, CVE-2026-33298). Here every count,
length and offset must fit into the bytes that are really there. Little-endian GGUF versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorry.errors import ModelError

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
STRING, ARRAY = 8, 9
WORDS = ("general.architecture", "tokenizer.ggml.pre")
MOST_TENSORS = 1_000_000
MOST_KEYS = 100_000
MOST_NAME = 1 << 16


@dataclass
class _Reader:
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
        left = self.size - self.file.tell()
        if count > left:
            raise ModelError(f"{self.path}: {what} claims {count} bytes where {left} are left; the file is truncated or hostile")

    def number(self, kind: str, what: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))[0])

    def text(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode("utf-8", "replace")


def check_gguf(path: Path) -> dict[str, str]:
    """Walk the header. Returns the words of WORDS it has. Raises ModelError when anything lies outside the file."""
    with path.open("rb") as file:
        reader = _Reader(file, path, path.stat().st_size)
        if reader.take(4, "the magic number") != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        version = reader.number("I", "the version")
        if version not in (2, 3):
            raise ModelError(f"{path}: GGUF version {version}; versions 2 and 3 (little-endian) are read")
        tensors, keys = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of keys")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ModelError(f"{path}: claims {tensors} tensors and {keys} keys; truncated or hostile")
        words, alignment = {}, 32
        for _ in range(keys):
            name = reader.text("a key")
            kind = reader.number("I", name)
            if name in WORDS and kind == STRING:
                words[name] = reader.text(name)
            elif name == "general.alignment" and kind == 4:
                alignment = reader.number("I", name)
            else:
                _skip_value(reader, kind, name)
        if alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{path}: general.alignment is {alignment}, not a power of two")
        _check_tensors(reader, tensors, alignment)
    return words


def _skip_value(reader: _Reader, kind: int, name: str, depth: int = 0) -> None:
    if kind in SCALARS:
        reader.skip(SCALARS[kind], name)
    elif kind == STRING:
        reader.skip(reader.number("Q", name), name)
    elif kind == ARRAY and depth < 4:
        inner, count = reader.number("I", name), reader.number("Q", name)
        if inner in SCALARS:
            reader.skip(SCALARS[inner] * count, name)
        else:
            smallest = 8 if inner == STRING else 12
            if count * smallest > reader.size:
                raise ModelError(f"{reader.path}: {name} claims {count} entries; truncated or hostile")
            for _ in range(count):
                _skip_value(reader, inner, name, depth + 1)
    else:
        raise ModelError(f"{reader.path}: {name} has the unknown value type {kind}")


def _check_tensors(reader: _Reader, count: int, alignment: int) -> None:
    """Tensor descriptions, then each one's bytes against the end of the file."""
    described = []
    for _ in range(count):
        name = reader.text("a tensor's name")
        if not 0 < len(name) <= MOST_NAME:
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
    for name, shape, quantisation, offset in described:
        block, bytes_per_block = GGML_QUANT_SIZES[quantisation]
        numel = 1
        for n in shape:
            numel *= n
        if not numel or numel % block or (shape and shape[0] % block):
            raise ModelError(f"{reader.path}: {name} of shape {shape} does not divide into blocks of {block}")
        if offset % alignment or start + offset + numel // block * bytes_per_block > reader.size:
            raise ModelError(f"{reader.path}: {name} lies outside the file (offset {offset}); truncated or hostile")
