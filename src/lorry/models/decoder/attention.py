"""Causal attention within the segments of a packed batch, forward and backward. Nothing leaks
between segments.

On a CPU one kernel call serves all segments, in bfloat16 and float32 (kernels/attention.cpp in
bfloat16 products, kernels/attention_vectors.cpp on any processor's vectors). Elsewhere segments of
similar length are laid into one right-padded call of torch's: under a causal mask a real query
never sees the padding to its right, so no mask is needed and padding costs only time. T tokens, H
heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorry.errors import ContractError
from lorry.kernels import attention as kernel
from lorry.models.decoder.pointwise import promote_to_fp32

# tokens; up to here plain fp32 products beat the fused CPU kernels (benchmarks/attention.py)
SHORT_TOKENS = 96


@dataclass(frozen=True)
class SegmentBucket:
    """Sequences attended to in one call: ``count`` of them, padded to ``length``.

    rows [n]: the packed tokens, sequence by sequence, or None when they are all of them in order;
    padded_positions [n]: where each goes in the [count * length] frame, or None when nothing is
    padded.
    """

    count: int
    length: int
    rows: Tensor | None
    padded_positions: Tensor | None


def bucket_segments(
    segments: Sequence[tuple[int, int]], device: torch.device, slack: float = 1.25
) -> list[SegmentBucket]:
    """Group segments (start, stop) so that no sequence is padded to more than ``slack`` times its
    length.
    """
    order = sorted(
        (s for s in range(len(segments)) if segments[s][1] > segments[s][0]),
        # shortest first, so that a group's first member is its shortest; the index breaks ties for
        # determinism
        key=lambda s: (segments[s][1] - segments[s][0], s),
    )
    groups: list[list[int]] = []
    for s in order:
        length = segments[s][1] - segments[s][0]
        first = segments[groups[-1][0]] if groups else None
        # 1.25: at most a quarter of padding, against one more call per group
        if first is not None and length <= slack * (first[1] - first[0]):
            groups[-1].append(s)
        else:
            groups.append([s])
    return [_make_bucket([segments[s] for s in sorted(g)], segments[-1][1], device) for g in groups]


def _make_bucket(
    segments: Sequence[tuple[int, int]], total: int, device: torch.device
) -> SegmentBucket:
    lengths = torch.tensor([stop - start for start, stop in segments])
    longest = int(lengths.max())
    starts = torch.tensor([start for start, _ in segments])
    column = torch.arange(longest)
    # [sequences, longest]: row by row it lists the tokens in packed order
    is_token = column < lengths[:, None]
    rows = (starts[:, None] + column)[is_token]
    padded_positions = (torch.arange(len(segments))[:, None] * longest + column)[is_token]
    # then gathering and scattering are the identity and are left out
    all_tokens = len(rows) == total and bool((rows == torch.arange(total)).all())
    padded = len(rows) != len(segments) * longest
    return SegmentBucket(
        len(segments),
        longest,
        None if all_tokens else rows.to(device),
        padded_positions.to(device) if padded else None,
    )


class PackedSegments:
    """The sequences of a packed batch, (start, stop) each, end to end: attention stays within them.

    ``places`` [F]: as in `PackedInput`; q, k and v are of its T tokens then.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, int]],
        device: torch.device,
        places: Tensor | None = None,
    ) -> None:
        self.bounds, self.device, self.places = segments, device, places

    @cached_property
    def starts(self) -> Tensor:
        """[S+1] int64, for the kernel."""
        return kernel.build_cu_seqlens(self.bounds)

    @cached_property
    def buckets(self) -> list[SegmentBucket]:
        """For torch's own attention."""
        return bucket_segments(self.bounds, self.device)

    @cached_property
    def whole(self) -> PackedSegments:
        """Without ``places``: of sequences that lie end to end."""
        return PackedSegments(self.bounds, self.device)

    @cached_property
    def first(self) -> Tensor:
        """[T] int64: the first of the F places where each token stands."""
        assert self.places is not None
        order = torch.arange(len(self.places), device=self.device)
        last = int(self.places.max()) + 1
        # the smallest, not whichever is written last: equal runs choose equal places
        return order.new_zeros(last).scatter_reduce(
            0, self.places, order, "amin", include_self=False
        )


