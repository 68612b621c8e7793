"""Bytes of a training run by component, in closed form: T tokens a micro-batch, d width, q and k
attention widths, f MLP width.

What a layer keeps for its backward is a list of buffers per token. The fused path keeps the least
that avoids repeating a matrix product: x, q, k, v, attention out, the residual between, gate and
up, the log-sum-exp, and A x of every adapted matrix; norms, rotary positions and gate products are
made again (models/decoder/block.py). The plain path, for models that run through transformers, is
autograd over separate operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorry.config.schema.step_reads import ROW_ALONE, StepReads
from lorry.families.packing import find_packing, stated_bits, stated_group
from lorry.plan.adapters import PlannedAdapter
from lorry.plan.constants import (
    ALLOCATOR_GAPS,
    ALLOCATOR_SLACK,
    CHUNK_COPIES,
    COMPILED_BYTES,
    DOTS_GAPS,
    FEWER_GAPS,
    GAPS_PER_LAYER,
    LIBRARY_BYTES,
    MAX_HEAD_DIM,
    PLAIN_WORKSPACE,
    PLAN_MARGIN,
    RUNTIME_BYTES,
    SCORE_CHUNK,
    SCORE_GROUP,
    SCORE_TILE,
    VARIED_LENGTH_BYTES,
)
from lorry.plan.full.weights import PlannedWeights
from lorry.plan.shapes import ModelShape
from lorry.processor import AttentionKernel

PrecisionName = Literal["float32", "bfloat16", "float16", "int8", "nf4", "fp4"]
DeviceType = Literal["cpu", "cuda"]
RecomputeMode = Literal["none", "full"]
PRECISIONS: tuple[PrecisionName, ...] = ("float32", "bfloat16", "float16", "int8", "nf4", "fp4")
TRAINABLE_PRECISIONS: tuple[PrecisionName, ...] = ("float32", "bfloat16", "float16")

# Bytes per weight of a layer's matrices. int8: one fp32 scale per output row, counted apart. nf4,
# fp4: blocks of 64 with an absmax, itself quantised to 8 bits in blocks of 256 (Dettmers et al.
# 2023, QLoRA): (8 + 32/256) / 64 = 0.127 bits a weight.
FOUR_BIT = (4 + (8 + 32 / 256) / 64) / 8
# of a matrix that ranks share: blocks whose absmax share a scale part there, and have theirs in fp32
FOUR_BIT_SHARED = (4 + 32 / 64) / 8
WEIGHT_BYTES: dict[PrecisionName, float] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": FOUR_BIT, "fp4": FOUR_BIT,
}  # fmt: skip
# inputs that share a scale in 4-bit checkpoints: with as many, scales and zeros weigh no more than NF4's
# beyond what the margin covers
WIDE_GROUP = 128
# fp32 values; with their gradients; AdamW's two moments
VALUE_BYTES, MASTER_BYTES, MOMENT_BYTES = 4, 8, 8

MARGIN = "margin"  # the component that makes a plan an upper bound
MASTERS = "masters"  # of base weights that train; in an adapter's place


@dataclass(frozen=True, kw_only=True)
class MemorySetup:
    """How a model is run. ``tokens``: of one micro-batch, at most; ``length``: of its longest
    sequence; ``attention``: what computes attention on a CPU;
    ``whole``: a run on real data, not steps of one length alone; ``reads``: what a step reads for
    each row, ``step_tokens``: of all its micro-batches, at most (0: of one), of which the start
    is asked before the first of them is run; ``mixed_mlps``: the MLPs that a token passes under a
    router at `level: expert` (0: the layer's own); ``tensor_ranks``: that share every matrix;
    ``sequence_ranks``: those of them that divide the inputs of layers by tokens (sequence parallel);
    ``precision``: what the base's matrices are held in; ``compute``: what is computed in, where that is
    another (None of packed ones: bfloat16).
    """

    tokens: int
    length: int
    recompute: RecomputeMode = "none"
    precision: PrecisionName = "bfloat16"
    device: DeviceType = "cpu"
    attention: AttentionKernel = "tiles"
    whole: bool = False
    reads: StepReads = ROW_ALONE
    step_tokens: int = 0
    mixed_mlps: int = 0
    tensor_ranks: int = 1
    sequence_ranks: int = 1
    compute: PrecisionName | None = None

    @property
    def dtype(self) -> PrecisionName:
        """The format that is computed in."""
        if self.compute is not None:
            return self.compute
        return self.precision if self.precision in TRAINABLE_PRECISIONS else "bfloat16"

    @property
    def element(self) -> int:
        """Bytes of a number in that format."""
        return 4 if self.dtype == "float32" else 2

    @property
    def matrix_element(self) -> float:
        """Bytes of a weight of a layer's matrices; int8's scales are counted apart."""
        shared = self.tensor_ranks > 1 and WEIGHT_BYTES[self.precision] == FOUR_BIT
        return FOUR_BIT_SHARED if shared else WEIGHT_BYTES[self.precision]


@dataclass(frozen=True)
class MemoryComponent:
    """One line of the table: bytes, and in words what they are."""

    name: str
    bytes: int
    words: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of a run, by component: what every choice needs first, what a smaller micro-batch
    would save last.
    """

    components: tuple[MemoryComponent, ...]

    @property
    def total(self) -> int:
        return sum(c.bytes for c in self.components)

    @property
    def above_imports(self) -> int:
        """What is counted, without libraries and margin: what a benchmark measures as peak minus the
        state after imports.
        """
        return sum(c.bytes for c in self.components if c.name not in ("libraries", MARGIN))

    def breaks(self, budget: int) -> MemoryComponent:
        """The component at which the running sum passes the budget."""
        running = 0
        for component in self.components:
            running += component.bytes
            if running > budget:
                return component
        raise ValueError(f"{running} bytes fit a budget of {budget}")


def layer_path(shape: ModelShape) -> Literal["fused", "plain"]:
    """Which implementation of a layer runs: Lorry's own decoder, or transformers' code."""
    return "fused" if shape.native else "plain"


def uses_attention_kernel(shape: ModelShape, setup: MemorySetup) -> bool:
    """Whether attention runs in Lorry's own kernel (kernels/attention.py), which repeats and copies
    nothing.
    """
    usual = shape.geometry.head_dim <= MAX_HEAD_DIM and setup.dtype != "float16"
    return setup.device == "cpu" and setup.attention != "none" and usual and shape.native


def estimate_memory(
    shape: ModelShape, adapter: PlannedAdapter, setup: MemorySetup
) -> MemoryEstimate:
    """The peak of training steps on one device."""
    g = shape.geometry
    # nothing is kept below the lowest adapter, nor above the last layer that runs
    layers = range(adapter.lowest, layers_run(shape, setup))
    return tabulate_memory(
        shape,
        setup,
        adapter,
        base_weights=int(g.layers * layer_weights(shape, setup) + shape.final_norm * setup.element),
        base_words=f"{g.layers} layers in {setup.precision}",
        vocabulary=vocabulary_weights(shape, setup),
        vocabulary_words="embedding" + (" (tied)" if g.tied else " and head"),
        adapter_words="values: fp32, gradients, a copy",
        scores=score_workspace(shape, setup, adapter),
        layer_backward=layer_workspace(shape, setup),
        saved=setup.tokens * saved_bytes_per_token(shape, adapter, setup, layers),
        saved_words=f"kept by {len(layers)} layers for backward",
    )


def tabulate_memory(
    shape: ModelShape,
    setup: MemorySetup,
    adapter: PlannedAdapter,
    *,
    base_weights: int,
    base_words: str,
    vocabulary: int,
    vocabulary_words: str,
    adapter_words: str,
    scores: int,
    layer_backward: int,
    saved: int,
    saved_words: str,
) -> MemoryEstimate:
    """The table of one device, be it alone or a stage of a pipeline: every component once, in this
    order. Sizes in bytes; ``adapter``: what of it lies on this device; ``scores`` and
    ``layer_backward``: workspaces of the vocabulary product and of one layer.
    """
    reference_bytes = start_bytes(shape, setup)
    if isinstance(adapter, PlannedWeights):
        # gradients as a backward makes them, before they are added to those that stay
        scores += adapter.ends * setup.element
        layer_backward += adapter.layer_values * setup.element
    # never alive together: the scores are done before the first layer runs backward
    workspace = max(scores, layer_backward)
    return add_margin(
        (
            MemoryComponent(
                "libraries",
                LIBRARY_BYTES[setup.device],
                "Python and its packages" if setup.device == "cpu" else "CUDA context",
            ),
            MemoryComponent(
                "runtime",
                runtime_bytes(setup),
                "loaded by the first step: kernels and their scratch space",
            ),
            MemoryComponent("base weights", base_weights, base_words),
            MemoryComponent("vocabulary", vocabulary, vocabulary_words),
            masters_of(adapter, setup)
            if isinstance(adapter, PlannedWeights)
            else MemoryComponent(
                "adapter",
                adapter_bytes(adapter, setup),
                f"{adapter.parameters / 1e6:.2f}M {adapter_words}",
            ),
            MemoryComponent(
                "optimizer",
                (moment_bytes(adapter) + 4 * setup.reads.copies) * adapter.parameters,
                "AdamW's two moments, fp32"
                + (", and AdaLoRA's two means" if adapter.scored else "")
                + (", and a copy" if setup.reads.copies else ""),
            ),
            *(
                [
                    MemoryComponent(
                        "frozen adapters",
                        frozen,
                        "the adapters that the run starts from, and a half that does not train",
                    )
                ]
                if (frozen := frozen_adapter_bytes(adapter, setup))
                else []
            ),
            MemoryComponent(
                "workspace",
                workspace,
                "the vocabulary product" if workspace == scores else "one layer's backward",
            ),
            MemoryComponent(
                "allocator",
                allocator_overhead(shape, setup, saved + workspace),
                "fragmentation between temporary buffers",
            ),
            *(
                [
                    MemoryComponent(
                        "start",
                        reference_bytes,
                        f"reference model's {setup.reads.start_answer} of a step's rows",
                    )
                ]
                if reference_bytes
                else []
            ),
            # last, so that a budget that a smaller micro-batch would meet breaks here (`breaks`)
            MemoryComponent(
                "activations",
                saved,
                f"{saved_words} ({layer_path(shape)}, recompute {setup.recompute})",
            ),
        ),
        setup.device,
    )


def add_margin(components: tuple[MemoryComponent, ...], device: DeviceType) -> MemoryEstimate:
    """What is counted, and the share of it that a run may take beyond that (`PLAN_MARGIN`)."""
    share = PLAN_MARGIN[device]
    if not share:
        return MemoryEstimate(components)
    more = math.ceil(share * sum(c.bytes for c in components))
    margin = MemoryComponent(MARGIN, more, f"{share:.0%}: what measured runs took beyond the rest")
    return MemoryEstimate((*components[:-1], margin, components[-1]))


# --- what does not move


def runtime_bytes(setup: MemorySetup) -> int:
    """What steps load and compile."""
    # oneDNN compiles a product for every new shape in bfloat16 only; float32 has ready-made ones
    if setup.device == "cuda" or setup.dtype == "float32":
        return RUNTIME_BYTES[setup.device]
    return RUNTIME_BYTES["cpu"] + COMPILED_BYTES + (VARIED_LENGTH_BYTES if setup.whole else 0)


def layer_weights(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes of one layer: matrices in the base's format, everything else in the format computed in."""
    matrices = shape.layer_linears + shape.layer_experts
    scales = (
        4 * (sum(x.outputs for x in shape.linears) + _expert_rows(shape))
        if setup.precision == "int8"
        else 0
    )
    return matrices * setup.matrix_element + scales + shape.layer_small * setup.element


def packed_precision(config: Mapping[str, Any]) -> PrecisionName | None:
    """The precision whose bytes a checkpoint's packed matrices take at most, by its config.json; None where
    that says nothing of packed matrices."""
    if (stated := find_packing(config)) is None:
        return None
    four, group = stated.get("load_in_4bit") or stated_bits(stated) == 4, stated_group(stated)
    narrow = isinstance(group, int) and 0 < group < WIDE_GROUP
    return "nf4" if four and not narrow else "int8"


def kept_precision(config: Mapping[str, Any]) -> PrecisionName:
    """The precision whose bytes a checkpoint's matrices take at most with model.quantize=keep, by its
    config.json: bfloat16 ones as they are, of a GGUF file Q4_0, Q4_1 and Q8_0."""
    return "bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "int8"


def _expert_rows(shape: ModelShape) -> int:
    """Output rows of a layer's experts, for int8's scales."""
    if shape.experts is None:
        return 0
    return shape.experts.count * (
        (2 if shape.gated else 1) * shape.experts.width + shape.geometry.width
    )


def vocabulary_weights(shape: ModelShape, setup: MemorySetup) -> int:
    """Embedding and head; never quantised."""
    return (shape.embedding + (0 if shape.geometry.tied else shape.head_size)) * setup.element


def adapter_bytes(adapter: PlannedAdapter, setup: MemorySetup) -> int:
    """fp32 values and gradients, and a copy in the format computed in where that is another."""
    copy = 0 if setup.dtype == "float32" else setup.element
    return (MASTER_BYTES + copy) * adapter.parameters


def moment_bytes(adapter: PlannedAdapter) -> int:
    """Of each value: AdamW's two moments, and AdaLoRA's sensitivity and uncertainty, fp32."""
    return MOMENT_BYTES * (2 if adapter.scored else 1)


def masters_of(weights: PlannedWeights, setup: MemorySetup, shards: int = 1) -> MemoryComponent:
    """fp32 values and gradients of weights that train, of which a rank has its rows where ``shards`` of
    them cut the base; on one device an fp32 weight is its own master."""
    is_own = shards == 1 and setup.dtype == "float32"
    each = MASTER_BYTES - (VALUE_BYTES if is_own else 0)
    held = -(-each * weights.parameters // shards)
    what = "gradients, fp32" if is_own else "fp32 masters and gradients"
    part = f" of 1/{shards} of them" if shards > 1 else ""
    return MemoryComponent(
        MASTERS, held, f"{weights.parameters / 1e6:.2f}M values that train: {what}{part}"
    )


def frozen_adapter_bytes(adapter: PlannedAdapter, setup: MemorySetup) -> int:
    """Those under the adapter that trains, and a half of it that does not: values and their copy, no
    gradients and no moments (`AdapterBank.move_to_base`, `LoraSpec.train`); of those that no token
    passes the values alone.
    """
    copy = 0 if setup.dtype == "float32" else setup.element
    return (VALUE_BYTES + copy) * (adapter.frozen + adapter.held) + VALUE_BYTES * adapter.idle


# --- what comes and goes


def layers_run(shape: ModelShape, setup: MemorySetup) -> int:
    """How many of the layers a step runs, from the first."""
    highest = setup.reads.highest_layer
    return shape.geometry.layers if highest is None else min(highest + 1, shape.geometry.layers)


def start_bytes(shape: ModelShape, setup: MemorySetup) -> int:
    """What the start said of all the sequences of a step, held until the step is done: it is asked
    about every micro-batch before the first is run (`UnlearnTask.step_batches`). Its own forward
    keeps nothing and is over by then.
    """
    if setup.reads.asks_start is None:
        return 0
    # scores are fp32 whatever the model computes in
    row = 4 if setup.reads.asks_start == "scores" else shape.geometry.width * setup.element
    return max(setup.step_tokens, setup.tokens) * row


def saved_bytes_per_token(
    shape: ModelShape, adapter: PlannedAdapter, setup: MemorySetup, layers: range
) -> int:
    """Bytes per token that are held when the last of ``layers`` has run forward."""
    attended = layer_path(shape) != "fused" or shape.geometry.parallel_residual
    per_layer = {
        i: layer_saved_bytes(shape, setup, adapter.ranks(i))
        + setup.element * adapter.kept_outputs(i, attended=attended)
        for i in layers
    }
    if not per_layer:
        return 0
    if setup.recompute == "full":  # every layer's input, and one layer alive
        width = shape.geometry.width // setup.sequence_ranks
        return len(per_layer) * width * setup.element + max(per_layer.values())
    return sum(per_layer.values())


def layer_saved_bytes(shape: ModelShape, setup: MemorySetup, ranks: list[int]) -> int:
    """Bytes per token that one layer keeps for its backward."""
    if layer_path(shape) == "fused":
        elements, fixed = _fused_elements(shape, setup)
    else:
        elements, fixed = _plain_elements(shape, setup, adapted=bool(ranks))
    return setup.element * (elements + sum(ranks)) + fixed


def visited_mlps(shape: ModelShape, setup: MemorySetup) -> int:
    """The experts that a token visits, be they the model's own or a mixture's whole MLPs; 0 where a
    layer has one MLP for all."""
    return setup.mixed_mlps or (0 if shape.experts is None else shape.experts.active)


def _mlp_elements(shape: ModelShape, setup: MemorySetup) -> int:
    """Gate and up, or the one MLP product; of every expert a token visits, with its own copies of
    what goes in and comes out."""
    inner = (2 if shape.gated else 1) * shape.geometry.mlp_width
    visited = visited_mlps(shape, setup)
    return visited * (inner + 2 * shape.geometry.width) if visited else inner


def _fused_elements(shape: ModelShape, setup: MemorySetup) -> tuple[int, int]:
    """(elements, bytes): S_min of the floor, and what torch's attention adds where the kernel does
    not serve: keys and values repeated for every query head, and normed queries and keys. A
    parallel residual has no state between attention and MLP.
    """
    g, more = shape.geometry, 0  # more: elements per token that only torch's attention adds
    if not uses_attention_kernel(shape, setup):
        more += 2 * shape.queries if g.heads > g.kv_heads else 0
        more += shape.queries + shape.keys if shape.qk_norm else 0
    # the layer's input, and the state between its halves
    inputs = (1 if g.parallel_residual else 2) * g.width // setup.sequence_ranks
    return inputs + 2 * shape.queries + 2 * shape.keys + _mlp_elements(
        shape, setup
    ) + more, 4 * g.heads


def _plain_elements(shape: ModelShape, setup: MemorySetup, *, adapted: bool) -> tuple[int, int]:
    """(elements, bytes) that autograd keeps of separate operations: norm inputs (RMS in fp32),
    every adapted matrix's input, q, k and v as attention read them (keys and values repeated per
    query head), its output, and the MLP's chain.
    """
    g, q = shape.geometry, shape.queries
    # an RMS norm computes in fp32 and keeps that copy; a layer norm keeps its input as it came
    rms = shape.norm == "rms"
    read_by_norms = 0 if rms else (g.width if g.parallel_residual else 2 * g.width)
    wide = (2 * g.width if rms else 0) + ((q + shape.keys) if shape.qk_norm else 0)
    attention = 4 * q + (2 * q if shape.fused_qkv and g.rotary is not None else 0)
    mlp = _mlp_elements(shape, setup) * (2 if adapted or shape.gated else 1)
    normed = 2 * g.width if adapted else 0
    return read_by_norms + normed + attention + mlp, 4 * wide + 4 * g.heads


def score_workspace(shape: ModelShape, setup: MemorySetup, adapter: PlannedAdapter) -> int:
    """The last hidden state, the rows of it that are scored, and d score / d hidden; and, for a
    group of rows, a padded copy, a tile of logits, its product with the head, and sums in fp32
    (models/scoring/tiles.py). An adapted head makes whole rows, by chunks.
    """
    d, e = shape.geometry.width, setup.element
    if (
        setup.reads.highest_layer is not None
    ):  # hidden states and their difference in fp32, no scores
        return setup.tokens * d * (e + 8)
    hidden_bytes = 3 * setup.tokens * d * e  # the three [T, d] tensors named first
    if adapter.adapts_head():
        return (
            hidden_bytes + CHUNK_COPIES * min(SCORE_CHUNK, setup.tokens) * shape.geometry.vocab * e
        )
    rows = min(SCORE_GROUP, setup.tokens)
    return hidden_bytes + min(SCORE_TILE, rows * shape.geometry.vocab) * e + rows * d * (3 * e + 8)


def layer_workspace(shape: ModelShape, setup: MemorySetup) -> int:
    """Gradients alive while one layer runs backward: those of its output, of the MLP's product, of
    gate and up, and that product made again; or, in attention, of its output, of q, k and v, and of
    the norms.
    """
    g, path = shape.geometry, layer_path(shape)
    f = max(visited_mlps(shape, setup), 1) * g.mlp_width
    # the two halves of a layer run backward one after the other, so the larger one counts
    mlp = (4 if shape.gated else 3) * f + 2 * g.width
    attention = 3 * shape.queries + 2 * shape.keys + 3 * g.width
    return int(
        setup.tokens
        * max(mlp, attention)
        * setup.element
        * (1 if path == "fused" else PLAIN_WORKSPACE)
    )


def allocator_overhead(shape: ModelShape, setup: MemorySetup, moving: int) -> int:
    """What the allocator holds beyond the ``moving`` bytes in use: a share of them, and gaps of
    whole buffers.
    """
    g = shape.geometry
    if setup.device == "cuda":
        return int(ALLOCATOR_SLACK["cuda"] * moving)
    # [T, widest side]: gaps are counted in the largest buffer that comes and goes in every layer
    buffer = setup.tokens * max(g.width, shape.queries, g.mlp_width) * setup.element
    is_wide = setup.dtype == "float32"
    rms = shape.norm == "rms" and layer_path(shape) == "fused"
    fewer = rms and (is_wide or setup.attention != "tiles")
    if setup.attention == "dots" and not is_wide:
        gaps = DOTS_GAPS[setup.recompute] / (2 if rms and setup.recompute == "none" else 1)
    else:
        gaps = (FEWER_GAPS if fewer else ALLOCATOR_GAPS)[setup.recompute]
        gaps += 0.0 if fewer and is_wide else GAPS_PER_LAYER * g.layers
    return int(ALLOCATOR_SLACK["cpu"] * moving + gaps * buffer)
