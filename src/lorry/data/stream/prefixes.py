"""Sequences that begin alike, laid out so that a token which several of them have at the same place,
behind the same tokens, stands once: a tree of prefixes.

    tree = lay_out_tree([[1, 2, 3], [1, 2, 4]])
    tree.tokens     # [1, 2, 3, 4]
    tree.places     # [0, 1, 2, 0, 1, 3]: the two sequences end to end, by places in tokens

In a causal model a token's state hangs on the tokens before it alone, so the two may share it.
`models/shared_prefixes.py` runs such a tree, and says which sequences go into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Times max_tokens that the sequences of a group may hold in all: attention reads each of them whole,
# so a thousand short options of one long prompt would need the memory of a thousand prompts.
MOST_REPEATED = 8


@dataclass(frozen=True)
class PrefixTree:
    """``tokens`` [T], each once; ``positions`` [T], counted from 0 in its sequence; ``places`` [F]:
    where in ``tokens`` those of the sequences stand, which lie end to end in their order.
    """

    tokens: list[int]
    positions: list[int]
    places: list[int]


def lay_out_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """The tree of some sequences. Equal ones stand once."""
    tokens, positions = list[int](), list[int]()
    paths: list[list[int]] = [[] for _ in sequences]
    before: tuple[int, ...] = ()
    path = list[int]()
    for number in prefix_order(sequences):
        sequence = tuple(sequences[number])
        # in this order nobody earlier has a longer prefix in common with it than its neighbour
        shared = common_prefix_length(before, sequence)
        own = len(sequence) - shared
        path = [*path[:shared], *range(len(tokens), len(tokens) + own)]
        tokens += sequence[shared:]
        positions += range(shared, len(sequence))
        paths[number], before = path, sequence
    return PrefixTree(tokens, positions, [place for path in paths for place in path])


def split_by_tree_tokens(
    sequences: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Numbers of the sequences in groups whose trees hold at most ``max_tokens`` tokens each, those
    that begin alike side by side; a longer sequence is a group by itself.
    """
    group, held, whole = list[int](), 0, 0
    for number in prefix_order(sequences):
        length = len(sequences[number])
        shared = common_prefix_length(sequences[group[-1]], sequences[number]) if group else 0
        full = whole + length > MOST_REPEATED * max_tokens
        if group and (held + length - shared > max_tokens or full):
            yield group
            group, held, whole, shared = [], 0, 0, 0
        group.append(number)
        held, whole = held + length - shared, whole + length
    if group:
        yield group


def prefix_order(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the sequences in the order of their tokens, as words stand in a dictionary."""
    return sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
