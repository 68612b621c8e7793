"""Encoded rows in memory, and the stream of micro-batches a training run reads from them.

tokens = TokenSet.build(open_source("people.jsonl"), ExampleEncoder(tokenizer, max_length=1024))
stream = TrainStream(tokens, seed=0, rows_per_batch=4, gradient_accumulation_steps=2, max_tokens=4 * 1024)
stream.batches(17)      # the micro-batches of step 17: a pure function of (data, seed, step)
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.data.encoding.encode import TOO_LONG, EncodedSequence, ExampleEncoder
from lorry.data.encoding.joined import encode_joined
from lorry.data.encoding.token_cache import cache_key, read_cached, write_cached
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.formats import DataExample, RowFormat, read_examples
from lorry.data.reading.sources import DataSource
from lorry.data.stream.mixing import MixtureOrder
from lorry.data.stream.pack import epoch_order, sequence_key
from lorry.data.stream.report import DataReport, length_statistics, merge_reports
from lorry.errors import ConfigError, DataError
from lorry.formatting import format_count

CHUNK_ROWS = 1024  # rows encoded by one call of the tokenizer
# and their characters, a few seconds of work: nobody waits longer for the next line about it
CHUNK_CHARACTERS = 1 << 22
FIRST_PROGRESS_SECONDS = 2.0  # seconds until rows that are still being read are spoken of


@dataclass(frozen=True)
class TokenSet:
    """N encoded sequences end to end.

    tokens [T] int32; weights [T] float32, of token t as target; edges [N+1] int64: sequence n is
    tokens[edges[n]:edges[n+1]]; groups [N] int64 (-1: none); where: the place in the source of each
    sequence.
    """

    tokens: np.ndarray
    weights: np.ndarray
    edges: np.ndarray
    groups: np.ndarray
    where: tuple[str, ...]
    report: DataReport
    adapter: int = 0
    role: str = ""
    mixing: MixtureOrder | None = None  # of a mixture: which set each sequence is of

    def count_holding(self, ids: Sequence[int]) -> int:
        """How many of the sequences hold these tokens, one behind the other."""
        last = len(self.tokens) - len(ids)
        if last < 0:
            return 0
        found = np.ones(last + 1, dtype=bool)
        for place, token in enumerate(ids):
            found &= self.tokens[place : place + last + 1] == token
        starts = np.flatnonzero(found)
        sequences = np.searchsorted(self.edges, starts, side="right") - 1
        # not over the end of one into the next
        whole = starts + len(ids) <= self.edges[sequences + 1]
        return len(np.unique(sequences[whole]))

    def absent(self, ids: Sequence[int]) -> list[int]:
        """Those of the tokens that no sequence holds."""
        present = np.zeros(max(ids, default=-1) + 1, dtype=bool)
        present[self.tokens[self.tokens < len(present)]] = True
        return [token for token in ids if not present[token]]

    @classmethod
    def build(
        cls,
        source: DataSource,
        encoder: ExampleEncoder,
        *,
        form: RowFormat | None = None,
        adapter: int = 0,
        role: str = "",
    ) -> TokenSet:
        """Read and encode a whole source. Raises DataError for a bad row (by the source's policy)
        or when no row is left.
        """
        key = cache_key(source, encoder, form)
        if (entry := read_cached(key, encoder.tell)) is not None:
            return cls._of_cache(*entry, adapter=adapter, role=role)
        notes: set[str] = set()
        examples = read_examples(source, form, add_note=notes.add)
        # an encoder of another kind has to see row by row what it is given
        joined = source.joined and type(encoder) is ExampleEncoder
        rows = report_progress(
            encode_joined(examples, encoder) if joined else encode_rows(examples, source, encoder),
            source.label,
            encoder.tell,
        )
        if joined:
            notes.add(
                f"{source.label}: its texts are joined with blank lines and cut "
                f"every {encoder.max_length} tokens, as open-unlearning does; give "
                "the name of the file itself to have each text as a row"
            )
        token_set = cls.of(rows, source, encoder, notes, adapter=adapter, role=role)
        if not len(token_set):
            raise DataError(
                f"{source.label}: no usable row; {source.bad.summary() or 'the data is empty'}"
            )
        # no file changed meanwhile
        if key and not source.bad.total and cache_key(source, encoder, form) == key:
            arrays = {
                "tokens": token_set.tokens,
                "weights": token_set.weights,
                "edges": token_set.edges,
            }
            write_cached(
                key,
                arrays,
                {"report": asdict(token_set.report), "where": token_set.where},
                encoder.tell,
            )
        return token_set

    @classmethod
    def _of_cache(
        cls, arrays: dict[str, np.ndarray], rest: dict[str, Any], *, adapter: int, role: str
    ) -> TokenSet:
        where = tuple(rest["where"])
        report = DataReport(**rest["report"])
        # -1: of no group
        groups = np.full(len(where), -1)
        return cls(
            arrays["tokens"],
            arrays["weights"],
            arrays["edges"],
            groups,
            where,
            report,
            adapter,
            role,
        )

    @classmethod
    def of(
        cls, rows: Iterable[tuple[DataExample, list[EncodedSequence]]], source: DataSource, encoder: ExampleEncoder, notes: Iterable[str] = (), *,
        adapter: int = 0, role: str = "",
    ) -> TokenSet:  # fmt: skip
        """The rows laid end to end, with their report."""
        # an encoder may read several sources, and counts on
        report, before = DataReport(source.label), Counter(encoder.notes)
        tokens, weights, lengths, where = [], [], [], []
        for example, pieces in rows:
            report.rows += 1
            report.shortened += any(piece.cut for piece in pieces)
            report.tokens_cut += sum(piece.cut for piece in pieces)
            # of texts that are read as one, most have no sequence that begins in them
            report.characters_cut += max((piece.skipped for piece in pieces), default=0)
            for piece in pieces:
                # half of int64; no vocabulary needs more
                tokens.append(np.asarray(piece.tokens, dtype=np.int32))
                weights.append(np.asarray(piece.weights, dtype=np.float32))
                lengths.append(len(piece.tokens))
                where.append(example.where)
        flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
        marks = np.concatenate(weights) if weights else np.zeros(0, np.float32)
        edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        report.sequences, report.tokens, report.supervised = (
            len(where),
            len(flat),
            int(np.count_nonzero(marks)),
        )
        report.lengths = length_statistics(np.asarray(lengths))
        report.left_out, report.first_left_out = dict(source.bad.counts), source.bad.first[:5]
        adjusted = encoder.notes - before
        report.notes = [
            *encoder.template.notes,
            *sorted(notes),
            *(f"{note} ({format_count(n, 'row')})" for note, n in sorted(adjusted.items())),
        ]
        return cls(flat, marks, edges, np.full(len(where), -1), tuple(where), report, adapter, role)

    @classmethod
    def mixture(cls, parts: Sequence[TokenSet], shares: tuple[float, ...] | None) -> TokenSet:
        """Sets laid end to end, each sequence remembering by its part's role which set it is of;
        ``shares``: see `MixtureOrder`.
        """
        # [N] the part that each sequence comes from
        of = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
        mixing = MixtureOrder(tuple(part.role for part in parts), of, shares)
        tokens, weights, groups = (
            np.concatenate(column)
            for column in zip(*((p.tokens, p.weights, p.groups) for p in parts), strict=True)
        )
        edges = np.concatenate(
            [[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]
        ).astype(np.int64)
        where = tuple(place for part in parts for place in part.where)
        whole = cls(
            tokens, weights, edges, groups, where, DataReport(""), parts[0].adapter, mixing=mixing
        )
        return replace(
            whole,
            report=merge_reports(
                [(part.role, part.report) for part in parts],
                mixing.quotas(),
                length_statistics(whole.lengths),
            ),
        )

    def __len__(self) -> int:
        return len(self.where)

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """[N] int64: the sequences of an epoch in the order they are read."""
        if self.mixing is not None:
            return self.mixing.order(seed, epoch, shuffle)
        return epoch_order(len(self), seed, epoch, shuffle)

    def role_of(self, row: int) -> str:
        """The role of a sequence; in a mixture the name of its set."""
        return self.role if self.mixing is None else self.mixing.names[self.mixing.of[row]]

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, tokens of each sequence."""
        return np.diff(self.edges)

    def example(self, row: int, epoch: int = 0, first: int = 0) -> TokenizedExample:
        """Sequence ``row`` for a batch; ``first`` is the number of the set's first sequence in a
        longer stream.
        """
        span = slice(self.edges[row], self.edges[row + 1])
        return TokenizedExample(
            self.tokens[span].tolist(),
            self.weights[span].tolist(),
            key=sequence_key(first + row, epoch),
            adapter=self.adapter,
            role=self.role_of(row),
            group=int(self.groups[row]),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over tokens, weights, borders and groups: equal for equal data in equal order, on
        any machine.
        """
        total = hashlib.sha256()
        for values, kind in (
            # little-endian and of one width, whatever the machine
            (self.tokens, "<i4"),
            (self.weights, "<f4"),
            (self.edges, "<i8"),
            (self.groups, "<i8"),
        ):
            total.update(np.ascontiguousarray(values, dtype=kind).tobytes())
        if self.mixing is not None:
            total.update(
                f"{self.mixing.names} {self.mixing.shares} {self.mixing.counts()}".encode()
            )
        return total.hexdigest()

    def select(self, rows: np.ndarray) -> TokenSet:
        """The set of these sequences, in this order."""
        pick = (
            np.concatenate([np.arange(self.edges[row], self.edges[row + 1]) for row in rows])
            if len(rows)
            else np.zeros(0, int)
        )
        edges = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        where = tuple(self.where[row] for row in rows)
        report = replace(
            self.report,
            rows=len(set(where)),
            sequences=len(where),
            tokens=len(pick),
            supervised=int(np.count_nonzero(self.weights[pick])),
            lengths=length_statistics(self.lengths[rows]),
        )
        mixing = None if self.mixing is None else self.mixing.select(rows)
        return TokenSet(
            self.tokens[pick],
            self.weights[pick],
            edges,
            self.groups[rows],
            where,
            report,
            self.adapter,
            self.role,
            mixing,
        )

    def held_out(self, size: float, seed: int) -> tuple[TokenSet, TokenSet]:
        """(the rest, ``size`` rows drawn by the seed): a share below 1 or a count. Pieces of one
        row stay on one side.

        Raises ConfigError when nothing would be left to train on.
        """
        # by row, in order: a long text is several sequences, which would leak into each other
        rows = list(dict.fromkeys(self.where))
        count = max(1, round(size * len(rows))) if size < 1 else int(size)
        if count >= len(rows):
            name = f" of {self.role}" if self.role else ""
            raise ConfigError(
                f"test_size={size} holds out {count} of "
                f"{format_count(len(rows), 'row')}{name}, which leaves none for "
                "training"
            )
        drawn = {rows[at] for at in epoch_order(len(rows), seed, 0, name="held out")[:count]}
        aside = np.array([place in drawn for place in self.where])
        return self.select(np.flatnonzero(~aside)), self.select(np.flatnonzero(aside))

    def eval_batches(self, batch_rows: int) -> list[Batch]:
        """All sequences in file order, ``batch_rows`` to a batch."""
        rows = range(len(self))
        return [
            collate([self.example(row) for row in rows[at : at + batch_rows]])
            for at in range(0, len(rows), batch_rows)
        ]


def report_progress(
    rows: Iterable[tuple[DataExample, list[EncodedSequence]]], label: str, tell: Callable[[str], None] | None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[DataExample, list[EncodedSequence]]]:  # fmt: skip
    """The rows as they come, with a line after 2 s, and again after twice as long each time: nobody
    waits in the dark.
    """
    begun = clock()
    due = FIRST_PROGRESS_SECONDS
    for number, row in enumerate(rows, 1):
        yield row
        if tell is not None and (spent := clock() - begun) >= due:
            tell(
                f"{label}: {format_count(number, 'row')} read and tokenised in {spent:.0f} s, {number / spent:.0f} rows/s"
            )
            # a chunk may have taken longer than several steps of this
            while due <= spent:
                due *= 2


def _read_chunk(examples: Iterator[DataExample]) -> Iterator[DataExample]:
    """The next rows for one call of the tokenizer, which uses every core for them."""
    size = 0
    for row in islice(examples, CHUNK_ROWS):
        yield row
        size += row.content.size
        if size >= CHUNK_CHARACTERS:
            return


def encode_rows(
    examples: Iterator[DataExample], source: DataSource, encoder: ExampleEncoder
) -> Iterator[tuple[DataExample, list[EncodedSequence]]]:
    """Encode rows a chunk at a time; what cannot be encoded goes to ``source.bad``, an answer too
    long is dropped there.
    """
    while chunk := list(_read_chunk(examples)):
        for row, encoded in zip(
            chunk, encoder.encode_many([row.content for row in chunk]), strict=True
        ):
            if not isinstance(encoded, BadRow):
                yield row, encoded
            # nothing is wrong with the row, so on_bad_row=error does not stop for it
            elif encoded.kind == TOO_LONG:
                source.bad.drop(row.where, encoded, row.raw)
            else:
                source.bad.report(row.where, encoded, row.raw)
