"""The order in which the rows of several sets are read: by weight, evenly among each other, the
same on every machine.

    MixtureOrder(("a", "b"), of, shares=(3.0, 1.0)).order(seed=0, epoch=2, shuffle=True)

Epoch e takes a fixed number of rows of each set and goes on in the set's own endless order where
epoch e - 1 stopped, so no row is seen twice before all of its set were seen once. The sets' rows
lie as evenly among each other as their shares allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorry.data.stream.pack import epoch_order


@dataclass(frozen=True)
class MixtureOrder:
    """Which set each of N sequences belongs to (``of`` [N] int64, into ``names``), and the sets'
    shares of an epoch; None: every sequence once."""

    names: tuple[str, ...]
    of: np.ndarray
    shares: tuple[float, ...] | None

    def select(self, rows: np.ndarray) -> MixtureOrder:
        """Of these sequences only."""
        return MixtureOrder(self.names, self.of[rows], self.shares)

    def counts(self) -> list[int]:
        """Sequences of each set."""
        return [int((self.of == number).sum()) for number in range(len(self.names))]

    def quotas(self) -> list[int]:
        """Sequences of each set in an epoch, together N: by largest remainder."""
        counts = self.counts()
        if self.shares is None:
            return counts
        # a set of which every row is held out has none to give
        shares = [share if count else 0.0 for share, count in zip(self.shares, counts, strict=True)]
        exact = [sum(counts) * share / sum(shares) for share in shares]
        floors = [int(value) for value in exact]
        # ties go to the set that is named first, on every machine
        by_rest = sorted(range(len(exact)), key=lambda at: (floors[at] - exact[at], at))
        for at in by_rest[: sum(counts) - sum(floors)]:
            floors[at] += 1
        return floors

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """[N] int64: the sequences of an epoch in the order they are read; a function of (names,
        seed, epoch).
        """
        rows, places = [], []
        for number, (name, quota) in enumerate(zip(self.names, self.quotas(), strict=True)):
            if not quota:
                continue
            own = np.flatnonzero(self.of == number)
            # epochs go on where the last one stopped: no row twice before all of its set were read
            drawn = _repeat_rows(own, seed, epoch * quota, quota, shuffle, name)
            rows.append(drawn)
            # evenly over the epoch, half a step from its ends, so that no set comes first or last
            # as a block
            places.append((np.arange(quota) + 0.5) / quota)
        # stable: equal places keep the order of the names
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def _repeat_rows(
    own: np.ndarray, seed: int, start: int, count: int, shuffle: bool, name: str
) -> np.ndarray:
    """``count`` entries, from ``start`` on, of a set's rows repeated for ever, each pass in an
    order of its own.
    """
    passes = range(start // len(own), (start + count - 1) // len(own) + 1)
    laid = np.concatenate(
        [own[epoch_order(len(own), seed, number, shuffle, name=f"mix/{name}")] for number in passes]
    )
    first = start - passes[0] * len(own)
    return laid[first : first + count]
