"""The stream of micro-batches that a training run reads: batches by step number, a pure function of
(data, seed, step).

stream = TrainStream(tokens, seed=0, rows_per_batch=4, gradient_accumulation_steps=2, max_tokens=4 * 1024)
stream.batches(17)      # the micro-batches of step 17
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

from lorry.data.batch import Batch, collate
from lorry.data.encoding.token_set import TokenSet
from lorry.data.stream.pack import packing_efficiency, plan_epoch
from lorry.errors import DataError

# epochs: a step asks for the plan of its own and, to count rows, of the first
PLANS_KEPT = 4


class BatchStream(Protocol):
    """What a task asks of its data, in memory (``TrainStream``) or streamed
    (``StreamingTrainStream``).
    """

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of the first epoch; None where nobody knows."""
        ...

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Optimizer steps of a run."""
        ...

    def epoch_of(self, step: int) -> int:
        """The epoch of a step; steps and epochs count from 0."""
        ...

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises DataError when the data is not what it was."""
        ...


def count_steps(micro_batches: int, gradient_accumulation_steps: int) -> int:
    """Optimizer steps for so many micro-batches; the last step may have fewer of them rather than
    none being dropped.
    """
    return -(-micro_batches // gradient_accumulation_steps)


class TrainStream:
    """Micro-batches by step number, the same whenever they are asked for.

    Epoch e reads the rows in ``epoch_order(n, seed, e)``; a step has
    ``gradient_accumulation_steps`` micro-batches, the last step of an epoch the rest.
    ``max_tokens`` bounds a packed micro-batch (rows_per_batch * max_length).
    """

    def __init__(
        self, tokens: TokenSet, *, seed: int, rows_per_batch: int, gradient_accumulation_steps: int = 1, max_tokens: int = 0,
        packing: bool = False, shuffle: bool = True,
    ) -> None:  # fmt: skip
        self.tokens, self.seed, self.shuffle = tokens, seed, shuffle
        self.rows_per_batch, self.accumulation = rows_per_batch, gradient_accumulation_steps
        self.packing, self.max_tokens = packing, max_tokens
        self.plan = lru_cache(PLANS_KEPT)(self._plan)
        self._ends: list[int] = []  # steps before the end of each epoch seen so far

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch (with packing, later epochs may differ by a step or two)."""
        return self._end_of(0)

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Steps of a run: ``max_steps`` if that is positive, else those of ``epochs``, of which the
        last may be a part.
        """
        if max_steps and max_steps > 0:
            return max_steps
        whole = math.floor(epochs)
        # with packing epochs differ by a step or two, so their ends are added up, not multiplied
        before = self._end_of(whole - 1) if whole else 0
        if epochs == whole:
            return before
        # 0.2 * 5 is one step, not a little more
        part = round((epochs - whole) * (self._end_of(whole) - before), 6)
        # however small a part of an epoch: a run has a step
        return max(before + math.ceil(part), 1)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step (counted from 0) belongs to."""
        while not self._ends or self._ends[-1] <= step:
            self._end_of(len(self._ends))
        # the epochs that had ended; asked several times a step, of thousands of epochs
        return bisect_right(self._ends, step)

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of the step's micro-batches."""
        epoch = self.epoch_of(step)
        within = step - (self._end_of(epoch - 1) if epoch else 0)
        # the last slice of an epoch may be shorter: no row waits for the next epoch
        return self.plan(epoch)[within * self.accumulation : (within + 1) * self.accumulation]

    def rows_before(self, step: int) -> int:
        """Sequences that the steps before this one have read, all epochs together."""
        epoch = self.epoch_of(step)
        within = step - (self._end_of(epoch - 1) if epoch else 0)
        earlier = [len(rows) for rows in self.plan(epoch)[: within * self.accumulation]]
        # every epoch reads as many, a mixture's by its shares
        return epoch * sum(len(rows) for rows in self.plan(0)) + sum(earlier)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0."""
        epoch = self.epoch_of(step)
        return [
            collate([self.tokens.example(row, epoch) for row in rows]) for rows in self.rows(step)
        ]

    def fill(self, epoch: int = 0) -> float:
        """Share of ``max_tokens`` that an epoch's micro-batches use; only meaningful with packing."""
        return packing_efficiency(self.tokens.lengths, self.plan(epoch), self.max_tokens)

    def digest(self) -> str:
        """SHA-256 of the data (``TokenSet.digest``)."""
        return self.tokens.digest

    def state(self) -> dict[str, Any]:
        """For a checkpoint: nothing but the digest, since everything else follows from the step."""
        return {"digest": self.digest()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises DataError when the checkpoint was made from other data."""
        if state["digest"] != self.digest():
            raise DataError(
                f"{self.tokens.report.source}: not the data this run was started with "
                "(rows, tokenizer, template or max_length changed); resume with the same, or start a new run"
            )

    def _plan(self, epoch: int) -> list[list[int]]:
        order = self.tokens.order(self.seed, epoch, self.shuffle)
        return plan_epoch(
            self.tokens.lengths,
            order,
            rows_per_batch=self.rows_per_batch,
            max_tokens=self.max_tokens,
            packing=self.packing,
            groups=self.tokens.groups,
        )

    def _end_of(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            # epoch by epoch, each planned once: an end depends on all before it
            self._ends.append(
                before + count_steps(len(self.plan(len(self._ends))), self.accumulation)
            )
        return self._ends[epoch]
