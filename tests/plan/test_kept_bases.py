"""What the plan says a layer keeps is what autograd is given to keep; and the engine's constants
are the plan's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import attach
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import lora_spec_of
from lorry.config.schema.lora import LoraConfig
from lorry.families import find_family
from lorry.kernels import attention as kernel
from lorry.kernels.build import kernel_status
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.scoring import score, tiles
from lorry.plan import constants
from lorry.plan.adapters import plan_adapter
from lorry.plan.memory import MemorySetup, PrecisionName, saved_bytes_per_token
from lorry.plan.shapes import read_model_shape
from tests.support.tiny import VARIANTS

T, RANK = 128, 4
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": T,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**VARIANTS["llama"], **WIDE},
    "qwen3": {**VARIANTS["qwen3"], **WIDE, "head_dim": 32},
    "gpt2": {**VARIANTS["gpt2"], "n_embd": 128, "n_head": 4, "n_layer": 3, "n_positions": T},
    "gpt_neox": {**VARIANTS["gpt_neox parallel"], **WIDE},
    "gpt_neox sequential": {**VARIANTS["gpt_neox sequential"], **WIDE},
}


def kept(
    config: dict[str, Any], precision: PrecisionName, lora: LoraConfig, recompute: bool
) -> int:
    """Bytes that autograd holds after the layers have run, without weights and without the last
    norm's input.
    """
    family = find_family(config["model_type"])
    assert family is not None
    model = Decoder(
        family, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **config}
    )
    model = model.to(getattr(torch, precision)).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    attach(model, lora_spec_of(lora))
    model.gradient_checkpointing = recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def remember(node: Any) -> None:
        """What a layer's node holds beside the tensors that autograd saves: the attention's own
        graph.
        """
        for tensor in getattr(node, "graph", ()):
            keep(tensor)
        for before, _ in () if node is None else node.next_functions:
            remember(before)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        last = model.hidden(
            PackedInput.of([[i % 29 for i in range(T)]]), AdapterContext(Mix.one("default"))
        ).last
    assert last is not None
    assert last.requires_grad
    remember(last.grad_fn)
    return (
        sum(t.untyped_storage().nbytes() for t in held.values())
        - last.numel() * last.element_size()
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_layers_keep(name: str, precision: PrecisionName) -> None:
    lora, shape = LoraConfig(r=RANK), read_model_shape(CONFIGS[name])
    setup = MemorySetup(
        tokens=T, length=T, precision=precision, attention=kernel_status().attention
    )
    planned = T * saved_bytes_per_token(shape, plan_adapter(shape, lora, RANK), setup, range(3))
    assert planned == pytest.approx(
        kept(CONFIGS[name], precision, lora, recompute=False), rel=0.005
    )


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    lora, shape = LoraConfig(r=RANK, layers_to_transform=[2]), read_model_shape(CONFIGS["llama"])
    adapter = plan_adapter(shape, lora, RANK)
    planned = T * saved_bytes_per_token(
        shape,
        adapter,
        MemorySetup(tokens=T, length=T, attention=kernel_status().attention),
        range(adapter.lowest, 3),
    )
    assert planned == pytest.approx(
        kept(CONFIGS["llama"], "bfloat16", lora, recompute=False), rel=0.005
    )


def test_recompute_keeps_the_layers_inputs() -> None:
    lora, shape = LoraConfig(r=RANK), read_model_shape(CONFIGS["llama"])
    setup = MemorySetup(tokens=T, length=T, recompute="full", attention=kernel_status().attention)
    planned = T * saved_bytes_per_token(shape, plan_adapter(shape, lora, RANK), setup, range(3))
    one = T * saved_bytes_per_token(
        shape,
        plan_adapter(shape, lora, RANK),
        MemorySetup(tokens=T, length=T, attention=kernel_status().attention),
        range(1),
    )
    assert planned - one == pytest.approx(
        kept(CONFIGS["llama"], "bfloat16", lora, recompute=True), rel=0.005
    )


def test_constants_are_the_engines() -> None:
    assert kernel.MAX_HEAD_DIM == constants.MAX_HEAD_DIM
    assert (tiles.GROUP_ROWS, tiles.TILE_ELEMENTS) == (constants.SCORE_GROUP, constants.SCORE_TILE)
    assert score.CHUNK_TOKENS == constants.SCORE_CHUNK
