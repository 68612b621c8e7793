"""Memory of one rank when a run is spread over many: DDP, FSDP2 (the base sharded), tensor parallel
inside either, or Megatron (TP x PP, EP for experts).

**Tensor parallel** is the plan of a smaller model: its share of the heads, of the MLP and of the
vocabulary, at the whole width, and of an adapted matrix one side whole. A column-parallel matrix
splits B, a row-parallel one A; the inputs of layers and the residual between are whole, unless
`sequence_parallel` divides them. **FSDP2** cuts what a rank has of the base along its first
dimension, filled up to equal parts, and gathers it layer by layer; adapters are never sharded. Of a
pipeline's stages (1F1B: stage s of p holds up to p - s micro-batches) the fullest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lorry.config.parsing.sizes import size_in_words
from lorry.plan.adapters import AdaptedMatrix, PlannedAdapter, is_embedding
from lorry.plan.constants import COMMUNICATION_BYTES, GATHERED_LAYERS, TWIN_BYTES
from lorry.plan.full.weights import PlannedWeights
from lorry.plan.memory import (
    MARGIN,
    MASTERS,
    MOMENT_BYTES,
    VALUE_BYTES,
    MemoryComponent,
    MemoryEstimate,
    MemorySetup,
    add_margin,
    estimate_memory,
    layer_weights,
    layer_workspace,
    masters_of,
    saved_bytes_per_token,
    score_workspace,
    tabulate_memory,
)
from lorry.plan.parallel.split import ParallelSplit, check_split
from lorry.plan.shapes import LayerMatrix, ModelShape

ROW_PARALLEL = ("attention.out", "mlp.out")  # sites whose inputs are split; of others the outputs


def memory_per_rank(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    accumulation: int,
) -> MemoryEstimate:
    """The fullest rank's peak. Raises ConfigError for a split that cannot be."""
    check_split(split, shape)
    if split.processes == 1:
        return estimate_memory(shape, adapter, setup)
    if split.backend == "megatron":
        stages = [
            _stage_memory(shape, adapter, setup, split, accumulation, s)
            for s in range(split.pipeline)
        ]
        components = list(max(stages, key=lambda m: m.total).components)
    else:
        components = _layout_memory(shape, adapter, setup, split)
    library = "NCCL" if setup.device == "cuda" else "gloo"
    buffers = MemoryComponent(
        "communication", COMMUNICATION_BYTES[setup.device], f"{library}'s buffers"
    )
    counted = [c for c in components if c.name != MARGIN]
    return add_margin((counted[0], buffers, *counted[1:]), setup.device)


