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
from lorry.plan.constants import COMMUNICATION_BYTES, LIBRARY_BYTES
from lorry.plan.memory import (
    MOMENT_BYTES,
    MemoryComponent,
    MemoryEstimate,
    MemorySetup,
    adapter_bytes,
    allocator_overhead,
    estimate_memory,
    layer_path,
    layer_weights,
    layer_workspace,
    runtime_bytes,
    saved_bytes_per_token,
    score_workspace,
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
            f"backend.processes={split.processes} is no multiple of tensor_parallel x pipeline_parallel = "
            f"{split.tensor} x {split.pipeline}"
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
    talk = MemoryComponent("communication", COMMUNICATION_BYTES, "NCCL's buffers")
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
    return MemoryEstimate((fullest.components[0], talk, *fullest.components[1:]))


def _sharded_memory(
    whole: MemoryEstimate, shape: ModelShape, setup: MemorySetup, processes: int
) -> MemoryEstimate:
    """FSDP2: every GPU holds its share of the base, two layers gathered, and the embedding and
    head, which stay gathered.
    """
    one = layer_weights(shape, setup.precision)
    weights = next(c for c in whole.components if c.name == "base weights")
    vocabulary = next(c for c in whole.components if c.name == "vocabulary")
    share = (weights.bytes + vocabulary.bytes) // processes
    replaced = {
        "base weights": MemoryComponent(
            "base weights", share, f"1/{processes} of the base in {setup.precision}"
        ),
        "vocabulary": MemoryComponent(
            "gathered",
            int(GATHERED_LAYERS * one) + vocabulary.bytes,
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
    bounds = [shape.geometry.layers * s // split.pipeline for s in (stage, stage + 1)]
    mine = range(*bounds)
    flying = min(split.pipeline - stage, accumulation)
    sittings = [
        _local_matrix(s, t)
        for s in adapter.sittings
        if s.layer in mine or (s.layer is None and (first or last))
    ]
    part = PlannedAdapter(tuple(sittings))
    kept = saved_bytes_per_token(
        shape, adapter, setup, range(max(mine.start, adapter.lowest), mine.stop)
    )
    saved = flying * setup.tokens * kept // t
    scores = score_workspace(shape, setup, adapter) // t if last else 0
    gathered = 2 * setup.tokens * shape.geometry.width * setup.element if t > 1 else 0
    step = max(scores, layer_workspace(shape, setup) // t + gathered)
    ends = (shape.embedding if first else 0) + (
        shape.head_size if last and not (first and shape.geometry.tied) else 0
    )
    slack, path = allocator_overhead(shape, setup, saved + step), layer_path(shape)
    return MemoryEstimate(
        (
            MemoryComponent("libraries", LIBRARY_BYTES[setup.device], "CUDA context"),
            MemoryComponent("runtime", runtime_bytes(setup), "cuBLAS's workspace"),
            MemoryComponent(
                "base weights",
                int(len(mine) * _layer_bytes(shape, setup, split)),
                f"stage {stage}: {len(mine)} layers / TP {t}",
            ),
            MemoryComponent(
                "vocabulary",
                ends * setup.element // t,
                "embedding on the first stage, head on the last",
            ),
            MemoryComponent(
                "adapter",
                adapter_bytes(part, setup),
                f"{part.parameters / 1e6:.2f}M values of this GPU",
            ),
            MemoryComponent(
                "optimizer", MOMENT_BYTES * part.parameters, "AdamW's two moments, fp32"
            ),
            MemoryComponent(
                "workspace",
                step,
                "the vocabulary product" if step == scores else "one layer's backward",
            ),
            MemoryComponent("allocator", slack, "gaps between buffers that come and go"),
            MemoryComponent(
                "activations",
                saved,
                f"{flying} micro-batches in flight ({path}, recompute {setup.recompute})",
            ),
        )
    )


def _layer_bytes(shape: ModelShape, setup: MemorySetup, split: ParallelSplit) -> float:
    """Bytes of one layer on one GPU: dense matrices over TP, experts over TP and EP."""
    whole = layer_weights(shape, setup.precision)
    matrices = shape.layer_linears + shape.layer_experts
    experts = whole * shape.layer_experts / (matrices + shape.layer_small)
    return (whole - experts) / split.tensor + experts / (split.tensor * split.expert)


def _local_matrix(sitting: AdaptedMatrix, tensor: int) -> AdaptedMatrix:
    """This GPU's part of an adapted matrix: row-parallel ones (out of attention or MLP) split their
    inputs, the rest outputs.
    """
    row = sitting.site in ("attention.out", "mlp.out")
    inputs = sitting.inputs // tensor if row else sitting.inputs
    outputs = sitting.outputs if row else sitting.outputs // tensor
    return AdaptedMatrix(**{**vars(sitting), "inputs": inputs, "outputs": outputs})


def pipeline_slowdown(split: ParallelSplit, accumulation: int) -> float:
    """Share of the time a pipeline's stages wait, as a factor on time: (m + p - 1) / m."""
    return (accumulation + split.pipeline - 1) / accumulation
