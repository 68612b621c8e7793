"""A source too large for memory: rows are read, encoded, shuffled and packed a window at a time.

Within a window everything is the same pure function of (seed, epoch, window) as for a set in
memory, so a position is four numbers. A step never spans two windows: the last step of a window may
be a smaller one, as at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorry.data.batch import Batch, collate
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, encode_rows
from lorry.data.reading.formats import DataExample, RowFormat, read_examples
from lorry.data.reading.sources import DataSource
from lorry.data.stream.dataset import count_steps
from lorry.data.stream.pack import epoch_order, plan_epoch
from lorry.errors import ConfigError, DataError

WINDOW_ROWS = 8192


class StreamingTokenSet:
    """Windows of ``window_rows`` readable rows of a source, each a ``TokenSet``; only one is in
    memory at a time.
    """

    def __init__(
        self,
        source: DataSource,
        encoder: ExampleEncoder,
        *,
        form: RowFormat | None = None,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.source, self.encoder, self.form, self.window_rows = source, encoder, form, window_rows

    def windows(self, first: int = 0) -> Iterator[tuple[int, TokenSet]]:
        """(number, tokens) of each window from ``first`` on that has a usable row. Earlier rows are
        read past, not encoded.
        """
        notes: set[str] = set()
        examples = read_examples(
            self.source, self.form, start=first * self.window_rows, add_note=notes.add
        )
        # a window ends when a row behind it was read; that row opens the next one
        ahead = next(examples, None)
        while ahead is not None:
            number = ahead.number // self.window_rows
            window = _RowWindow(ahead, examples, (number + 1) * self.window_rows)
            tokens = TokenSet.of(
                encode_rows(iter(window), self.source, self.encoder),
                self.source,
                self.encoder,
                notes,
            )
            ahead = window.ahead
            # a window of bad rows alone has nothing to plan, and is passed over with its number
            if len(tokens):
                yield number, tokens


class _RowWindow:
    """The rows before ``end``; ``ahead`` is then the first one behind it."""

    def __init__(self, first: DataExample, rest: Iterator[DataExample], end: int) -> None:
        self.ahead: DataExample | None = first
        self._rest, self._end = rest, end

    def __iter__(self) -> Iterator[DataExample]:
        while self.ahead is not None and self.ahead.number < self._end:
            yield self.ahead
            self.ahead = next(self._rest, None)


class StreamingTrainStream:
    """``TrainStream``'s batches in order of steps, for a ``StreamingTokenSet``.

    ``batches(step)`` takes the steps one after the other; ``state`` is small JSON, and after
    ``load_state`` the batches equal those of a stream that was never stopped.
    """

    def __init__(
        self, rows: StreamingTokenSet, *, seed: int, rows_per_batch: int, gradient_accumulation_steps: int = 1,
        max_tokens: int = 0, packing: bool = False, shuffle: bool = True,
    ) -> None:  # fmt: skip
        self.data, self.seed, self.shuffle = rows, seed, shuffle
        self.rows_per_batch, self.accumulation = rows_per_batch, gradient_accumulation_steps
        self.packing, self.max_tokens = packing, max_tokens
        # reads the first window, so bad data shows before a model is loaded
        self._open(epoch=0, window=0)
        self._step = self._within = 0

    @property
    def steps_per_epoch(self) -> None:
        """Nobody knows how many rows will come."""
        return None

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """``max_steps``, which a stream needs. Raises ConfigError without it: nobody knows how many
        rows will come.
        """
        if not max_steps or max_steps <= 0:
            raise ConfigError(
                "streaming=true needs max_steps: the number of steps is not known "
                "before the data is read"
            )
        return max_steps

    def epoch_of(self, step: int) -> int:
        """The epoch of the next step; a stream knows no other."""
        self._expect(step)
        return self._epoch

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of the next step. Raises ValueError when ``step`` is not the next one."""
        self._expect(step)
        if self._within >= count_steps(len(self._plan), self.accumulation):
            # not behind the last step of a window: the next one is read when it is needed
            self._advance()
        rows = self._plan[self._within * self.accumulation : (self._within + 1) * self.accumulation]
        # windows are numbered apart by more rows than one can hold, so that no two sequences of an
        # epoch share a key
        first = self._window << 32
        batches = [
            collate([self._tokens.example(row, self._epoch, first) for row in batch])
            for batch in rows
        ]
        self._step, self._within = step + 1, self._within + 1
        return batches

    def state(self) -> dict[str, Any]:
        """The position before the next step, and the digest of the window it stands in."""
        return {
            "step": self._step,
            "epoch": self._epoch,
            "window": self._window,
            "within": self._within,
            "digest": self._tokens.digest,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises DataError when its window no longer holds the same tokens."""
        self._open(epoch=state["epoch"], window=state["window"])
        self._step, self._within = state["step"], state["within"]
        # an earlier window may be without usable rows by now, and then another one opens
        if self._window != state["window"] or self._tokens.digest != state["digest"]:
            raise DataError(
                f"{self.data.source.label}: not the data this run was started with, in window {state['window']} "
                "(rows, tokenizer, template or max_length changed); resume with the same, or start a new run"
            )

    def _expect(self, step: int) -> None:
        if step != self._step:
            raise ValueError(
                f"a stream yields its steps in order: step {self._step} is next, "
                f"but step {step} was requested"
            )

    def _open(self, epoch: int, window: int) -> None:
        self._epoch = epoch
        self._windows = self.data.windows(window)
        opened = next(self._windows, None)
        if opened is None:
            raise DataError(
                f"{self.data.source.label}: no usable row; {self.data.source.bad.summary() or 'the data is empty'}"
            )
        self._take(opened)

    def _advance(self) -> None:
        following = next(self._windows, None)
        if following is None:
            self._open(self._epoch + 1, 0)
        else:
            self._take(following)
        self._within = 0

    def _take(self, opened: tuple[int, TokenSet]) -> None:
        self._window, self._tokens = opened
        order = epoch_order(
            len(self._tokens), self.seed, self._epoch, self.shuffle, name=f"window {self._window}"
        )
        self._plan = plan_epoch(
            self._tokens.lengths,
            order,
            rows_per_batch=self.rows_per_batch,
            max_tokens=self.max_tokens,
            packing=self.packing,
        )
