"""Many GPUs: what is divided, what is not, and splits that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorry.adapters.quantization.packed import QUANTIZATIONS, pack
from lorry.config.schema.lora import LoraConfig
from lorry.plan.adapters import plan_adapter
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import (
    MASTER_BYTES,
    MOMENT_BYTES,
    DeviceType,
    MemoryEstimate,
    MemorySetup,
    PrecisionName,
)
from lorry.plan.parallel.per_rank import memory_per_rank, pipeline_slowdown
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.shapes import read_model_shape


def per_gpu(
    model: str,
    backend: Any,
    processes: int,
    *,
    accumulation: int = 1,
    tokens: int = 4096,
    device: DeviceType = "cuda",
    precision: PrecisionName = "bfloat16",
    **split: Any,
) -> MemoryEstimate:
    shape = read_model_shape(KNOWN_CONFIGS[model])
    setup = MemorySetup(tokens=tokens, length=tokens, device=device, precision=precision)
    adapter = plan_adapter(shape, LoraConfig(r=16), 16)
    return memory_per_rank(
        shape,
        adapter,
        setup,
        ParallelSplit(backend=backend, processes=processes, **split),
        accumulation,
    )


def part(memory: MemoryEstimate, name: str) -> int:
    return next(c.bytes for c in memory.components if c.name == name)


def test_ddp_is_one_gpu_and_its_talking() -> None:
    one, many = per_gpu("llama-3-8b", "single", 1), per_gpu("llama-3-8b", "ddp", 8)
    assert many.total - part(many, "communication") == one.total


def test_fsdp_divides_the_base_and_nothing_of_the_adapter() -> None:
    one, many = per_gpu("llama-3-70b", "ddp", 8), per_gpu("llama-3-70b", "fsdp", 8)
    whole = part(one, "base weights") + part(one, "vocabulary")
    assert part(many, "base weights") == whole // 8
    for same in ("adapter", "optimizer", "activations", "workspace"):
        assert part(many, same) == part(one, same)
    layer = (part(one, "base weights")) / 80
    assert part(many, "gathered") == pytest.approx(2 * layer + part(one, "vocabulary"), rel=1e-3)


def test_fsdp_holds_llama_70b_on_eight_h100_with_recompute() -> None:
    """2 bytes x 70.55e9 / 8 = 16.4 GiB of weights a GPU."""
    assert part(per_gpu("llama-3-70b", "fsdp", 8), "base weights") / 2**30 == pytest.approx(
        16.43, abs=0.01
    )


def test_tensor_parallel_divides_weights_and_activations() -> None:
    one, two = per_gpu("llama-3-8b", "single", 1), per_gpu("llama-3-8b", "megatron", 2, tensor=2)
    for name, slack in (("base weights", 1e-3), ("activations", 1e-3)):
        assert part(two, name) == pytest.approx(part(one, name) / 2, rel=slack)
    d, q, k, f = 4096, 4096, 1024, 14336
    columns = sum(d + out // 2 for out in (q, k, k, f, f))  # A whole, half of B
    rows = (q // 2 + d) + (f // 2 + d)  # half of A, B whole
    assert part(two, "optimizer") == MOMENT_BYTES * 32 * 16 * (columns + rows)
    assert part(two, "adapter") == (MASTER_BYTES + 2) * 32 * 16 * (columns + rows)


def test_tensor_parallel_of_ddp_keeps_inputs_whole_unless_they_are_divided() -> None:
    """Per token and layer, bfloat16: 2 (2 d + (2 q + 2 k + 2 f) / T + ranks) + 4 heads / T bytes, as
    Llama's sizes have it; k and v are repeated per head where the kernel does not serve (2 q / T).
    """
    whole = per_gpu("llama-3-8b", "ddp", 2, tensor=2)
    divided = per_gpu("llama-3-8b", "ddp", 2, tensor=2, sequence=True)
    d, q, k, f, heads, ranks = 4096, 4096, 1024, 14336, 32, 7 * 16
    cut = (2 * q + 2 * k + 2 * f + 2 * q) // 2
    for memory, inputs in ((whole, 2 * d), (divided, 2 * d // 2)):
        expected = 4096 * 32 * (2 * (inputs + cut + ranks) + 4 * heads // 2)
        assert part(memory, "activations") == expected
    base = 2 * (32 * (2 * d * (q + k) + 3 * d * f) // 2 + 32 * 2 * d + d)
    assert part(whole, "base weights") == base
    assert part(whole, "vocabulary") == 2 * 2 * 128256 * d // 2


@pytest.mark.parametrize(
    ("precision", "matrices"), [("nf4", 4.5 / 8), ("fp4", 4.5 / 8), ("int8", 1.0)]
)
def test_a_packed_matrix_that_ranks_share(precision: PrecisionName, matrices: float) -> None:
    """Bytes of a half as `PackedMatrix.part` holds it; a 4-bit block's scale is fp32 there, not 8 bits."""
    outputs, inputs = 1024, 512
    half = pack(torch.randn(outputs, inputs), QUANTIZATIONS[precision]).part(0, [slice(0, 512)])
    held = sum(t.nbytes for t in half.tensors().values())
    scales = 4 * outputs // 2 if precision == "int8" else 0
    assert held == matrices * outputs * inputs / 2 + scales
    d, q, k, f = 4096, 4096, 1024, 14336
    linears, small = 2 * d * (q + k) + 3 * d * f, 2 * d
    # of every output of q, k, v, gate and up a half; of those behind attention and MLP all
    rows = (q + 2 * k + 2 * f) // 2 + 2 * d if precision == "int8" else 0
    layer = matrices * linears / 2 + 4 * rows + 2 * small
    planned = per_gpu("llama-3-8b", "ddp", 2, tensor=2, precision=precision)
    assert part(planned, "base weights") == int(32 * layer + 2 * d)


