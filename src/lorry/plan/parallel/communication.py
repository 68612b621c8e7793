"""Bytes that a rank sends in an optimizer step, by formula, and the sizes of an adapter's files.

Collectives of S bytes over n ranks are counted as rings send them: an all-gather and a
reduce-scatter (n - 1) / n of S, an all-reduce twice that. gloo's all-gather and all-reduce send so
many to within the headers (docs/scaling.md); what ranks tell each other besides (a few KiB a step)
is not counted. Frozen weights have no gradients, so of the base only gathering costs anything, and
between replicas nothing but adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lorry.plan.adapters import PlannedAdapter, is_embedding
from lorry.plan.constants import SCORE_STATISTICS
from lorry.plan.full.weights import PlannedWeights
from lorry.plan.memory import VALUE_BYTES, MemorySetup, layers_run
from lorry.plan.parallel.per_rank import (
    layer_tensors,
    local_adapter,
    local_shape,
    root_tensors,
    sharded_rows,
    whole_side_values,
)
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.shapes import ModelShape

CollectiveKind = Literal["all-gather", "all-reduce", "reduce-scatter"]
SENT = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # times (n - 1) / n of the bytes


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step: ``bytes`` of the whole tensor of each, over ``ranks``, which lie
    within ``span`` neighbouring processes (one machine, if it has as many).
    """

    what: str
    kind: CollectiveKind
    ranks: int
    span: int
    bytes: int
    calls: int

    @property
    def sent_each(self) -> int:
        """Bytes that a rank sends in one call."""
        return SENT[self.kind] * self.bytes * (self.ranks - 1) // self.ranks

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return self.calls * self.sent_each


@dataclass(frozen=True, kw_only=True)
class AdapterSizes:
    """Bytes of an adapter: ``file``: as it is saved (fp32 values); ``checkpoint``: with AdamW's two
    moments; ``sync``: what an inference engine is sent, in the format computed in.
    """

    file: int
    checkpoint: int
    sync: int


def adapter_sizes(adapter: PlannedAdapter, setup: MemorySetup) -> AdapterSizes:
    """Of the whole adapter, whatever the layout: files are those of one device."""
    # base weights are saved in the format that they compute in
    each = setup.element if isinstance(adapter, PlannedWeights) else VALUE_BYTES
    return AdapterSizes(
        file=each * adapter.file_values,
        checkpoint=3 * VALUE_BYTES * adapter.parameters,
        sync=setup.element * adapter.parameters,
    )


def step_collectives(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    accumulation: int,
) -> list[Collective]:
    """What a rank takes part in during one optimizer step, of ddp and fsdp. ``accumulation``:
    micro-batches.
    """
    if split.backend not in ("ddp", "fsdp"):
        return []
    reads = setup.reads
    backwards = accumulation * reads.passes // reads.together
    # the start is asked once about every sequence, without a backward
    forwards = backwards + (accumulation if reads.asks_start and reads.live else 0)
    found = [
        *_gathers(shape, adapter, setup, split, forwards, backwards),
        *_activations(shape, adapter, setup, split, forwards, backwards),
        *_gradients(adapter, split, backwards),
    ]
    return [collective for collective in found if collective.ranks > 1 and collective.calls]


def _gathers(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    forwards: int,
    backwards: int,
) -> Iterator[Collective]:
    """Of the base, as `backends.distributed.sharded` walks: forward every layer, also those above an
    early stop; backward those from the lowest adapter up. Embedding, final norm and head stay
    gathered for all the micro-batches of a step; they are asked once more for a start's answers.
    """
    local, n = local_shape(shape, split.tensor), split.shards
    held = replace(setup, tensor_ranks=split.tensor)
    values = (
        sharded_rows(rows, n) * each * size for rows, each, size in layer_tensors(local, held)
    )
    layer = int(n * sum(values))
    rest = n * sum(sharded_rows(rows, n) * each for rows, each in root_tensors(local))
    layers, group = shape.geometry.layers, (n, n * split.tensor)
    reached = max(layers - adapter.lowest, 0)
    if split.reshard_after_forward:
        forward, backward = forwards * layers, backwards * reached
    else:
        # a backward pass lets go of what it has reached; a start's answers are a step of their own
        asked = (forwards - backwards) and layers
        forward, backward = asked + layers + (backwards - 1) * reached, 0
    yield Collective("a layer's weights, forward", "all-gather", *group, layer, forward)
    yield Collective("a layer's weights, backward", "all-gather", *group, layer, backward)
    yield Collective(
        "embedding, final norm and head",
        "all-gather",
        *group,
        rest * setup.element,
        1 if forwards == backwards else 2,
    )


