"""Distillation: learn the answers of the data and, at every token of them, a teacher's whole
distribution.

    loss = ce * CE + weight * scale * D        D: mean over the supervised tokens that the teacher speaks of

Both means are loss terms of their own, `nll_loss` and `distill`, each divided by its own weights,
logged with their factors so that they add up to the loss. The teacher reads a batch before the
student does and what is needed of it travels as extras:

    teacher_hidden [T,d'], at each supervised token what the teacher's head reads; or teacher_ids, teacher_log_probs [T,k]
    taught [T]: 1 where there is a teacher's distribution, else 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.backends.protocol import LossTerms, ScoringBackend
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.data.stream.joint import JointStream
from lorry.models.scoring.divergence import full_vocab_divergence, top_k_divergence
from lorry.models.scoring.score import FinalHidden, ScoreFn, TokenScore, Want, log_prob
from lorry.tasks.distill.align import TeacherView, identity_view, sequence_digest
from lorry.tasks.losses import distillation_loss, nll_loss
from lorry.tasks.sft import SftTask

TEACHER_HIDDEN, TEACHER_IDS, TEACHER_LOG_PROBS, TAUGHT_MASK = (
    "teacher_hidden",
    "teacher_ids",
    "teacher_log_probs",
    "taught",
)
TOP_K_CHUNK = 256  # rows of a teacher's logits at a time
# what the teacher's head reads [t,d'] -> its logits [t,V], divided by the temperature
TeacherHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DistillObjective:
    """What is minimised. ``ce``, ``weight``: of the two terms (1 - alpha and alpha; or 1 and w);
    ``loss``, ``beta``: the divergence, a name of `models/scoring/divergence.py`; ``temperature`` of
    both distributions in it.
    """

    loss: str = "kl"
    temperature: float = 1.0
    beta: float = 0.5
    ce: float = 0.5
    weight: float = 0.5

    @property
    def scale(self) -> float:
        """temperature^2, which keeps the divergences' gradients as large as at 1 (Hinton et al.
        2015, arXiv 1503.02531). uld's, a sum of absolute differences, shrink by the temperature
        once and are left as published.
        """
        return 1.0 if self.loss == "uld" else self.temperature**2


class DistillTeacher(Protocol):
    """``fn``: the divergence, a function of the student's logits and of the extras that `attach`
    puts on batches.
    """

    @property
    def fn(self) -> ScoreFn: ...

    def attach(
        self, batches: Sequence[Batch], models: Mapping[str, ScoringBackend]
    ) -> list[Batch]: ...


class DistillTask(SftTask):
    """`SftTask` with a teacher. ``models``: who scores the held-out rows, once, as `step_batches`
    is given it for those of a step.
    """

    def __init__(
        self, stream: JointStream, evaluation: Sequence[Batch], total_steps: int, adapters: Sequence[str], *,
        aim: DistillObjective, teacher: DistillTeacher, models: Mapping[str, ScoringBackend],
    ) -> None:  # fmt: skip
        super().__init__(stream, teacher.attach(evaluation, models), total_steps, adapters)
        self.aim, self.teacher = aim, teacher

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """The log-probability of every supervised token, and the divergence there."""
        plain: dict[str, Want] = {"logprob": TokenScore(log_prob)} if self.aim.ce else {}
        return {**plain, "distill": TokenScore(self.teacher.fn, self.aim.temperature)}

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The micro-batches of a step, with what the teacher has to say of them."""
        return [self._weigh(b) for b in self.teacher.attach(self.stream.batches(step), models)]

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """Both terms, with their factors."""
        # a factor of 0 leaves the term out: its score would cost a pass over the vocabulary
        plain = {"nll": self.aim.ce * nll_loss(got["logprob"], batch)} if self.aim.ce else {}
        taught = batch.extra[TAUGHT_MASK].values
        return {
            **plain,
            "distill": self.aim.weight
            * self.aim.scale
            * distillation_loss(got["distill"], taught, batch),
        }

    def _weigh(self, batch: Batch) -> Batch:
        each, taught = (
            len(self.adapters),
            # the divergence is a mean over the tokens taught, not over all that are supervised
            replaced(batch, weights=batch.weights * batch.extra[TAUGHT_MASK].values),
        )
        plain = {"nll": batch.count("token", each)} if self.aim.ce else {}
        return batch.with_terms(**plain, distill=taught.count("token", each))


