"""Scores: per-token scalars of the logits, computed without ever holding [T, V].

Rows of weight 0 never reach the head. The head being frozen, `VocabStatistic`s (log-probability,
entropy, top-k divergences ...) go through it a tile of the vocabulary at a time
(`models/scoring/tiles.py`); other functions see whole rows, chunk by chunk, and up to two of them
keep d score / d hidden [t, D] instead of the logits. From three on, or when the head itself is
adapted, chunks are recomputed in backward. Losses then make what they like of the scores. T tokens,
t supervised rows, D width, V vocabulary, n scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext
from lorry.adapters.tensor_parallel.ranks import CopyToRanks
from lorry.adapters.variants.own_weights import find_own_rows, under
from lorry.data.batch import Batch
from lorry.errors import ContractError, DataError
from lorry.kernels import matmul
from lorry.kernels.softmax import accumulator_dtype
from lorry.models.causal_lm import CausalLM, PackedInput, invoke, pooled_states, with_prompt_gates
from lorry.models.owners import BatchPart, parts_by_owner
from lorry.models.scoring.tiles import (
    LogitsStatistics,
    OutputHead,
    StatisticsRequest,
    compute_statistics,
)
from lorry.models.scoring.vocab import (
    DenseScore,
    ScoreFn,
    VocabRows,
    VocabStatistic,
    correct,
    entropy,
    log_prob,
)
from lorry.models.shared_prefixes import hidden_sharing_prefixes

__all__ = [
    "FinalHidden",
    "HiddenState",
    "PromptState",
    "RouterLogits",
    "ScoreFn",
    "TokenScore",
    "VocabRows",
    "Want",
    "correct",
    "entropy",
    "evaluate_wants",
    "frozen_head",
    "log_prob",
    "prompt_lengths",
    "scale_by_temperature",
    "score_supervised_tokens",
]

# 256 rows of 128k logits are 64 MiB in bf16: small, and large enough for the product to be fast
CHUNK_TOKENS = 256
# each keeps [t, D] and costs one more product; from three on recomputing is cheaper
ONE_PASS_SCORES = 2


@dataclass(frozen=True)
class TokenScore:
    """A per-token scalar: ``fn(logits [t,V] fp32, rows) -> [t]``; each row may depend on that row's
    logits alone. Those of `models/scoring/vocab.py` and `models/scoring/divergence.py` have slopes
    in closed form; of any other function autograd finds it. ``temperature``: what the logits are
    divided by first; ``weights``: the per-token extra whose entries other than 0 say at which
    tokens the score is wanted, never at a sequence's first (None: at the supervised ones, those of
    the batch's own weights). Scores of one temperature at the same tokens share their passes over
    the head; nothing is paid for other tokens.
    """

    fn: ScoreFn
    temperature: float = 1.0
    weights: str | None = None


@dataclass(frozen=True)
class HiddenState:
    """The output of one layer (0-based), [T, D]."""

    layer: int


@dataclass(frozen=True)
class FinalHidden:
    """What the head reads: the hidden state after the final norm, [T, D]; the logits of target t
    are made of that at t-1.
    """


@dataclass(frozen=True)
class RouterLogits:
    """What the mix's router made in every layer before the softmax, [T, sites, adapters]: sites are
    the layers' halves that it reads, in the order they run. Raises ContractError without a router.
    """


@dataclass(frozen=True)
class PromptState:
    """The state of each sequence's prompt, what stands before its first supervised token, [S, D]
    fp32: of a layer's output (0-based; None: after the final norm), `pooled_states` over its tokens.
    Raises DataError for a sequence without a prompt.
    """

    layer: int | None
    pooling: str


Want = TokenScore | HiddenState | FinalHidden | RouterLogits | PromptState


def evaluate_wants(
    model: CausalLM,
    batch: Batch,
    wants: Mapping[str, Want],
    call: AdapterContext,
    *,
    share_prefixes: bool = False,
) -> dict[str, Tensor]:
    """Everything a task asked for: scores as [T] (0 where they are not wanted), hidden states as
    [T, D], states of prompts as [S, D].

    Gradients flow to the adapters when they are enabled. If only hidden states are wanted, the pass
    stops at the highest. A router of the sequence (`SequenceRouter`) sees what comes before a
    sequence's first supervised token, as it would in generation. ``share_prefixes``: what sequences
    have in common at their beginning is run once where it can be (`models/shared_prefixes.py`).
    Raises DataError for a sequence without a prompt where such a router asks for it. Sequences of several
    adapters with weights of their own are run in parts (`models.owners`).
    """
    if (parts := parts_by_owner(model, batch, call)) is not None:
        return _joined(model, batch, wants, parts, share_prefixes=share_prefixes)
    return _evaluate_together(model, batch, wants, call, share_prefixes=share_prefixes)


def _evaluate_together(
    model: CausalLM,
    batch: Batch,
    wants: Mapping[str, Want],
    call: AdapterContext,
    *,
    share_prefixes: bool,
) -> dict[str, Tensor]:
    """`evaluate_wants` in one pass."""
    scores = {n: w for n, w in wants.items() if isinstance(w, TokenScore)}
    final = [n for n, w in wants.items() if isinstance(w, FinalHidden)]
    layers = {n: w.layer for n, w in wants.items() if isinstance(w, HiddenState)}
    prompts = {n: w for n, w in wants.items() if isinstance(w, PromptState)}
    of_layers = {*layers.values(), *(w.layer for w in prompts.values() if w.layer is not None)}
    of_final = any(w.layer is None for w in prompts.values())
    packed = PackedInput(batch.tokens, batch.positions, batch.segments)
    if call.mix.sequence_router is not None:
        call = with_prompt_gates(model, packed, call, prompt_lengths(batch))
    else:
        call = invoke(model, packed, call)
    routed = [name for name, want in wants.items() if isinstance(want, RouterLogits)]
    stop = None if scores or final or routed or of_final else max(of_layers, default=None)
    run = partial(hidden_sharing_prefixes, model) if share_prefixes else model.hidden
    hidden = run(packed, call, output_layers=sorted(of_layers), stop=stop)
    outputs = {name: hidden.layer_outputs[layer] for name, layer in layers.items()}
    if prompts:
        ends = zip(batch.segments, prompt_lengths(batch), strict=True)
        spans = [(start, start + length) for (start, _), length in ends]
        for name, want in prompts.items():
            state = hidden.last if want.layer is None else hidden.layer_outputs[want.layer]
            assert state is not None
            outputs[name] = pooled_states(state, spans, want.pooling)
    if routed:
        if not hidden.router_logits:
            raise ContractError("router logits were requested, but the mix has no router")
        outputs |= dict.fromkeys(routed, torch.stack(list(hidden.router_logits), 1))
    if scores or final:
        assert hidden.last is not None
        outputs |= dict.fromkeys(final, hidden.last)
        # grouped: scores of one temperature and one set of rows share a pass over the head
        for temperature, weights in dict.fromkeys(
            (w.temperature, w.weights) for w in scores.values()
        ):
            group = {
                n: w.fn
                for n, w in scores.items()
                if (w.temperature, w.weights) == (temperature, weights)
            }
            at = batch.rows if weights is None else _weighted_rows(batch, weights)
            table = score_supervised_tokens(
                model, hidden.last, batch, list(group.values()), call, temperature, at
            )
            for name, column in zip(group, table.unbind(1), strict=True):
                # 0 at all other tokens, whose scores no loss reads
                outputs[name] = column.new_zeros(batch.tokens.numel()).index_copy(0, at, column)
    return outputs


def _joined(
    model: CausalLM,
    batch: Batch,
    wants: Mapping[str, Want],
    parts: Sequence[BatchPart],
    *,
    share_prefixes: bool,
) -> dict[str, Tensor]:
    """`evaluate_wants` of a batch from that of its parts."""
    made = [
        _evaluate_together(model, p.batch, wants, p.call, share_prefixes=share_prefixes)
        for p in parts
    ]
    outputs = dict[str, Tensor]()
    for name, want in wants.items():
        by_sequence = isinstance(want, PromptState)
        count = len(batch) if by_sequence else batch.tokens.numel()
        at = torch.cat([p.sequences if by_sequence else p.rows for p in parts])
        values = torch.cat([got[name] for got in made])
        outputs[name] = values.new_zeros(count, *values.shape[1:]).index_copy(0, at, values)
    return outputs


def prompt_lengths(batch: Batch) -> list[int]:
    """Tokens of each sequence before its first supervised one; all of them where none is. Raises
    DataError where that is its first token alone, as of plain text: there is nothing to route by.
    """
    supervised = (batch.weights != 0).cpu()
    lengths = []
    for s, (start, stop) in enumerate(batch.segments):
        at = torch.nonzero(supervised[start:stop])[:1]
        lengths.append(int(at) if len(at) else stop - start)
        if lengths[-1] < 2 < stop - start:
            raise DataError(
                f"sequence {s} of a batch (key {int(batch.key[s])}) has no prompt before its first supervised token, "
                "and the mixture's router reads prompts alone (plain text, or completion_only_loss=false); give rows "
                "with prompts, or one expert by name"
            )
    return lengths


def _weighted_rows(batch: Batch, weights: str) -> Tensor:
    """[t] int64: the tokens with a weight in an extra. Raises ValueError for a sequence's first,
    which has no logits before it.
    """
    values = batch.extra[weights].values
    if bool((values[batch.starts[:-1]] != 0).any()):
        raise ValueError(f"extra {weights!r} has a weight at the first token of a sequence")
    return torch.nonzero(values, as_tuple=True)[0]


def score_supervised_tokens(
    model: CausalLM,
    hidden: Tensor,
    batch: Batch,
    fns: Sequence[ScoreFn],
    call: AdapterContext,
    temperature: float = 1.0,
    at: Tensor | None = None,
) -> Tensor:
    """[t, n] fp32: every score at every supervised token, or at the targets ``at`` [t]. The logits
    of target t stand at position t-1.
    """
    at = batch.rows if at is None else at
    extra = {name: e.values[at] for name, e in batch.extra.items() if e.per == "token"}
    rows = VocabRows(batch.tokens[at], extra)
    # never a sequence's first token, so the source lies in the same sequence
    sources = at - 1
    picked, divisor = scale_by_temperature(model, hidden.index_select(0, sources), temperature)
    head = frozen_head(model, call)
    # each rank's rows of the head give a part of the gradient, which is added up once
    shared = picked
    if head is not None and head.slices is not None:
        shared = CopyToRanks.apply(picked, head.slices.ranks)
    tiled = [j for j, fn in enumerate(fns) if head is not None and isinstance(fn, VocabStatistic)]
    whole = [j for j in range(len(fns)) if j not in tiled]
    # by place in ``fns``: the two ways of scoring fill it in any order
    columns: dict[int, Tensor] = {}
    if head is not None and tiled:
        statistics = [fn for fn in fns if isinstance(fn, VocabStatistic)]
        columns |= zip(
            tiled, compute_statistics(shared, head, statistics, rows).unbind(1), strict=True
        )
    if whole:
        others = [fns[j] for j in whole]
        if head is not None and (len(others) <= ONE_PASS_SCORES or not picked.requires_grad):
            table = FullLogitsFunction.apply(shared, head, others, rows)
        else:
            table = _score_by_chunks(model, picked, sources, rows, others, call, divisor)
        columns |= zip(whole, table.unbind(1), strict=True)
    return torch.stack([columns[j] for j in range(len(fns))], 1)


def scale_by_temperature(
    model: CausalLM, hidden: Tensor, temperature: float
) -> tuple[Tensor, float]:
    """(hidden states [t,D] for logits at a temperature, what their logits are still to be divided
    by): softmax(W h / tau) is softmax(W (h / tau)) where the head is a product and nothing else,
    adapted or not.
    """
    if temperature == 1.0:
        return hidden, 1.0
    head = getattr(model, "head", None)
    # a bias is not scaled with the hidden state: W h / tau + b is another thing
    plain = isinstance(head, (BankLinear, nn.Linear)) and head.bias is None
    return (hidden / temperature, 1.0) if plain else (hidden, temperature)


def _score_by_chunks(
    model: CausalLM,
    hidden: Tensor,
    sources: Tensor,
    rows: VocabRows,
    fns: Sequence[ScoreFn],
    call: AdapterContext,
    temperature: float,
) -> Tensor:
    """[t,n]: from whole rows of logits, formed again in backward."""
    parts = []
    for start in range(0, len(hidden), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(hidden))
        part = (
            model,
            hidden[start:stop],
            rows.cut(start, stop),
            fns,
            # the head's adapter terms for these rows alone
            call.narrow(sources[start:stop]),
            temperature,
        )
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(_chunk_scores, *part, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_chunk_scores(*part))
    return (
        torch.cat(parts)
        if parts
        else hidden.new_zeros(0, len(fns), dtype=accumulator_dtype(hidden))
    )


def _chunk_scores(
    model: CausalLM,
    hidden: Tensor,
    rows: VocabRows,
    fns: Sequence[ScoreFn],
    call: AdapterContext,
    temperature: float,
) -> Tensor:
    logits = model.logits(hidden, call)
    logits = logits if temperature == 1.0 else logits / temperature
    statistics = [fn for fn in fns if isinstance(fn, VocabStatistic)]
    columns = (
        dict(
            zip(
                map(id, statistics),
                LogitsStatistics.apply(logits, StatisticsRequest.of(statistics, rows)).unbind(1),
                strict=True,
            )
        )
        if statistics
        else {}
    )
    for fn in fns:
        if isinstance(fn, DenseScore):
            columns[id(fn)] = DenseScoreFunction.apply(logits, fn, rows)
        elif not isinstance(fn, VocabStatistic):
            columns[id(fn)] = fn(logits.to(accumulator_dtype(logits)), rows)
    return torch.stack([columns[id(fn)] for fn in fns], 1)


def frozen_head(model: CausalLM, call: AdapterContext) -> OutputHead | None:
    """The head when nothing in this call adapts or trains it and it is a plain product; else None."""
    head = getattr(model, "head", None)
    if head is not None:
        head = under(head, call)
    if isinstance(head, BankLinear):
        plain = head.product is None and not head.terms(head.resolve(call)) and not head.transposed
    else:
        plain = isinstance(head, nn.Linear)
    if (
        head is None
        or not plain
        or head.bias is not None
        or find_own_rows(head) is not None
        or (head.weight.requires_grad and torch.is_grad_enabled())
    ):
        return None
    return OutputHead(head.weight, getattr(head, "slices", None))


class DenseScoreFunction(torch.autograd.Function):
    """`apply(logits [t,V], fn, rows) -> [t]` of a `DenseScore`; its slope is kept in the logits'
    dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, fn: DenseScore, rows: VocabRows) -> Tensor:
        wide = logits.to(accumulator_dtype(logits), copy=True)
        if not ctx.needs_input_grad[0]:
            return fn(wide, rows)
        value, slope = fn.with_slope(wide, rows)
        ctx.save_for_backward(slope.to(logits.dtype))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None


