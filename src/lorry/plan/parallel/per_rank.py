"""Memory and time per GPU when a run is spread over many: DDP, FSDP2 (the base sharded) or Megatron
(TP x PP, EP for experts).

Adapters are plain tensors, never sharded by FSDP; under tensor parallel a column-parallel matrix
splits B, a row-parallel one A. With sequence parallel everything a layer keeps is divided by the
tensor size. Of a pipeline's stages (1F1B: stage s of p holds up to p - s micro-batches) the fullest
counts.
"""

from __future__ import annotations

from lorry.plan.adapters import AdaptedMatrix, PlannedAdapter
from lorry.plan.constants import COMMUNICATION_BYTES
from lorry.plan.memory import (
    MemoryComponent,
    MemoryEstimate,
    MemorySetup,
    estimate_memory,
    layer_weights,
    layer_workspace,
    saved_bytes_per_token,
    score_workspace,
    tabulate_memory,
)
from lorry.plan.parallel.split import ParallelSplit, check_split
from lorry.plan.shapes import ModelShape

GATHERED_LAYERS = 2  # FSDP2: the layer at work and the one being fetched


def memory_per_gpu(
    shape: ModelShape,
    adapter: PlannedAdapter,
    setup: MemorySetup,
    split: ParallelSplit,
    accumulation: int,
) -> MemoryEstimate:
    """The fullest GPU's peak. Raises ConfigError for a split that cannot be."""
    check_split(split, shape)
    if split.processes == 1:
        return estimate_memory(shape, adapter, setup)
    communication = MemoryComponent("communication", COMMUNICATION_BYTES, "NCCL's buffers")
    if split.backend == "megatron":
        stages = [
            _stage_memory(shape, adapter, setup, split, accumulation, s)
            for s in range(split.pipeline)
        ]
        fullest = max(stages, key=lambda m: m.total)
    else:
        fullest = estimate_memory(shape, adapter, setup)
        if split.backend == "fsdp":
            fullest = _sharded_memory(fullest, shape, setup, split.processes)
    return MemoryEstimate((fullest.components[0], communication, *fullest.components[1:]))


def _sharded_memory(
    whole: MemoryEstimate, shape: ModelShape, setup: MemorySetup, processes: int
) -> MemoryEstimate:
    """FSDP2: every GPU holds its share of the base, two layers gathered, and the embedding and
    head, which stay gathered.
    """
    layer_bytes = layer_weights(shape, setup.precision)
    weights = next(c for c in whole.components if c.name == "base weights")
    vocabulary = next(c for c in whole.components if c.name == "vocabulary")
    share = (weights.bytes + vocabulary.bytes) // processes
    replaced = {
        "base weights": MemoryComponent(
            "base weights", share, f"1/{processes} of the base in {setup.precision}"
        ),
        "vocabulary": MemoryComponent(
            "gathered",
            int(GATHERED_LAYERS * layer_bytes) + vocabulary.bytes,
            f"{GATHERED_LAYERS} whole layers, embedding and head",
        ),
    }
    return MemoryEstimate(tuple(replaced.get(c.name, c) for c in whole.components))


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
    whole = layer_weights(shape, setup.precision)
    matrices = shape.layer_linears + shape.layer_experts
    # by their share of the weights: a layer's bytes are not kept apart by what they belong to
    experts = whole * shape.layer_experts / (matrices + shape.layer_small)
    return (whole - experts) / split.tensor + experts / (split.tensor * split.expert)


def _local_matrix(matrix: AdaptedMatrix, tensor: int) -> AdaptedMatrix:
    """This GPU's part of an adapted matrix: row-parallel ones (out of attention or MLP) split their
    inputs, the rest outputs.
    """
    row_parallel = matrix.site in ("attention.out", "mlp.out")
    inputs = matrix.inputs // tensor if row_parallel else matrix.inputs
    outputs = matrix.outputs if row_parallel else matrix.outputs // tensor
    return AdaptedMatrix(**{**vars(matrix), "inputs": inputs, "outputs": outputs})


def pipeline_slowdown(split: ParallelSplit, accumulation: int) -> float:
    """Share of the time a pipeline's stages wait, as a factor on time: (m + p - 1) / m."""
    return (accumulation + split.pipeline - 1) / accumulation