@dataclass(frozen=True)
class TeacherReader:
    """How a teacher reads a batch. ``views``: its view of a sequence by `align.sequence_digest`;
    None: it reads the student's own tokens. ``context``: the longest sequence it can take; ``mix``:
    of `ScoringBackend.score`.
    """

    views: Mapping[bytes, TeacherView] | None = None
    context: int | None = None
    mix: Mix | None = None

    def view(self, tokens: Sequence[int], weights: Sequence[float]) -> TeacherView | None:
        """What the teacher reads of a sequence; None when it has no view of it, or one too long for
        it.
        """
        teacher_view = (
            identity_view(tokens, weights)
            if self.views is None
            else self.views.get(sequence_digest(tokens, weights))
        )
        return (
            None
            if teacher_view is None or (self.context and len(teacher_view.tokens) > self.context)
            else teacher_view
        )

    def read(self, batch: Batch, scorer: ScoringBackend) -> tuple[Tensor, Tensor]:
        """(places [t] of the batch's tokens the teacher speaks of, the hidden states [t,d'] it
        speaks from).
        """
        examples, at, sources, offset = list[TokenizedExample](), list[int](), list[int](), 0
        for start, stop in batch.segments:
            view = self.view(batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist())
            if view is None:
                continue
            # weights 0: hidden states are asked of every place, no score of any token
            examples.append(TokenizedExample(view.tokens, [0.0] * len(view.tokens)))
            at += [start + target for target in view.targets]
            # places in the teacher's own packed batch, whose sequences may be shorter or longer
            sources += [offset + source for source in view.sources]
            offset += len(view.tokens)
        if not examples:  # the width of nothing is asked for all the same
            examples = [TokenizedExample([0], [0.0])]
        hidden = scorer.score([collate(examples)], {"hidden": FinalHidden()}, self.mix)[0]["hidden"]
        return torch.tensor(at, dtype=torch.int64), hidden[torch.tensor(sources, dtype=torch.int64)]


class LiveTeacher:
    """A teacher at work: `models["teacher"]`, or the student's own model under the reader's mix.
    ``head``: see `TeacherHead`; it must not depend on what trains. ``k``: take its likeliest tokens
    only.
    """

    def __init__(
        self, aim: DistillObjective, head: TeacherHead, reader: TeacherReader, k: int | None = None
    ) -> None:
        self.head, self.reader, self.k = head, reader, k
        if k is None:
            self.fn: ScoreFn = full_vocab_divergence(
                aim.loss, lambda rows: head(rows.extra[TEACHER_HIDDEN]), aim.beta
            )
        else:
            self.fn = top_k_divergence(aim.loss, TEACHER_IDS, TEACHER_LOG_PROBS, aim.beta)

    def attach(self, batches: Sequence[Batch], models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The batches with the extras."""
        # without a model of its own the teacher is the student's, under the reader's mix
        scorer = models["teacher"] if "teacher" in models else models["self"]
        return [self._attached(batch, *self.reader.read(batch, scorer)) for batch in batches]

    def _attached(self, batch: Batch, at: Tensor, hidden: Tensor) -> Batch:
        if self.k is not None:
            return attach_top_k(batch, at, *self._likeliest(hidden, self.k))
        taught = torch.zeros(batch.tokens.numel()).index_fill_(0, at, 1.0)
        placed = hidden.new_zeros(batch.tokens.numel(), hidden.shape[1]).index_copy_(0, at, hidden)
        return batch.with_extra(
            **{
                TEACHER_HIDDEN: BatchExtra(placed, "token"),
                TAUGHT_MASK: BatchExtra(taught, "token"),
            }
        )

    def _likeliest(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[t,k] ids, [t,k] log-probabilities at the temperature, likeliest first."""
        parts = (
            [
                # fp32, as the student's side is; 256 rows at a time, since [t, V] may be gigabytes
                self.head(part).float().log_softmax(1).topk(k, 1)
                for part in hidden.split(TOP_K_CHUNK)
            ]
            if len(hidden)
            else []
        )
        if not parts:
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


def attach_top_k(batch: Batch, at: Tensor, ids: Tensor, log_probs: Tensor) -> Batch:
    """The batch with a teacher's k likeliest tokens [t,k] at the places ``at`` [t]; elsewhere any
    that are distinct.
    """
    size, k = batch.tokens.numel(), ids.shape[1]
    # distinct ids where nobody speaks: of equal ones the student's rest would fall below 0
    tokens = torch.arange(k).repeat(size, 1).index_copy_(0, at, ids)
    # 1 / (k + 1) each, and as much for the rest: a proper distribution, of weight 0
    placed = torch.full((size, k), -torch.tensor(k + 1.0).log().item()).index_copy_(
        0, at, log_probs
    )
    taught = torch.zeros(size).index_fill_(0, at, 1.0)
    return batch.with_extra(
        **{
            TEACHER_IDS: BatchExtra(tokens, "token"),
            TEACHER_LOG_PROBS: BatchExtra(placed, "token"),
            TAUGHT_MASK: BatchExtra(taught, "token"),
        }
    )
