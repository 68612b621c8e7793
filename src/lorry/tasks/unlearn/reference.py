"""What the start said of a batch, as extras: asked live, or remembered from the first time.

The start is a mix of the model that trains (g = 0 for what trains): no second model. Asked live it
reads the same batch in the same shapes as the policy will, so before the first update both say the
same to the bit, in bfloat16 too; other shapes differ by tenths of a nat a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch, BatchExtra
from lorry.errors import DataError
from lorry.models.scoring.score import FinalHidden, Want
from lorry.tasks.distill.align import sequence_digest
from lorry.tasks.unlearn.methods.method import REFERENCE, reference

MixOf = Mix | Callable[[Batch], Mix]


class ReferenceReader(Protocol):
    """Who attaches to a batch what the start says of it."""

    def attach(self, batch: Batch, wants: Mapping[str, Want], scorer: ScoringBackend) -> Batch: ...


class LiveReference:
    """The start asked about every batch, just before the policy reads it. ``mix``: the start's, or
    what makes it for a batch.
    """

    def __init__(self, mix: MixOf) -> None:
        self.mix = mix

    def attach(self, batch: Batch, wants: Mapping[str, Want], scorer: ScoringBackend) -> Batch:
        """The batch with an extra `reference_NAME` [T, ...] for every want."""
        if not wants:
            return batch
        # the same batch object as the policy reads: other shapes would round otherwise
        mix = self.mix if isinstance(self.mix, Mix) else self.mix(batch)
        scores = scorer.score([batch], wants, mix)[0]
        return attach_said(batch, wants, scores)


def attach_said(batch: Batch, wants: Mapping[str, Want], scores: Mapping[str, Tensor]) -> Batch:
    """The batch with the reference's scores as extras. `FinalHidden` moves on by a token: the head reads that
    of t - 1 to predict t.
    """
    placed = {
        name: values.roll(1, 0) if isinstance(wants[name], FinalHidden) else values
        for name, values in scores.items()
    }
    return batch.with_extra(**{REFERENCE + n: BatchExtra(v, "token") for n, v in placed.items()})


class CachedReference:
    """What the start said of each sequence, read once before training and kept in memory (of
    `FinalHidden`, a row of the model's width a token): nothing of the start is needed later, so base
    weights may train.

    Read in other shapes than the policy's, in bfloat16 it differs from `LiveReference` by rounding:
    0.03 to 0.4 nats a sequence were measured.
    """

    def __init__(self, mix: MixOf) -> None:
        self.live = LiveReference(mix)
        self.scores: dict[bytes, dict[str, Tensor]] = {}

    def read(self, batch: Batch, wants: Mapping[str, Want], scorer: ScoringBackend) -> None:
        """Ask the start about a batch as `UnlearnMethod.prepare` made it."""
        read = self.live.attach(batch, wants, scorer)
        for (start, stop), digest in zip(batch.segments, _digests(batch), strict=True):
            # clone: a view would keep the whole batch's tensor in memory
            self.scores[digest] = {
                name: reference(read, name)[start:stop].clone() for name in wants
            }

    def lacks(self, batch: Batch) -> bool:
        """Whether a sequence of the batch was not read yet."""
        return any(digest not in self.scores for digest in _digests(batch))

    def attach(self, batch: Batch, wants: Mapping[str, Want], scorer: ScoringBackend) -> Batch:
        """The batch with what was kept. Raises DataError for a sequence that was not read: the start
        may be gone by now.
        """
        if not wants:
            return batch
        by_sequence = [self.scores.get(digest) for digest in _digests(batch)]
        missing = [int(batch.key[s]) for s, scores in enumerate(by_sequence) if scores is None]
        if missing:
            raise DataError(
                f"unlearn.reference=cached: {len(missing)} sequences (keys "
                f"{missing[:8]}) were not scored before training"
            )
        cached = [scores for scores in by_sequence if scores is not None]
        return batch.with_extra(
            **{
                REFERENCE + n: BatchExtra(torch.cat([scores[n] for scores in cached]), "token")
                for n in wants
            }
        )


def _digests(batch: Batch) -> list[bytes]:
    """Of each sequence: tokens, weights, and its role, which decides where it is scored."""
    return [
        role.encode()
        + sequence_digest(batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist())
        for role, (start, stop) in zip(batch.role, batch.segments, strict=True)
    ]