def _activations(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    forwards: int,
    backwards: int,
) -> Iterator[Collective]:
    """Of tensor parallel: [T, width] behind attention and MLP, and of the gradients of their inputs;
    of the vocabulary the embedding's rows, the scores' statistics and the hidden states' gradient.
    """
    run, group = layers_run(shape, setup), (split.tensor, split.tensor)
    hidden = setup.tokens * shape.geometry.width * setup.element
    below = max(run - adapter.lowest, 0)
    recomputed = backwards * below if setup.recompute == "full" else 0
    outputs = 2 * (forwards * run + recomputed)
    # nothing below the lowest adapter wants a gradient, so the input of its layer gets none
    halves = 2 if shape.geometry.parallel_residual else 1
    unasked = 0 if any(map(is_embedding, adapter.matrices)) else min(below, 1) * halves
    yield Collective("outputs of attention and MLP", "all-reduce", *group, hidden, outputs)
    inputs = backwards * (2 * below - unasked)
    yield Collective("gradients of their inputs", "all-reduce", *group, hidden, inputs)
    if split.sequence:
        # of the residual stream what a layer kept: its input, and, where it does not run again, the
        # stream before the MLP if that reads another one
        kept = 1 if setup.recompute == "full" or shape.geometry.parallel_residual else 2
        yield Collective(
            "the stream that layers kept", "all-gather", *group, hidden, kept * backwards * below
        )
    yield Collective("rows of the embedding", "all-reduce", *group, hidden, forwards)
    if setup.reads.highest_layer is None:
        statistics = split.tensor * setup.tokens * SCORE_STATISTICS
        yield Collective(
            "gradient of the last hidden states", "all-reduce", *group, hidden, backwards
        )
        yield Collective("statistics of the scores", "all-gather", *group, statistics, forwards)


def _gradients(
    adapter: PlannedAdapter, split: ParallelSplit, backwards: int
) -> Iterator[Collective]:
    """Of the adapters, fp32, once a step however many micro-batches there were; of base weights that are
    cut in every pass, to the ranks that have them, and from there to the other replicas' ranks."""
    if isinstance(adapter, PlannedWeights) and split.shards > 1:
        inside = (split.shards, split.shards * split.tensor)
        for what, values, calls in (
            ("a layer's gradients", adapter.layer_values, backwards * adapter.layers),
            ("gradients of embedding and head", adapter.ends, backwards),
        ):
            if values:
                size = VALUE_BYTES * values
                yield Collective(what, "reduce-scatter", *inside, size, calls)
                across = (split.replicas, split.processes)
                part = -(-size // split.shards)
                yield Collective(f"{what}, between replicas", "all-reduce", *across, part, calls)
        return
    local = VALUE_BYTES * local_adapter(adapter, split.tensor).parameters
    group = (split.data, split.processes)
    # whole ones also where moments are cut: norm and clip have the same bits then
    whose = "base weights'" if isinstance(adapter, PlannedWeights) else "adapters'"
    yield Collective(f"{whose} gradients", "all-reduce", *group, local, 1)
    if split.shard_optimizer:
        yield Collective(f"{whose} values, after the step", "all-gather", *group, local, 1)
    whole = VALUE_BYTES * whole_side_values(adapter)
    yield Collective("gradients of whole sides", "all-reduce", split.tensor, split.tensor, whole, 1)
