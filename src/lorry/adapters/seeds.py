"""Randomness is a function of names: a seed from a few words and numbers."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a few words and numbers, the same on every machine: randomness is a
    function of names.
    """
    # \x1f: a separator that no name contains, so ("ab", "c") and ("a", "bc") differ
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    # 63 bits: nonnegative as an int64, in which tensors of seeds hold it
    return int.from_bytes(digest[:8], "little") >> 1
