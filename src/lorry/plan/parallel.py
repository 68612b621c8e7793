"""Memory and time per GPU when a run is spread over many: DDP, FSDP2 (the base sharded) or Megatron (TP x PP, EP for experts).

Adapters are plain tensors, never sharded by FSDP; under tensor parallel a column-parallel matrix splits B, a row-parallel one A.
With sequence parallel everything a layer keeps is divided by the tensor size. Of a pipeline's stages (1F1B: stage s of p holds up
to p - s micro-batches) the fullest counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorry.errors import ConfigError
from lorry.plan.adapters import Adapter, Sitting
from lorry.plan.constants import COMMUNICATION, LIBRARIES
from lorry.plan.memory import (
    MOMENTS,
    Component,
    Memory,
    Setup,
    adapter_bytes,
    allocator,
    kept_per_token,
    layer_weights,
    layer_workspace,
    memory_of,
    path_of,
    runtime,
    score_workspace,
)
from lorry.plan.shapes import Shape

Backend = Literal["single", "ddp", "fsdp", "megatron"]
GATHERED_LAYERS = 2  # FSDP2: the layer at work and the one being fetched


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a run is spread. ``processes`` GPUs = tensor x pipeline x data."""

    backend: Backend = "single"
    processes: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def data(self) -> int:
        """Replicas that read different rows."""
        return self.processes // (self.tensor * self.pipeline)


def check(split: Split, shape: Shape) -> None:
    """Raises ConfigError, naming the field, for a split that this model or backend cannot have."""
    g = shape.geometry
    if split.backend == "single" and split.processes > 1:
        raise ConfigError(f"backend.processes={split.processes} needs backend=ddp, fsdp or megatron")
    if split.backend != "megatron":
        for name in ("tensor", "pipeline", "expert"):
            if getattr(split, name) > 1:
                raise ConfigError(f"backend.{name}_parallel={getattr(split, name)} needs backend=megatron")
    if split.processes % (split.tensor * split.pipeline):
        raise ConfigError(
            f"backend.processes={split.processes} is no multiple of tensor_parallel x pipeline_parallel = "
            f"{split.tensor} x {split.pipeline}"
        )
    if g.heads % split.tensor or g.mlp_width % split.tensor:
        raise ConfigError(f"backend.tensor_parallel={split.tensor} does not divide {g.heads} heads and an MLP of {g.mlp_width}")
    if split.pipeline > g.layers:
        raise ConfigError(f"backend.pipeline_parallel={split.pipeline} is more than the {g.layers} layers there are")
    if split.expert > 1 and (shape.experts is None or shape.experts.count % split.expert):
        count = 0 if shape.experts is None else shape.experts.count
        raise ConfigError(f"backend.expert_parallel={split.expert} does not divide the {count} experts of this model")
    if split.data % split.expert:
        raise ConfigError(f"backend.expert_parallel={split.expert} does not divide the {split.data} data-parallel replicas")


def memory_per_gpu(shape: Shape, adapter: Adapter, setup: Setup, split: Split, accumulation: int) -> Memory:
    """The fullest GPU's peak. Raises ConfigError for a split that cannot be."""
    check(split, shape)
    if split.processes == 1:
        return memory_of(shape, adapter, setup)
    talk = Component("communication", COMMUNICATION, "NCCL's buffers")
    if split.backend == "megatron":
        stages = [_stage(shape, adapter, setup, split, accumulation, s) for s in range(split.pipeline)]
        fullest = max(stages, key=lambda m: m.total)
    else:
        fullest = memory_of(shape, adapter, setup)
        if split.backend == "fsdp":
            fullest = _sharded(fullest, shape, setup, split.processes)
    return Memory((fullest.components[0], talk, *fullest.components[1:]))