@dataclass
class AttentionStats:
    """What a forward pass leaves for backward, besides q, k, v and o: the kernel's log-sum-exp, or
    torch's graph (which serves once; a second backward makes it again)."""

    lse: Tensor | None = None
    graph: tuple[Tensor, ...] = ()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, save: bool
) -> tuple[Tensor, AttentionStats]:
    """q [T,H,D], k and v [T,G,D] -> o [T,H,D]; each token sees its own segment up to itself.
    Softmax scale D^-1/2. No graph.

    ``save``: backward will be called. Raises ContractError for it where sequences share prefixes.
    """
    if segments.places is not None:
        if save:
            raise ContractError("sequences that share prefixes are scored, not trained on")
        # attention is a small part of a pass: each sequence reads all of its own keys, by the code
        # that runs without sharing, and a shared query is made as often as it stands
        q, k, v = (x.index_select(0, segments.places) for x in (q, k, v))
        o, _ = attention_forward(q, k, v, segments.whole, save=False)
        return o.index_select(0, segments.first), AttentionStats()
    if kernel.supports_attention(q, k):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        o, lse = kernel.run_attention(q, k, v, segments.starts, q.shape[-1] ** -0.5)
        return o, AttentionStats(lse)
    if not save:
        return attend_with_sdpa(q, k, v, segments.buckets), AttentionStats()
    with torch.enable_grad():  # a small graph of its own, which backward goes through once
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        o = attend_with_sdpa(q, k, v, segments.buckets)
    # q, k, v as leaves of their own: backward asks for exactly their gradients
    return o.detach(), AttentionStats(graph=(q, k, v, o))


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: AttentionStats,
    segments: PackedSegments,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) for the gradient ``grad`` [T,H,D] of o."""
    if kernel.supports_attention(q, k):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert stats.lse is not None
        return kernel.run_attention_backward(
            q, k, v, o, stats.lse, segments.starts, q.shape[-1] ** -0.5, grad.contiguous()
        )
    # empty where recompute dropped it, or a second backward asks: then the forward runs again
    *leaves, out = stats.graph or attention_forward(q, k, v, segments, save=True)[1].graph
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq, dk, dv


def attend_with_sdpa(q: Tensor, k: Tensor, v: Tensor, buckets: Sequence[SegmentBucket]) -> Tensor:
    """`attention_forward` through torch's own attention, with a graph where the inputs have one."""
    parts = [_attend_bucket(q, k, v, b) for b in buckets]
    if len(buckets) == 1 and buckets[0].rows is None:
        return parts[0]
    # every token is in exactly one bucket, so all of it is written
    out = torch.zeros_like(q)
    for bucket, part in zip(buckets, parts, strict=True):
        assert bucket.rows is not None
        out = out.index_copy(0, bucket.rows, part)
    return out


def _attend_bucket(q: Tensor, k: Tensor, v: Tensor, bucket: SegmentBucket) -> Tensor:
    padded = [_pad_bucket(x, bucket) for x in (q, k, v)]
    if bucket.length <= SHORT_TOKENS and q.device.type == "cpu":
        o = ShortAttention.apply(*padded)
    else:
        # repeated: this call wants as many key heads as query heads
        q4, k4, v4 = padded[0], *(_repeat_kv(x, q.shape[1] // k.shape[1]) for x in padded[1:])
        o = F.scaled_dot_product_attention(q4, k4, v4, is_causal=True)
    flat = o.transpose(1, 2).reshape(bucket.count * bucket.length, q.shape[1], q.shape[2])
    return (
        flat if bucket.padded_positions is None else flat.index_select(0, bucket.padded_positions)
    )


class ShortAttention(torch.autograd.Function):
    """Causal attention of short sequences as plain products in fp32: `apply(q [n,H,L,D], k
    [n,G,L,D], v [n,G,L,D]) -> [n,H,L,D]`.

    torch's fused kernels for the CPU are slow below a few hundred tokens, their backward most of
    all. Query heads that share a key/value head are folded into rows, so keys and values are never
    repeated; probabilities are recomputed in backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_fp32, k_fp32, v_fp32 = (
            _fold_query_groups(q, k),
            _flatten_kv_heads(k),
            _flatten_kv_heads(v),
        )
        o = torch.bmm(_causal_probabilities(q_fp32, k_fp32), v_fp32)
        # inputs alone: [L, L] probabilities cost less to make again than to keep
        ctx.save_for_backward(q, k, v)
        return o.view(q.shape).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        q_fp32, k_fp32, v_fp32, g = (
            _fold_query_groups(q, k),
            _flatten_kv_heads(k),
            _flatten_kv_heads(v),
            _fold_query_groups(grads[0], k),
        )
        p = _causal_probabilities(q_fp32, k_fp32)
        dv = torch.bmm(p.transpose(1, 2), g)
        ds = torch.bmm(g, v_fp32.transpose(1, 2))
        # softmax backward p * (ds - sum(p ds)), times the scale of the scores
        ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p).mul_(q.shape[-1] ** -0.5)
        dq, dk = torch.bmm(ds, k_fp32), torch.bmm(ds.transpose(1, 2), q_fp32)
        return (
            dq.view(q.shape).to(q.dtype),
            dk.view(k.shape).to(k.dtype),
            dv.view(v.shape).to(v.dtype),
        )


def _flatten_kv_heads(x: Tensor) -> Tensor:
    """[n,G,L,D] -> [n*G,L,D], at least fp32."""
    return promote_to_fp32(x).reshape(-1, *x.shape[2:])


def _fold_query_groups(x: Tensor, k: Tensor) -> Tensor:
    """[n,H,L,D] -> [n*G, (H/G)*L, D], at least fp32: the heads of a group one after the other."""
    return _flatten_kv_heads(x).reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _causal_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """[m, g*L, L] softmax over the keys up to each query's own position."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
    length = k.shape[1]
    # strictly above the diagonal: a token sees itself
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores.view(-1, length, length).masked_fill_(future, float("-inf"))
    return scores.softmax(-1)


def _pad_bucket(x: Tensor, bucket: SegmentBucket) -> Tensor:
    """Packed [T,h,D] -> [count, h, length, D]."""
    if bucket.rows is not None:
        x = x.index_select(0, bucket.rows)
    if bucket.padded_positions is not None:
        x = x.new_zeros(bucket.count * bucket.length, *x.shape[1:]).index_copy(
            0, bucket.padded_positions, x
        )
    return x.view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2)


def _repeat_kv(x: Tensor, groups: int) -> Tensor:
    """[n,G,L,D] -> [n,G*groups,L,D]: each key/value head serves ``groups`` query heads."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