def _layout_memory(
    shape: ModelShape, adapter: PlannedAdapter, setup: MemorySetup, split: ParallelSplit
) -> list[MemoryComponent]:
    """Of ddp and fsdp, with tensor parallel or without."""
    local = local_shape(shape, split.tensor)
    part = local_adapter(adapter, split.tensor)
    setup = replace(
        setup,
        tensor_ranks=split.tensor,
        sequence_ranks=split.tensor if split.sequence else 1,
    )
    components = {c.name: c for c in estimate_memory(local, part, setup).components}
    if split.tensor > 1:
        for name in ("base weights", "vocabulary", "adapter"):
            c = components[name]
            components[name] = replace(c, words=f"{c.words}; TP {split.tensor}: this rank's part")
        if setup.device == "cpu" and setup.dtype != "float32":
            runtime = components["runtime"]
            components["runtime"] = replace(runtime, bytes=runtime.bytes + TWIN_BYTES)
    if split.shards > 1:
        components = _shard_base(components, local, setup, split)
        if isinstance(part, PlannedWeights):
            return _shard_masters(components, part, setup, split.shards)
    if split.shard_optimizer and split.data > 1:
        moments = MOMENT_BYTES * part.parameters
        whole = components["optimizer"]
        components["optimizer"] = MemoryComponent(
            "optimizer",
            whole.bytes - moments + -(-moments // split.data),
            f"{whole.words}; the moments of 1/{split.data} of the values",
        )
    return list(components.values())


def _shard_base(
    components: dict[str, MemoryComponent],
    local: ModelShape,
    setup: MemorySetup,
    split: ParallelSplit,
) -> dict[str, MemoryComponent]:
    """FSDP2: a rank's shard of the base in place of the base; gathered the layers at work, and
    embedding, final norm and head, which stay gathered from the forward pass to the backward.
    """
    share = sharded_base_bytes(local, setup, split.shards)
    layers = local.geometry.layers
    at_once = layers if not split.reshard_after_forward else GATHERED_LAYERS[setup.device]
    layer = layer_weights(local, setup)
    gathered = int(at_once * layer) + root_bytes(local, setup)
    if setup.device == "cpu":
        # a shard lies within the whole weight, and is not there twice; the parts of the next layer
        # arrive in memory of their own (`backends.distributed.gathered`)
        gathered += int(layer) - gathered // split.shards
    words = f"1/{split.shards} of the base in {setup.precision}"
    # on the CPU the shard lies in its memory anyway
    offloaded = split.offload and setup.device == "cuda"
    if offloaded:
        words += f", in the CPU's memory ({size_in_words(share)})"
    replaced = {
        "base weights": MemoryComponent("base weights", 0 if offloaded else share, words),
        "vocabulary": MemoryComponent(
            "gathered",
            gathered,
            f"{'all' if at_once == layers else at_once} whole layers, embedding and head",
        ),
    }
    return {replaced.get(name, c).name: replaced.get(name, c) for name, c in components.items()}


def _shard_masters(
    components: dict[str, MemoryComponent], weights: PlannedWeights, setup: MemorySetup, shards: int
) -> list[MemoryComponent]:
    """Of weights that train a rank has masters, gradients and moments of its rows; a layer's whole gradients
    come in passing, fp32 as they are sent, and those of embedding and head stay until the lowest layer
    has been left.
    """
    moments = components["optimizer"]
    components["optimizer"] = replace(
        moments,
        bytes=-(-moments.bytes // shards),
        words=f"{moments.words}; of 1/{shards} of the values",
    )
    sent = max(weights.layer_values, weights.ends) * VALUE_BYTES
    passing = weights.ends * setup.element + sent + -(-sent // shards)
    gradients = MemoryComponent(
        "passing gradients", passing, "whole, on their way to the ranks that keep them"
    )
    components[MASTERS] = masters_of(weights, setup, shards)
    return [
        each
        for component in components.values()
        for each in ([component, gradients] if component.name == "optimizer" else [component])
    ]


def root_bytes(local: ModelShape, setup: MemorySetup) -> int:
    """Of the group that is gathered for the whole of a pass: embedding, final norm and head."""
    head = 0 if local.geometry.tied else local.head_size
    return (local.embedding + head + local.final_norm) * setup.element


def sharded_base_bytes(local: ModelShape, setup: MemorySetup, shards: int) -> int:
    """One rank's share of all weights: FSDP2 cuts each tensor along its first dimension into equal
    parts, the last ones filled up (experts that lie in one tensor along their number, so beyond
    as many shards nothing is saved).
    """
    layer = sum(
        sharded_rows(rows, shards) * each * size for rows, each, size in layer_tensors(local, setup)
    )
    root = sum(sharded_rows(rows, shards) * each for rows, each in root_tensors(local))
    return int(local.geometry.layers * layer) + root * setup.element


def sharded_rows(rows: int, shards: int) -> int:
    """First-dimension rows of a tensor that each shard holds, filled up."""
    return -(-rows // shards)


def root_tensors(local: ModelShape) -> Iterator[tuple[int, int]]:
    """(first dimension, values of each of its rows) of embedding, final norm and head."""
    g = local.geometry
    yield from ((g.vocab, g.width) for _ in range(1 if g.tied else 2))
    if local.learned_positions:
        yield g.context, g.width
    yield from ((g.width, 1) for _ in range(2 if local.norm == "layer" else 1))


def layer_tensors(local: ModelShape, setup: MemorySetup) -> Iterator[tuple[int, int, float]]:
    """(first dimension, values of each of its rows, bytes a value) of the tensors of one layer."""
    g, e, matrix = local.geometry, setup.element, setup.matrix_element
    for linear in local.linears:
        yield linear.outputs, linear.inputs, matrix
        if setup.precision == "int8":
            yield linear.outputs, 1, 4  # the scale of each
        if linear.bias:
            yield linear.outputs, 1, e
    norms = 2 if local.norm == "layer" else 1
    yield from ((g.width, 1, e) for _ in range(2 * norms))
    if local.qk_norm:
        yield from ((g.head_dim, 1, e) for _ in range(2))
    if local.experts is not None:
        yield local.experts.count, g.width, e  # the router
        # gate and up in one tensor, down in another (transformers 5)
        inner = (2 if local.gated else 1) * local.experts.width
        yield local.experts.count, inner * g.width, matrix
        yield local.experts.count, local.experts.width * g.width, matrix


def local_shape(shape: ModelShape, tensor: int) -> ModelShape:
    """What the first of ``tensor`` ranks has of the model: its heads, MLP columns and vocabulary rows,
    at the whole width. Norms and learned positions are whole, and so are biases behind a sum.
    """
    return replace(
        shape,
        geometry=shape.geometry.of_each(tensor, -(-shape.geometry.vocab // tensor)),
        linears=tuple(_local_linear(linear, tensor) for linear in shape.linears),
    )


def _local_linear(linear: LayerMatrix, tensor: int) -> LayerMatrix:
    if linear.site in ROW_PARALLEL:
        return replace(linear, inputs=linear.inputs // tensor)
    return replace(linear, outputs=linear.outputs // tensor)


def local_adapter(adapter: PlannedAdapter, tensor: int) -> PlannedAdapter:
    """What one of ``tensor`` ranks has of an adapter. Values beside its matrices (other jobs, frozen
    adapters) count as if they were cut alike.
    """
    if tensor == 1:
        return adapter
    matrices = tuple(_local_matrix(matrix, tensor) for matrix in adapter.matrices)
    whole = sum(m.parameters for m in adapter.matrices)
    share = sum(m.parameters for m in matrices) / whole if whole else 1.0
    return replace(
        adapter,
        matrices=matrices,
        own=tuple(
            each if each.rows else replace(each, values=-(-each.values // tensor))
            for each in adapter.own
        ),
        beside=round(adapter.beside * share),
        frozen=round(adapter.frozen * share),
        idle=round(adapter.idle * share),
    )


def whole_side_values(adapter: PlannedAdapter) -> int:
    """Values of the sides that every tensor rank holds whole, whose gradients are sums over them: A
    of a column-parallel matrix, B of a row-parallel one.
    """
    return sum(
        m.experts * m.rank * (m.outputs if _splits_inputs(m) else m.inputs)
        for m in adapter.matrices
    )


def _stage_memory(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    accumulation: int,
    stage: int,
) -> MemoryEstimate:
    """One GPU of pipeline stage ``stage``."""
    t, first, last = split.tensor, stage == 0, stage == split.pipeline - 1
    # whole layers, as even as they go: stage s has layers [L s / p, L (s + 1) / p)
    bounds = [shape.geometry.layers * s // split.pipeline for s in (stage, stage + 1)]
    layers = range(*bounds)
    # 1F1B: stage s runs p - s forward passes before its first backward frees one
    in_flight = min(split.pipeline - stage, accumulation)
    stage_adapter = PlannedAdapter(
        tuple(
            _local_matrix(matrix, t)
            for matrix in adapter.matrices
            if matrix.layer in layers or (matrix.layer is None and (first or last))
        )
    )
    saved_per_token = saved_bytes_per_token(
        shape, adapter, setup, range(max(layers.start, adapter.lowest), layers.stop)
    )
    # sequence parallel: a layer's input and its gradient are gathered whole, [T, d] each
    gathered = 2 * setup.tokens * shape.geometry.width * setup.element if t > 1 else 0
    # a tied head lies in memory once where one stage has both ends; else each end has its copy
    vocabulary_weights = (shape.embedding if first else 0) + (
        shape.head_size if last and not (first and shape.geometry.tied) else 0
    )
    return tabulate_memory(
        shape,
        setup,
        stage_adapter,
        base_weights=int(len(layers) * _layer_bytes(shape, setup, split)),
        base_words=f"stage {stage}: {len(layers)} layers / TP {t}",
        vocabulary=vocabulary_weights * setup.element // t,
        vocabulary_words="embedding on the first stage, head on the last",
        adapter_words="values of this GPU",
        scores=score_workspace(shape, setup, adapter) // t if last else 0,
        layer_backward=layer_workspace(shape, setup) // t + gathered,
        saved=in_flight * setup.tokens * saved_per_token // t,
        saved_words=f"{in_flight} micro-batches in flight",
    )


def _layer_bytes(shape: ModelShape, setup: MemorySetup, split: ParallelSplit) -> float:
    """Bytes of one layer on one GPU: dense matrices over TP, experts over TP and EP."""
    whole = layer_weights(shape, setup)
    matrices = shape.layer_linears + shape.layer_experts
    # by their share of the weights: a layer's bytes are not kept apart by what they belong to
    experts = whole * shape.layer_experts / (matrices + shape.layer_small)
    return (whole - experts) / split.tensor + experts / (split.tensor * split.expert)


def _local_matrix(matrix: AdaptedMatrix, tensor: int) -> AdaptedMatrix:
    """The first rank's part of an adapted matrix: row-parallel ones (out of attention or MLP) split
    their inputs and so A, the rest outputs and so B; the embedding's inputs are the vocabulary.
    """
    if _splits_inputs(matrix):
        return replace(matrix, inputs=-(-matrix.inputs // tensor))
    return replace(matrix, outputs=-(-matrix.outputs // tensor))


def _splits_inputs(matrix: AdaptedMatrix) -> bool:
    return matrix.site in ROW_PARALLEL or (matrix.site is None and is_embedding(matrix))


def pipeline_slowdown(split: ParallelSplit, accumulation: int) -> float:
    """Share of the time a pipeline's stages wait, as a factor on time: (m + p - 1) / m."""
    return (accumulation + split.pipeline - 1) / accumulation
