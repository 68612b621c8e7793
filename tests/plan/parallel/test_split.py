"""Splits that a model or a backend cannot have, and what is said of them; no tensor is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorry.errors import ConfigError
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.parallel.split import ParallelSplit, check_split, check_tensor_parallel
from lorry.plan.shapes import ModelShape, read_model_shape


def shape_of(model: str) -> ModelShape:
    return read_model_shape(KNOWN_CONFIGS[model])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"processes": 2}, "backend.processes=2 needs backend=ddp, fsdp or megatron"),
        ({"tensor": 2}, "backend.tensor_parallel=2 needs backend=ddp, fsdp or megatron"),
        (
            {"backend": "fsdp", "processes": 4, "pipeline": 2},
            "backend.pipeline_parallel=2 needs backend=megatron",
        ),
        (
            {"backend": "megatron", "processes": 6, "tensor": 4},
            "backend.processes=6 is not a multiple",
        ),
        (
            {"backend": "megatron", "processes": 3, "tensor": 3},
            "backend.tensor_parallel=3 does not divide 32 heads, 8 KV heads and 14336 MLP columns; "
            "2, 4 and 8 do",
        ),
        (
            {"backend": "megatron", "processes": 33, "pipeline": 33},
            "backend.pipeline_parallel=33 is more than the 32 layers",
        ),
        (
            {"backend": "megatron", "processes": 2, "expert": 2},
            "backend.expert_parallel=2 does not divide the 0 experts",
        ),
        (
            {"backend": "fsdp", "processes": 8, "replicas": 3},
            "backend.replicas=3 does not divide the 8 data-parallel ranks",
        ),
        (
            {"backend": "fsdp", "processes": 8, "tensor": 2, "replicas": 8},
            "backend.replicas=8 does not divide the 4 data-parallel ranks",
        ),
        (
            {"backend": "ddp", "processes": 8, "replicas": 2},
            "backend.replicas=2 needs backend=fsdp",
        ),
        (
            {"backend": "ddp", "processes": 8, "reshard_after_forward": False},
            "backend.reshard_after_forward=false needs backend=fsdp",
        ),
        ({"backend": "ddp", "processes": 8, "offload": True}, "offload=cpu needs backend=fsdp"),
        (
            {"backend": "fsdp", "processes": 8, "sequence": True},
            "backend.sequence_parallel=true needs backend.tensor_parallel above 1",
        ),
        ({"shard_optimizer": True}, "backend.shard_optimizer=true needs backend=ddp or fsdp"),
    ],
)
def test_splits_that_cannot_be(split: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_split(ParallelSplit(**split), shape_of("llama-3-8b"))


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (
            "smollm2-135m",
            2,
            "backend.tensor_parallel=2 does not divide 9 heads and 3 KV heads; 3 does",
        ),
        (
            "llama-3-405b",
            16,
            "backend.tensor_parallel=16 does not divide 8 KV heads; 2, 4 and 8 do",
        ),
        (
            "gpt2",
            5,
            "backend.tensor_parallel=5 does not divide 12 heads, 12 KV heads and 3072 MLP columns; "
            "2, 3, 4, 6 and 12 do",
        ),
    ],
)
def test_the_error_names_what_does_not_divide_and_the_sizes_that_fit(
    model: str, size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_tensor_parallel(shape_of(model).geometry, size)
    assert str(error.value) == message


def test_megatron_shares_rows_of_the_vocabulary_alike() -> None:
    geometry = shape_of("gpt2").geometry
    check_tensor_parallel(geometry, 2)
    with pytest.raises(ConfigError, match="50257 vocabulary rows; no size above 1 does"):
        check_tensor_parallel(geometry, 2, even_vocabulary=True)


def test_the_sizes_that_are_named_are_those_that_pass() -> None:
    geometry = replace(
        shape_of("llama-3-8b").geometry, heads=24, kv_heads=12, mlp_width=96, vocab=601
    )
    fitting = {2, 3, 4, 6, 12}
    for size in fitting:
        check_tensor_parallel(geometry, size)
    for size in set(range(2, 100)) - fitting:
        with pytest.raises(ConfigError, match=r"; 2, 3, 4, 6 and 12 do$"):
            check_tensor_parallel(geometry, size)


def test_a_model_that_runs_through_transformers_has_no_tensor_parallel_of_ours() -> None:
    split = ParallelSplit(backend="fsdp", processes=8, tensor=2)
    told = r"no family for model_type 'mixtral'; leave it out$"
    with pytest.raises(ConfigError, match=told):
        check_split(split, shape_of("mixtral-8x7b"))
    check_split(replace(split, tensor=1), shape_of("mixtral-8x7b"))
    check_split(replace(split, backend="megatron"), shape_of("mixtral-8x7b"))


def test_ranks_of_a_split() -> None:
    hybrid = ParallelSplit(backend="fsdp", processes=32, tensor=2, replicas=4)
    assert (hybrid.data, hybrid.shards) == (16, 4)
    assert ParallelSplit(backend="ddp", processes=8).shards == 1
