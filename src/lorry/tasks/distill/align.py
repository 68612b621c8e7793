"""A teacher's view of the sequences a student reads: its own tokens of the same conversation, and
which of them answers to which.

    encoder = PairedEncoder(tokenizer, theirs=ExampleEncoder(other_tokenizer, max_length=2048), max_length=1024)
    tokens = TokenSet.build(source, encoder)        # the student's, as ever; encoder.views has the teacher's by `sequence_digest`

Sequences are known by their content, so no order, packing or number has to travel with them. Where
both read the same tokens the view is the sequence itself (`identity_view`). Elsewhere the runs of
supervised tokens are matched one by one and aligned at their starts, the longer cut to the shorter,
as universal logit distillation does (Boizard et al. 2024, arXiv 2402.12030).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorry.data.batch import Batch
from lorry.data.encoding.encode import EncodedSequence, ExampleEncoder
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ExampleContent
from lorry.errors import ConfigError


@dataclass(frozen=True)
class TeacherView:
    """``tokens`` [n] the teacher reads; ``targets`` [m]: the student's tokens, by place in its
    sequence, that a teacher's distribution answers to; ``sources`` [m]: the places in ``tokens``
    after which it stands.
    """

    tokens: Sequence[int]
    targets: Sequence[int]
    sources: Sequence[int]


def sequence_digest(
    tokens: Sequence[int] | np.ndarray, weights: Sequence[float] | np.ndarray
) -> bytes:
    """A sequence's name: 16 bytes of SHA-256 over its tokens and which of them are supervised."""
    # a fixed width and byte order: a cache on disk is found by this name on any machine
    digest = hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes())
    digest.update(np.packbits(np.asarray(weights) != 0).tobytes())
    return digest.digest()[:16]


def sequence_digests(batch: Batch) -> list[bytes]:
    """The name of every sequence of a batch."""
    tokens, weights = batch.tokens.cpu().numpy(), batch.weights.cpu().numpy()
    return [
        sequence_digest(tokens[start:stop], weights[start:stop]) for start, stop in batch.segments
    ]


def identity_view(tokens: Sequence[int], weights: Sequence[float]) -> TeacherView:
    """Of a teacher that reads the same tokens: every supervised one, from the token before it."""
    targets = [t for t, weight in enumerate(weights) if weight]
    # what stands after token t - 1 is the distribution of token t
    return TeacherView(tokens, targets, [t - 1 for t in targets])


def align_sequences(student: EncodedSequence, teacher: EncodedSequence) -> TeacherView | None:
    """Supervised runs matched in order, each aligned at its start; None where they are not equally
    many.
    """
    ours, theirs = _supervised_runs(student.weights), _supervised_runs(teacher.weights)
    # a template that splits a turn in two leaves no way to tell which answer is which
    if len(ours) != len(theirs):
        return None
    pairs = [
        (a + i, b + i)
        for (a, a_end), (b, b_end) in zip(ours, theirs, strict=True)
        # the longer run is cut: two tokenizers agree on where an answer begins, and on no more
        for i in range(min(a_end - a, b_end - b))
    ]
    return TeacherView(
        teacher.tokens, [target for target, _ in pairs], [source - 1 for _, source in pairs]
    )


def _supervised_runs(weights: Sequence[float]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of supervised tokens."""
    marks = np.flatnonzero(
        # framed by zeros, so that every run has both its edges; marks alternate start, stop
        np.diff(np.concatenate([[0], np.asarray(weights) != 0, [0]]).astype(np.int8))
    )
    return [(int(a), int(b)) for a, b in zip(marks[::2], marks[1::2], strict=True)]


class PairedEncoder(ExampleEncoder):
    """The student's encoder, which has ``theirs``, the teacher's, encode everything too: ``views``
    by name, ``missing`` counts the sequences that have none, because the answer does not fit the
    teacher, or its template makes other turns of the chat.
    """

    def __init__(self, tokenizer: Any, *, theirs: ExampleEncoder, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.theirs, self.views, self.missing = theirs, dict[bytes, TeacherView](), 0

    def encode_many(
        self, contents: Sequence[ExampleContent]
    ) -> list[list[EncodedSequence] | BadRow]:
        """As `ExampleEncoder.encode_many`; the views are kept aside."""
        encoded = super().encode_many(contents)
        for ours, theirs in zip(encoded, self.theirs.encode_many(contents), strict=True):
            # only what is bad for the student is left out; else it is learnt without a teacher
            if not isinstance(ours, BadRow):
                self._pair(ours, [] if isinstance(theirs, BadRow) else theirs)
        return encoded

    def _pair(self, ours: Sequence[EncodedSequence], theirs: Sequence[EncodedSequence]) -> None:
        for at, student in enumerate(ours):
            view = align_sequences(student, theirs[at]) if len(theirs) == len(ours) else None
            if view is None:
                self.missing += 1
            else:
                self.views[sequence_digest(student.tokens, student.weights)] = view


def require_same_tokenizer(student: Any, teacher: Any, where: str) -> None:
    """Raises ConfigError, naming the first difference, unless both tokenizers mean the same by
    every id.
    """
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            mine, other = (repr(v[i]) if i in v else "absent" for v in (ours, theirs))
            raise ConfigError(
                f"{where} has another tokenizer: id {i} is {other} there and {mine} "
                f"in the student's ({len(theirs)} and {len(ours)} entries); "
                "distill.loss=uld works across different tokenizers"
            )