def _sharded(whole: Memory, shape: Shape, setup: Setup, processes: int) -> Memory:
    """FSDP2: every GPU holds its share of the base, two layers gathered, and the embedding and head, which stay gathered."""
    one = layer_weights(shape, setup.precision)
    weights = next(c for c in whole.components if c.name == "base weights")
    vocabulary = next(c for c in whole.components if c.name == "vocabulary")
    share = (weights.bytes + vocabulary.bytes) // processes
    replaced = {
        "base weights": Component("base weights", share, f"1/{processes} of the base in {setup.precision}"),
        "vocabulary": Component(
            "gathered", int(GATHERED_LAYERS * one) + vocabulary.bytes, f"{GATHERED_LAYERS} whole layers, embedding and head"
        ),
    }
    return Memory(tuple(replaced.get(c.name, c) for c in whole.components))


def _stage(shape: Shape, adapter: Adapter, setup: Setup, split: Split, accumulation: int, stage: int) -> Memory:
    """One GPU of pipeline stage ``stage``."""
    t, first, last = split.tensor, stage == 0, stage == split.pipeline - 1
    bounds = [shape.geometry.layers * s // split.pipeline for s in (stage, stage + 1)]
    mine = range(*bounds)
    flying = min(split.pipeline - stage, accumulation)
    sittings = [_local(s, t) for s in adapter.sittings if s.layer in mine or (s.layer is None and (first or last))]
    part = Adapter(tuple(sittings))
    kept = kept_per_token(shape, adapter, setup, range(max(mine.start, adapter.lowest), mine.stop))
    saved = flying * setup.tokens * kept // t
    scores = score_workspace(shape, setup, adapter) // t if last else 0
    gathered = 2 * setup.tokens * shape.geometry.width * setup.element if t > 1 else 0
    step = max(scores, layer_workspace(shape, setup) // t + gathered)
    ends = (shape.embedding if first else 0) + (shape.head_size if last and not (first and shape.geometry.tied) else 0)
    slack, path = allocator(shape, setup, saved + step), path_of(shape)
    return Memory((
        Component("libraries", LIBRARIES[setup.device], "CUDA context"),
        Component("runtime", runtime(setup), "cuBLAS's workspace"),
        Component("base weights", int(len(mine) * _layer(shape, setup, split)), f"stage {stage}: {len(mine)} layers / TP {t}"),
        Component("vocabulary", ends * setup.element // t, "embedding on the first stage, head on the last"),
        Component("adapter", adapter_bytes(part, setup), f"{part.parameters / 1e6:.2f}M values of this GPU"),
        Component("optimizer", MOMENTS * part.parameters, "AdamW's two moments, fp32"),
        Component("workspace", step, "the vocabulary product" if step == scores else "one layer's backward"),
        Component("allocator", slack, "gaps between buffers that come and go"),
        Component("activations", saved, f"{flying} micro-batches in flight ({path}, recompute {setup.recompute})"),
    ))  # fmt: skip


def _layer(shape: Shape, setup: Setup, split: Split) -> float:
    """Bytes of one layer on one GPU: dense matrices over TP, experts over TP and EP."""
    whole = layer_weights(shape, setup.precision)
    matrices = shape.layer_linears + shape.layer_experts
    experts = whole * shape.layer_experts / (matrices + shape.layer_small)
    return (whole - experts) / split.tensor + experts / (split.tensor * split.expert)


def _local(sitting: Sitting, tensor: int) -> Sitting:
    """This GPU's part of an adapted matrix: row-parallel ones (out of attention or MLP) split their inputs, the rest outputs."""
    row = sitting.site in ("attention.out", "mlp.out")
    inputs = sitting.inputs // tensor if row else sitting.inputs
    outputs = sitting.outputs if row else sitting.outputs // tensor
    return Sitting(**{**vars(sitting), "inputs": inputs, "outputs": outputs})


def slowdown(split: Split, accumulation: int) -> float:
    """Share of the time a pipeline's stages wait, as a factor on time: (m + p - 1) / m."""
    return (accumulation + split.pipeline - 1) / accumulation
