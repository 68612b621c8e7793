"""Which rows share a micro-batch, and in what order: pure functions of (seed, epoch), so that there
is no state to lose.

Packing here only decides who shares a micro-batch. Rows are laid end to end either way and never
padded; attention stays inside a row (``Batch.starts``) and positions restart, so nothing leaks from
one row into the next.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from lorry.errors import DataError

# micro-batches' worth of rows that are packed together: a longer window fills better and shuffles
# less
PACKING_WINDOW = 64
MASK_64 = (1 << 64) - 1


def epoch_order(
    n: int, seed: int, epoch: int, shuffle: bool = True, *, name: str = "order"
) -> np.ndarray:
    """[n] int64, the rows of an epoch in the order they are read.

    Sorts Philox's raw 64-bit stream under a key made of (name, seed, epoch) by SHA-256. The raw
    stream of a bit generator is fixed by numpy (NEP 19) where ``Generator.permutation`` is not, so
    the order survives a new numpy.
    """
    if not shuffle:
        return np.arange(n)
    key = hashlib.sha256(f"{name}/{seed}/{epoch}".encode()).digest()
    draws = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")).random_raw(n)
    return np.argsort(np.atleast_1d(draws), kind="stable")


def plan_epoch(
    lengths: np.ndarray, order: np.ndarray, *, rows_per_batch: int, max_tokens: int, packing: bool,
    groups: np.ndarray | None = None,
) -> list[list[int]]:  # fmt: skip
    """The micro-batches of an epoch as lists of row numbers; every row stands in exactly one.

    Without packing a micro-batch has ``rows_per_batch`` rows (the last one may have fewer), a group
    counting as one row. With packing it holds at most ``max_tokens`` tokens: rows are taken in
    windows of about 64 micro-batches, longest first, each into the fullest one it fits (best fit
    decreasing, within 11/9 of the fewest possible). ``groups`` [n]: rows of an equal number >= 0
    stay together. Raises DataError for a row or group that no micro-batch can hold.
    """
    units = _row_units(order, groups)
    if not packing:
        return [
            [*chain(*units[at : at + rows_per_batch])]
            for at in range(0, len(units), rows_per_batch)
        ]
    sizes = [int(lengths[unit].sum()) for unit in units]
    if sizes and max(sizes) > max_tokens:
        raise DataError(
            f"a row (or group of rows) of {max(sizes)} tokens does not fit into a micro-batch of {max_tokens}; "
            "raise per_device_train_batch_size or max_length"
        )
    bins: list[list[int]] = []
    start = filled = 0
    for at, size in enumerate(sizes):
        filled += size
        if filled >= PACKING_WINDOW * max_tokens or at == len(sizes) - 1:
            bins += _best_fit(sizes, range(start, at + 1), max_tokens)
            start, filled = at + 1, 0
    return [[*chain(*(units[at] for at in members))] for members in bins]


def packing_efficiency(
    lengths: np.ndarray, plan: Sequence[Sequence[int]], max_tokens: int
) -> float:
    """Share of the planned room that tokens take, 0 to 1."""
    return (
        float(lengths[np.concatenate([np.asarray(rows) for rows in plan])].sum())
        / (len(plan) * max_tokens)
        if plan
        else 0.0
    )


def sequence_key(row: int, epoch: int) -> int:
    """A 63-bit name of (row, epoch) for everything random about a sequence, such as dropout.

    It depends neither on the seed (which is mixed in where the name is used) nor on batch shape or
    packing. SplitMix64's finaliser (Steele, Lea, Flood 2014).
    """
    x = (row * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xD1B54A32D192ED03) & MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return (x ^ (x >> 31)) >> 1


def _row_units(order: np.ndarray, groups: np.ndarray | None) -> list[list[int]]:
    """Rows that may not part, in the order of their first member; members of a group in file order."""
    if groups is None or not (groups >= 0).any():
        return [[row] for row in order.tolist()]
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        if group >= 0:
            members.setdefault(group, []).append(row)
    units = []
    for row in order.tolist():
        group = int(groups[row])
        if group < 0:
            units.append([row])
        elif group in members:
            units.append(members.pop(group))
    return units


def _best_fit(sizes: Sequence[int], window: range, room: int) -> list[list[int]]:
    """Best fit decreasing: bins of positions, ordered by their earliest member so that long rows
    are not read first.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for at in sorted(window, key=lambda at: (-sizes[at], at)):
        slot = bisect_left(open_bins, (sizes[at], -1))
        left, index = open_bins.pop(slot) if slot < len(open_bins) else (room, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(at)
        insort(open_bins, (left - sizes[at], index))
    return sorted(sorted(members) for members in bins)


def split_by_tokens(
    rows: Iterable[int], lengths: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Neighbours, in the order given, in groups of at most ``max_tokens`` tokens; a longer row is a
    group by itself. ``lengths``: tokens by row number.
    """
    group, tokens = list[int](), 0
    for row in rows:
        if group and tokens + lengths[row] > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += lengths[row]
    if group:
        yield group
