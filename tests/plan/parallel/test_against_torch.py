"""What the plan counts of FSDP2 and tensor parallel against torch's own tensors: shards that
`fully_shard` makes of transformers' models, what its gathers are asked for, and slices cut by hand.
float32 and bfloat16 bases; a process group that computes nothing stands in for the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.adapters.attach import attach
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.backends.distributed.passes import PassSchedule
from lorry.backends.distributed.sharded import ShardedWeights
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.config.schema.lora import LoraConfig
from lorry.plan.adapters import plan_adapter
from lorry.plan.memory import MemorySetup
from lorry.plan.parallel.communication import adapter_sizes, step_collectives
from lorry.plan.parallel.per_rank import (
    local_adapter,
    local_shape,
    sharded_base_bytes,
    whole_side_values,
)
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.shapes import read_model_shape
from tests.support.seam import tiny_llama

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 30}
LLAMA = {
    "model_type": "llama",
    **SIZES,
    "intermediate_size": 44,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 6},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 30,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        **SIZES,
        "intermediate_size": 44,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "head_dim": 6,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
SETUPS = {
    "float32": MemorySetup(tokens=8, length=8, precision="float32"),
    "bfloat16": MemorySetup(tokens=8, length=8, precision="bfloat16"),
}


def model_of(name: str, precision: str) -> nn.Module:
    config = dict(CONFIGS[name])
    made = CONFIG_MAPPING[config.pop("model_type")](**config)
    return AutoModelForCausalLM.from_config(made).to(getattr(torch, precision))


def layers_of(model: nn.Module) -> nn.ModuleList:
    body = getattr(model, model.base_model_prefix)
    layers = body.h if hasattr(body, "h") else body.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@contextmanager
def ranks(size: int) -> Iterator[None]:
    """A group of so many ranks, of which this process is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shard_is_what_fully_shard_leaves_of_the_base(name: str, precision: str) -> None:
    shape = read_model_shape(CONFIGS[name])
    for shards in (2, 3, 8):
        with ranks(shards):
            model = model_of(name, precision)
            for layer in layers_of(model):
                fully_shard(layer)
            fully_shard(model)
            held = sum(
                p._local_tensor.untyped_storage().nbytes()  # type: ignore[attr-defined]
                for p in model.parameters()
            )
        assert sharded_base_bytes(shape, SETUPS[precision], shards) == held


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "qwen3_moe"])
def test_bytes_of_a_gather_are_those_that_fully_shard_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer and of all the rest; how often, a run on two processes shows."""
    shards, gathered = 3, set[int]()
    gather = dist.all_gather_single

    def counted(output: torch.Tensor, given: torch.Tensor, *more: Any, **rest: Any) -> Any:
        gathered.add(output.nbytes)
        return gather(output, given, *more, **rest)

    monkeypatch.setattr(dist, "all_gather_single", counted)
    with ranks(shards):
        model = model_of(name, "float32")
        for layer in layers_of(model):
            fully_shard(layer)
        whole = fully_shard(model)
        for group in (*layers_of(model), whole):
            group.unshard()
    shape = read_model_shape(CONFIGS[name])
    adapter = plan_adapter(shape, LoraConfig(r=2), 2)
    split = ParallelSplit(backend="fsdp", processes=shards)
    found = step_collectives(shape, adapter, SETUPS["float32"], split, 1)
    assert {c.bytes for c in found if c.kind == "all-gather"} == gathered


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("lowest", [0, 1, 2, 3])
def test_bytes_of_gathers_are_those_that_passes_ask_for(
    lowest: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches over a base in float32 with something that trains from layer ``lowest`` on (3:
    behind the last), counted where torch sends them.
    """
    shards, sent = 3, list[int]()
    gather = dist.all_gather_single

    def counted(output: torch.Tensor, given: torch.Tensor, *more: Any, **rest: Any) -> Any:
        sent.append(output.nbytes * (shards - 1) // shards)
        return gather(output, given, *more, **rest)

    monkeypatch.setattr(dist, "all_gather_single", counted)
    with ranks(shards):
        schedule = PassSchedule(lambda what, value: [value])
        model = model_of("llama", "float32").requires_grad_(False)
        weights = ShardedWeights(
            model,
            list(layers_of(model)),
            init_device_mesh("cpu", (shards,), mesh_dim_names=("shard",)),
            schedule,
            lambda what: nullcontext(),
            reshard_after_forward=reshard,
        )
        weights.lowest_trained = lowest
        with schedule.together():
            for _ in range(2):
                weights.walk_along("forward")
                weights.walk_along("backward")
    shape = read_model_shape(LLAMA)
    lora = (
        LoraConfig(r=2, target_modules=["lm_head"])
        if lowest == 3
        else LoraConfig(r=2, layers_to_transform=list(range(lowest, 3)))
    )
    adapter = plan_adapter(shape, lora, 2)
    split = ParallelSplit(backend="fsdp", processes=shards, reshard_after_forward=reshard)
    planned = [
        c.sent
        for c in step_collectives(shape, adapter, SETUPS["float32"], split, 2)
        if c.kind == "all-gather"
    ]
    assert sum(planned) == sum(sent)


# Which dimension tensor parallel cuts, by the end of Hugging Face's names; written out, not derived.
CUT = {
    "llama": {
        0: ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
            "up_proj.weight", "embed_tokens.weight", "lm_head.weight"),
        1: ("o_proj.weight", "down_proj.weight"),
    },
    "gpt2": {  # Conv1D: transposed
        0: ("wte.weight", "c_attn.bias", "c_fc.bias", "attn.c_proj.weight", "mlp.c_proj.weight"),
        1: ("c_attn.weight", "c_fc.weight"),
    },
    "gpt_neox": {
        0: ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight",
            "dense_h_to_4h.bias", "embed_in.weight", "lm_head.weight"),
        1: ("attention.dense.weight", "dense_4h_to_h.weight"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_rank_of_tensor_parallel_holds_its_slices_and_what_is_not_cut(name: str) -> None:
    model, held = model_of(name, "float32"), 0
    for path, tensor in model.named_parameters():
        cut = next((d for d, ends in CUT[name].items() if path.endswith(ends)), None)
        held += tensor.numel() if cut is None else tensor.tensor_split(2, cut)[0].numel()
    assert local_shape(read_model_shape(CONFIGS[name]), 2).parameters == held


def test_a_rank_holds_one_side_of_an_adapter_whole_and_a_slice_of_the_other() -> None:
    shape = read_model_shape(LLAMA)
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj", "lm_head", "embed"])
    adapter = plan_adapter(shape, lora, 2)
    d, f, vocab, layers = 24, 44, 30, 3
    whole_sides = layers * (d + d + d) + d + d  # A of q and of the head; B of o, down, embedding
    slices = layers * (d + d + f) + vocab + vocab
    assert whole_side_values(adapter) == 2 * whole_sides
    assert local_adapter(adapter, 2).parameters == 2 * (whole_sides + slices // 2)


def test_files_of_an_adapter_have_the_planned_sizes(tmp_path: Path) -> None:
    """What is saved over a bfloat16 base, and what a checkpoint of it keeps."""
    model = tiny_llama().to(torch.bfloat16)
    attach(model, LoraSpec(r=2))
    config = model.config
    adapter = plan_adapter(read_model_shape(config), LoraConfig(r=2), 2)
    sizes = adapter_sizes(adapter, SETUPS["bfloat16"])
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in saved.values()) == sizes.file
    backend = LocalBackend(model, ["default"], OptimSettings())
    state = {n: t for n, t in backend.state().items() if not n.startswith(("rng", "adam_count"))}
    assert sum(tensor.nbytes for tensor in state.values()) == sizes.checkpoint