def test_replicas_of_hsdp_are_groups_of_fewer_shards() -> None:
    eight = per_gpu("llama-3-70b", "fsdp", 8)
    hybrid = per_gpu("llama-3-70b", "fsdp", 64, replicas=8)
    assert hybrid.total == eight.total
    assert per_gpu("llama-3-70b", "fsdp", 64).total < eight.total


def test_what_stays_gathered_between_passes() -> None:
    """All of the base, in one rank's memory for the step, beside its shard."""
    whole, kept = (
        per_gpu("llama-3-8b", "ddp", 8),
        per_gpu("llama-3-8b", "fsdp", 8, reshard_after_forward=False),
    )
    base = part(whole, "base weights") + part(whole, "vocabulary")
    assert part(kept, "gathered") == base


@pytest.mark.parametrize("keep", [False, True])
def test_a_share_is_not_there_twice_on_a_cpu(keep: bool) -> None:
    """Of what is gathered the other seven eighths, and a layer that arrives."""
    ddp = per_gpu("llama-3-8b", "ddp", 8, device="cpu")
    fsdp = per_gpu("llama-3-8b", "fsdp", 8, device="cpu", reshard_after_forward=not keep)
    layer = (part(ddp, "base weights") - 2 * 4096) // 32  # without the final norm
    rest = part(ddp, "vocabulary") + 2 * 4096
    whole = (32 if keep else 1) * layer + rest
    assert part(fsdp, "gathered") == whole * 7 // 8 + layer
    assert part(fsdp, "allocator") == part(ddp, "allocator")


def test_offloaded_shards_are_in_the_memory_of_the_cpu() -> None:
    kept, offloaded = (per_gpu("llama-3-8b", "fsdp", 8, offload=o) for o in (False, True))
    assert kept.total - offloaded.total >= part(kept, "base weights")
    assert part(offloaded, "base weights") == 0
    at_home = per_gpu("llama-3-8b", "fsdp", 8, offload=True, device="cpu")
    assert part(at_home, "base weights") == part(kept, "base weights")


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_moments_are_divided_by_data_ranks_where_that_is_asked(backend: str) -> None:
    whole, cut = (
        per_gpu("llama-3-8b", backend, 8, tensor=2, shard_optimizer=s) for s in (False, True)
    )
    assert part(cut, "optimizer") == part(whole, "optimizer") // 4
    assert part(cut, "adapter") == part(whole, "adapter")


def test_experts_lie_in_one_tensor_and_beyond_their_number_nothing_is_saved() -> None:
    """FSDP2 cuts along the first dimension, which is the experts'."""
    eight, many = (part(per_gpu("mixtral-8x7b", "fsdp", n), "base weights") for n in (8, 64))
    shape = read_model_shape(KNOWN_CONFIGS["mixtral-8x7b"])
    experts = 2 * 32 * shape.layer_experts // 8
    assert many > experts
    assert (many - experts) / (eight - experts) == pytest.approx(1 / 8, rel=0.01)


def test_pipeline_stages_hold_what_is_in_flight() -> None:
    """1F1B: the first of four stages holds four micro-batches of a quarter of the layers: as much
    as one GPU of all layers.
    """
    one = per_gpu("llama-3-8b", "single", 1)
    full = per_gpu("llama-3-8b", "megatron", 4, pipeline=4, accumulation=8)
    lone = per_gpu("llama-3-8b", "megatron", 4, pipeline=4, accumulation=1)
    assert part(full, "activations") == pytest.approx(part(one, "activations"), rel=1e-3)
    assert part(lone, "activations") == pytest.approx(part(one, "activations") / 4, rel=1e-3)
    assert part(full, "base weights") == pytest.approx(part(one, "base weights") / 4, rel=1e-3)
    assert pipeline_slowdown(ParallelSplit(pipeline=4), 8) == pytest.approx(11 / 8)


def test_experts_are_divided_by_their_own_groups() -> None:
    none = part(per_gpu("mixtral-8x7b", "megatron", 8), "base weights")
    eight = part(per_gpu("mixtral-8x7b", "megatron", 8, expert=8), "base weights")
    shape = read_model_shape(KNOWN_CONFIGS["mixtral-8x7b"])
    experts = 2 * 32 * shape.layer_experts
    assert none - eight == pytest.approx(experts * 7 / 8, rel=1e-4)


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 7])
def test_every_layer_lies_on_some_stage(pipeline: int) -> None:
    """Uneven stages: the fullest holds ceil(layers / stages) of them, give or take none."""
    shape = read_model_shape(KNOWN_CONFIGS["llama-3-8b"])
    one = part(per_gpu("llama-3-8b", "single", 1), "base weights")
    most = part(per_gpu("llama-3-8b", "megatron", pipeline, pipeline=pipeline), "base weights")
    layers = shape.geometry.layers
    assert most >= one / pipeline * 0.99
    assert most <= one * -(-layers // pipeline) / layers * 1.01
