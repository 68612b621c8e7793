"""A stream whose micro-batches hold rows of several sets, each set with a role: what is forgotten,
what is kept, another answer to the same question.

The rows of the first set set the pace: they come in the order of `TrainStream`, and a pass over
them is an epoch. Beside each stands a row of every other set, and after it, in its group, one of
its alternates. All of it is a function of (data, seed, step).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lorry.adapters.seeds import derive_seed
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.data.encoding.token_set import TokenSet
from lorry.data.stream.dataset import TrainStream
from lorry.data.stream.pack import sequence_key
from lorry.errors import DataError

ALTERNATE = "alternate"  # the role of another answer to a row's question
# a step may reach over the end of a pass: the order before and the one after
ORDERS_KEPT = 2


@dataclass(frozen=True)
class Alternates:
    """Other answers to the questions of a set. ``tokens``: all of them, encoded; ``of[row]``: the
    numbers in ``tokens`` of those of a row, at least one each.
    """

    tokens: TokenSet
    of: Sequence[Sequence[int]]

    def example(self, row: int, epoch: int, seed: int) -> TokenizedExample:
        """The row's alternate in an epoch, drawn by (seed, row, epoch)."""
        choices = self.of[row]
        drawn = sequence_key(row, epoch) ^ sequence_key(seed, -1)
        return self.tokens.example(choices[drawn % len(choices)], epoch)


class RoleStream:
    """``first``: the stream that sets the pace, and ``role``, that of its rows; ``beside``: the
    other sets by role, of which every row is drawn once before any is drawn again; ``alternates``:
    by the role of the set they belong to; their own role is "alternate".
    """

    def __init__(
        self,
        first: TrainStream,
        role: str,
        *,
        beside: Mapping[str, TokenSet],
        alternates: Mapping[str, Alternates],
        seed: int,
    ) -> None:
        self.first, self.role, self.seed = first, role, seed
        self.beside, self.alternates = dict(beside), dict(alternates)
        self._order = lru_cache(ORDERS_KEPT)(self._order_of)

    @property
    def steps_per_epoch(self) -> int:
        """Those of the first set's first epoch."""
        return self.first.steps_per_epoch

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Optimizer steps of a run: those of the first set's epochs."""
        return self.first.total_steps(epochs, max_steps)

    def epoch_of(self, step: int) -> int:
        """The epoch of the first set that a step belongs to, both from 0."""
        return self.first.epoch_of(step)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, counted from 0."""
        epoch, drawn, batches = self.epoch_of(step), self.first.rows_before(step), list[Batch]()
        for rows in self.first.rows(step):
            examples = list[TokenizedExample]()
            for row in rows:
                self._add(examples, self.role, self.first.tokens, row, epoch)
            for role, tokens in self.beside.items():
                for number in range(drawn, drawn + len(rows)):
                    # without replacement: every row once in a lap, however long the first set is
                    lap, place = divmod(number, len(tokens))
                    self._add(examples, role, tokens, int(self._order(role, lap)[place]), lap)
            drawn += len(rows)
            batches.append(collate(examples))
        return batches

    def _add(
        self, examples: list[TokenizedExample], role: str, tokens: TokenSet, row: int, epoch: int
    ) -> None:
        """One row of a set, and its alternate if it has one, in a group of their own."""
        own_example = replace(tokens.example(row, epoch), role=role)
        # a row of one set and the row of that number of another are not the same for dropout
        salt = 0 if role == self.role else sequence_key(zlib.crc32(role.encode()), -1)
        own_example = replace(own_example, key=own_example.key ^ salt)
        if role not in self.alternates:
            examples.append(replace(own_example, group=-1))
            return
        # one more than those in this micro-batch; -1 means none
        group = 1 + max((example.group for example in examples), default=-1)
        other = self.alternates[role].example(row, epoch, self.seed)
        examples.append(replace(own_example, group=group))
        # a key of its own for dropout; crc32, for Python's hash of a text is another in every process
        key = own_example.key ^ sequence_key(zlib.crc32(ALTERNATE.encode()), -1)
        examples.append(replace(other, role=ALTERNATE, group=group, key=key))

    def _order_of(self, role: str, lap: int) -> np.ndarray:
        """[n]: the rows of another set in the order of its ``lap``-th pass."""
        # a seed of its own: two sets of one size would share a permutation, and a row of the first
        # would meet the same row of the other in every epoch
        return self.beside[role].order(derive_seed(role, self.seed), lap, self.first.shuffle)

    def alternate_sets(self) -> dict[str, TokenSet]:
        """The other answers, by the role of the rows whose questions they answer."""
        return {role: alternate.tokens for role, alternate in self.alternates.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the digest of every set, since all else follows from the step."""
        return {role: tokens.digest for role, tokens in self._sets().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises DataError when the checkpoint was made from other rows."""
        for role, tokens in self._sets().items():
            if state.get(role) != tokens.digest:
                raise DataError(
                    f"{tokens.report.source}: not the {role} set that this run was "
                    "started with; resume with the same, or start a new run"
                )

    def _sets(self) -> dict[str, TokenSet]:
        others = {
            f"{role} {ALTERNATE}": alternate.tokens for role, alternate in self.alternates.items()
        }
        return {self.role: self.first.tokens, **self.beside, **others}
