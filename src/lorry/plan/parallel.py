"""Memory and time per GPU when a run is spread over many: DDP, FSDP2 (the base sharded) or Megatron
(TP x PP, EP for experts).

Adapters are plain tensors, never sharded by FSDP; under tensor parallel a column-parallel matrix
splits B, a row-parallel one A. With sequence parallel everything a layer keeps is divided by the
tensor size. Of a pipeline's stages (1F1B: stage s of p holds up to p - s micro-batches) the fullest
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorry.errors import ConfigError
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
from lorry.plan.shapes import ModelShape

BackendName = Literal["single", "ddp", "fsdp", "megatron"]
GATHERED_LAYERS = 2  # FSDP2: the layer at work and the one being fetched


@dataclass(frozen=True, kw_only=True)
class ParallelSplit:
    """How a run is spread. ``processes`` GPUs = tensor x pipeline x data."""

    backend: BackendName = "single"
    processes: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def data(self) -> int:
        """Replicas that read different rows."""
        return self.processes // (self.tensor * self.pipeline)


def check_split(split: ParallelSplit, shape: ModelShape) -> None:
    """Raises ConfigError, naming the field, for a split that this model or backend cannot have."""
    g = shape.geometry
    if split.backend == "single" and split.processes > 1:
        raise ConfigError(
            f"backend.processes={split.processes} needs backend=ddp, fsdp or megatron"
        )
    if split.backend != "megatron":
        for name in ("tensor", "pipeline", "expert"):
            if getattr(split, name) > 1:
                raise ConfigError(
                    f"backend.{name}_parallel={getattr(split, name)} needs backend=megatron"
                )
    if split.processes % (split.tensor * split.pipeline):
        raise ConfigError(
            f"backend.processes={split.processes} is not a multiple of "
            f"tensor_parallel x pipeline_parallel = {split.tensor} x "
            f"{split.pipeline}"
        )
    if g.heads % split.tensor or g.mlp_width % split.tensor:
        raise ConfigError(
            f"backend.tensor_parallel={split.tensor} does not divide {g.heads} heads and an MLP of {g.mlp_width}"
        )
    if split.pipeline > g.layers:
        raise ConfigError(
            f"backend.pipeline_parallel={split.pipeline} is more than the {g.layers} layers there are"
        )
    if split.expert > 1 and (shape.experts is None or shape.experts.count % split.expert):
        count = 0 if shape.experts is None else shape.experts.count
        raise ConfigError(
            f"backend.expert_parallel={split.expert} does not divide the {count} experts of this model"
        )
    if split.data % split.expert:
        raise ConfigError(
            f"backend.expert_parallel={split.expert} does not divide the {split.data} data-parallel replicas"
        )


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
