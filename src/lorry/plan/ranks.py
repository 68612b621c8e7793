"""Which ranks r=auto chooses from, and how many a data set asks for by its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

# finer than powers of two, with which half of the memory that a rank takes is a rounding
FIRST_RANKS = (1, 2, 4, 8)
MOST_RANK = 256
# what a language model can hold in a weight, whatever it is (Allen-Zhu and Li, arXiv 2404.05405)
BITS_PER_PARAMETER = 2.0


def rank_grid(largest: int) -> list[int]:
    """1 2 4 8 12 16 24 32 48 64 96 128 ... up to ``largest``."""
    ranks = list(FIRST_RANKS)
    for power in count(3):
        ranks += [3 << power - 1, 2 << power]
        if ranks[-1] >= largest:
            break
    return [rank for rank in ranks if rank <= largest]


def next_rank(rank: float, grid: Sequence[int]) -> int:
    """The first of the grid that is no smaller; the last one where none is."""
    return next((each for each in grid if each >= rank), grid[-1])


def capacity_rank(bits: float, parameters: Callable[[int], int], grid: Sequence[int]) -> int:
    """The smallest rank whose adapter has room for so many bits; ``parameters``: of an adapter at a rank.
    The last of the grid where none has."""
    fits = (rank for rank in grid if parameters(rank) * BITS_PER_PARAMETER >= bits)
    return next(fits, grid[-1])