class FullLogitsFunction(torch.autograd.Function):
    """`apply(hidden [t,D], head, fns, rows) -> [t,n]`: any functions of a chunk's logits, with
    d score / d hidden formed in the forward pass (of a head that ranks share, this rank's part)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: OutputHead, fns: Sequence[ScoreFn], rows: VocabRows
    ) -> Tensor:
        weight, here = head.weight, slice(head.first, head.first + len(head.weight))
        needs_slope = ctx.needs_input_grad[0]
        t = len(hidden)
        out = hidden.new_zeros(t, len(fns), dtype=accumulator_dtype(hidden))
        slopes = [torch.zeros_like(hidden) for _ in fns] if needs_slope else []
        workspace = hidden.new_empty(min(t, CHUNK_TOKENS), len(weight))
        for start in range(0, t, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, t)
            logits = matmul.mm(hidden[start:stop], weight.t(), out=workspace[: stop - start])
            logits = head.gather(logits)  # the functions see whole rows
            for j, fn in enumerate(fns):
                value, slope = _value_and_slope(fn, logits, rows.cut(start, stop), needs_slope)
                out[start:stop, j] = value
                if slope is not None:
                    # d score / d hidden now, while the logits exist; backward only scales it
                    own = slope[:, here].to(hidden.dtype)
                    matmul.mm(own, weight, out=slopes[j][start:stop])
        ctx.save_for_backward(*slopes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = None
        for j, slope in enumerate(ctx.saved_tensors):
            part = slope * grads[0][:, j, None].to(slope.dtype)
            total = part if total is None else total + part
        return total, None, None, None


def _value_and_slope(
    fn: ScoreFn, logits: Tensor, rows: VocabRows, needs_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """fn [t] at a chunk's logits, and its slope [t,V] if needed and there is one."""
    wide = logits.to(accumulator_dtype(logits), copy=True)
    if needs_slope and isinstance(fn, DenseScore):
        return fn.with_slope(wide, rows)
    with torch.set_grad_enabled(needs_slope):
        # ``wide`` is this call's own copy (copy=True): the workspace is reused
        value = fn(wide.requires_grad_(needs_slope), rows)
        slope = torch.autograd.grad(value.sum(), wide)[0] if value.requires_grad else None
    return value.detach(), slope
