"""Scores: per-token scalars of the logits, computed without ever holding [T, V].

Rows of weight 0 never reach the head. For the others the logits are formed chunk by chunk, every score is evaluated, and, the
head being frozen and tokens independent, d score / d hidden [t, D] is kept instead of the logits: two head GEMMs in all, none in
backward. From three scores on, or when the head itself is adapted, chunks are recomputed in backward. Losses then make what
they like of the scores. T tokens, t supervised rows, D width, V vocabulary, n scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorry.bank.layers import BankLinear
from lorry.bank.mix import Call
from lorry.data.batch import Batch
from lorry.models.decoder import Hidden, Packed

CHUNK = 256
ONE_PASS_SCORES = 2


@dataclass(frozen=True)
class Rows:
    """The supervised tokens a score function sees: targets [t] and the batch's per-token extras [t, ...]."""

    targets: Tensor
    extra: Mapping[str, Tensor]

    def cut(self, start: int, stop: int) -> Rows:
        return Rows(self.targets[start:stop], {n: e[start:stop] for n, e in self.extra.items()})


ScoreFn = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Score:
    """A per-token scalar: ``fn(logits [t,V] fp32, rows) -> [t]``; each row may depend on that row's logits alone."""

    fn: ScoreFn


@dataclass(frozen=True)
class HiddenState:
    """The output of one layer (0-based), [T, D]."""

    layer: int


Want = Score | HiddenState


class Model(Protocol):
    """What scores need of a model: `Decoder` and `HfModel` both have it."""

    def hidden(self, packed: Packed, call: Call, *, taps: Sequence[int] = ..., stop: int | None = ...) -> Hidden: ...
    def logits(self, hidden: Tensor | None, call: Call) -> Tensor: ...


def log_prob(logits: Tensor, rows: Rows) -> Tensor:
    """log p(target)."""
    return logits.gather(1, rows.targets[:, None])[:, 0] - logits.logsumexp(1)


def entropy(logits: Tensor, rows: Rows) -> Tensor:
    """Entropy of the next-token distribution, nats."""
    logp = logits.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def correct(logits: Tensor, rows: Rows) -> Tensor:
    """1 where the most likely token is the target, else 0; carries no gradient."""
    return (logits.argmax(1) == rows.targets).to(logits.dtype)


def evaluate(model: Model, batch: Batch, wants: Mapping[str, Want], call: Call) -> dict[str, Tensor]:
    """Everything a task asked for: scores as [T] (0 at unsupervised tokens), hidden states as [T, D].

    Gradients flow to the adapters when they are enabled. If only hidden states are wanted, the pass stops at the highest.
    """
    scores = {n: w.fn for n, w in wants.items() if isinstance(w, Score)}
    layers = {n: w.layer for n, w in wants.items() if isinstance(w, HiddenState)}
    packed = Packed(batch.tokens, batch.positions, batch.segments)
    stop = None if scores else max(layers.values(), default=None)
    hidden = model.hidden(packed, call, taps=sorted(set(layers.values())), stop=stop)
    got = {name: hidden.taps[layer] for name, layer in layers.items()}
    if scores:
        assert hidden.last is not None
        table = score_rows(model, hidden.last, batch, list(scores.values()), call)
        for name, column in zip(scores, table.unbind(1), strict=True):
            got[name] = column.new_zeros(batch.tokens.numel()).index_copy(0, batch.rows, column)
    return got


def score_rows(model: Model, hidden: Tensor, batch: Batch, fns: Sequence[ScoreFn], call: Call) -> Tensor:
    """[t, n] fp32: every score at every supervised token. The logits of target t stand at position t-1."""
    extra = {name: e.values[batch.rows] for name, e in batch.extra.items() if e.per == "token"}
    rows = Rows(batch.tokens[batch.rows], extra)
    sources = batch.rows - 1
    picked = hidden.index_select(0, sources)
    head = frozen_head(model, call)
    if head is not None and (len(fns) <= ONE_PASS_SCORES or not picked.requires_grad):
        return OnePass.apply(picked, head, fns, rows)
    parts = []
    for start in range(0, picked.shape[0], CHUNK):
        stop = min(start + CHUNK, picked.shape[0])
        narrowed = call.narrow(sources[start:stop])
        part = (_chunk_scores, model, picked[start:stop], rows.cut(start, stop), fns, narrowed)
        parts.append(
            checkpoint(*part, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else part[0](*part[1:])
        )
    return torch.cat(parts) if parts else picked.new_zeros(0, len(fns), dtype=torch.float32)


def frozen_head(model: Model, call: Call) -> Tensor | None:
    """The head's weight [V, D] when nothing in this call adapts it and it is a plain product; else None."""
    head = getattr(model, "head", None)
    if isinstance(head, BankLinear):
        plain = not head.terms(head.resolve(call)) and not head.transposed
    else:
        plain = isinstance(head, nn.Linear)
    if head is None or not plain or head.bias is not None or head.weight.requires_grad:
        return None
    return head.weight


def widen(x: Tensor) -> Tensor:
    """At least fp32: scores of a bf16 model are fp32, those of a float64 model stay float64."""
    return x if x.dtype == torch.float64 else x.float()


def _chunk_scores(model: Model, hidden: Tensor, rows: Rows, fns: Sequence[ScoreFn], call: Call) -> Tensor:
    logits = widen(model.logits(hidden, call))
    return torch.stack([fn(logits, rows) for fn in fns], 1)


class OnePass(torch.autograd.Function):
    """`apply(hidden [t,D], head [V,D], fns, rows) -> [t,n]`, with d score / d hidden formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, fns: Sequence[ScoreFn], rows: Rows) -> Tensor:
        need = ctx.needs_input_grad[0]
        t, n = hidden.shape[0], len(fns)
        out = widen(hidden.new_zeros(t, n))
        slopes = [torch.empty_like(hidden) for _ in range(n)] if need else []
        for start in range(0, t, CHUNK):
            stop = min(start + CHUNK, t)
            part = rows.cut(start, stop)
            logits = F.linear(hidden[start:stop], head).to(out.dtype)
            with torch.set_grad_enabled(need):
                logits.requires_grad_(need)
                for j, fn in enumerate(fns):
                    score = fn(logits, part)
                    out[start:stop, j] = score.detach()
                    if not need:
                        continue
                    if not score.requires_grad:
                        slopes[j][start:stop] = 0
                        continue
                    (slope,) = torch.autograd.grad(score.sum(), logits)
                    slopes[j][start:stop] = torch.mm(slope.to(hidden.dtype), head)
        ctx.save_for_backward(*slopes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = None
        for j, slope in enumerate(ctx.saved_tensors):
            part = slope * grads[0][:, j, None].to(slope.dtype)
            total = part if total is None else total + part
        return total, None, None, None
