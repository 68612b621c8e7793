"""Plans of base weights that train: counted values are those that a run trains, and bytes those that one
holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorry.adapters.base_weights import make_weights_trainable
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.config import PlanSettings, parse_settings
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.families import find_family
from lorry.models.decoder.model import Decoder
from lorry.plan.adapters import plan_adapter
from lorry.plan.configs import find_config
from lorry.plan.full.weights import plan_weights
from lorry.plan.memory import MemorySetup, estimate_memory
from lorry.plan.shapes import read_model_shape
from lorry.processor import AttentionKernel
from lorry.verbs.planning.build import build_plan
from tests.support import tiny

CONFIGS = {
    name: tiny.fresh(name).config.to_dict() for name in ("llama", "gpt2", "gpt_neox parallel")
}
SMOLLM2 = 134_515_008  # transformers' count


def decoder_of(config: dict[str, Any], dtype: torch.dtype) -> Decoder:
    family = find_family(config["model_type"])
    assert family is not None
    model = Decoder(family, config).to(dtype)
    if model.geometry.tied:
        model.tie()
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("trainable", ["all", "mlp", "attention", ["head"], ["embed"]])
def test_as_many_values_as_a_run_trains(name: str, trainable: Any) -> None:
    shape = read_model_shape(CONFIGS[name])
    if isinstance(trainable, list):
        trainable = [(shape.head if trainable == ["head"] else shape.embed).rpartition(".")[2]]
    trained = make_weights_trainable(decoder_of(CONFIGS[name], torch.float32), trainable)
    planned = plan_weights(shape, trainable)
    assert planned.parameters == trained.num_parameters()
    names = {name.removesuffix(".weight") for name in trained.params}
    ends = {shape.head, shape.embed} if shape.geometry.tied else {shape.head}
    assert planned.adapts_head() == bool(names & ends)


def planned(*words: str) -> dict[str, Any]:
    settings = parse_settings(
        PlanSettings, ["smollm2-135m", "lora=null", "device=cpu", "max_length=256", *words], print
    )
    return build_plan(settings, find_config("smollm2-135m")).as_json()


@pytest.mark.parametrize(("dtype", "beside"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_bytes_are_those_that_a_backend_holds(dtype: torch.dtype, beside: int) -> None:
    """Values, gradients and moments, by tensor; an fp32 weight is its own master."""
    model = decoder_of(CONFIGS["llama"], dtype)
    values = make_weights_trainable(model, "all").num_parameters()
    backend = LocalBackend(model, ["base"], OptimSettings())
    owner, moments = backend.owners["base"], backend.optimizers["base"].moments()
    weights = {p.data_ptr() for p in model.parameters()}
    is_own = owner.values.data_ptr() in weights
    held = owner.grads.nbytes + (0 if is_own else owner.values.nbytes)
    # every tensor begins at a multiple of 64 bytes
    slack = 64 * len(list(model.parameters()))
    assert beside * values <= held <= beside * values + 2 * slack
    assert 8 * values <= sum(m.nbytes for m in moments) <= 8 * values + 2 * slack
    name = str(dtype).removeprefix("torch.")
    plan = planned(f"dtype={name}")["memory"]
    assert (plan["masters"], plan["optimizer"]) == (beside * SMOLLM2, 8 * SMOLLM2)


def test_processes_divide_what_fsdp_cuts() -> None:
    """Eighteen bytes a value in bf16, nine on each of two; HSDP divides by its shards alone; ddp holds
    all of it, but for moments that ranks share."""
    several = ("dtype=bfloat16", "processes=4", "keep_total=true")
    for words, shards, moments in (
        (("backend=fsdp",), 4, 4),
        (("backend=fsdp", "replicas=2"), 2, 2),
        (("backend=ddp",), 1, 1),
        (("backend=ddp", "shard_optimizer=true"), 1, 4),
        (("backend=fsdp", "shard_optimizer=true"), 4, 4),
    ):
        plan = planned(*several, *words)
        memory = plan["memory"]
        assert memory["masters"] == pytest.approx(8 * SMOLLM2 / shards, rel=1e-6), words
        assert memory["optimizer"] == pytest.approx(8 * SMOLLM2 / moments, rel=1e-6), words
        assert ("passing gradients" in memory) == (shards > 1)
        sent = {c["what"]: c for c in plan["collectives"]}
        if shards == 1:
            assert sent["base weights' gradients"]["bytes"] == 4 * SMOLLM2
            continue
        each = ("a layer's gradients", "gradients of embedding and head")
        whole = sum(sent[what]["bytes"] * sent[what]["calls"] for what in each)
        assert whole == 4 * SMOLLM2
        replicas = [f"{what}, between replicas" in sent for what in each]
        assert replicas == [("replicas=2" in words)] * 2


def test_a_step_has_their_gradients_products_besides() -> None:
    """6 FLOPs for each weight of a matrix and token, where a frozen base has 4."""
    flops = planned("dtype=bfloat16")["flops_per_token"]
    assert flops["adapter"] == 2 * (SMOLLM2 - 61 * 576)  # all but the norms


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"trainable=\['q_prj'\] matches no weight; there are"):
        planned("trainable=[q_prj]")
    with pytest.raises(ConfigError, match=r"lora=null with backend\.tensor_parallel=3"):
        planned("backend=ddp", "processes=3", "tensor_parallel=3")


def test_the_allocator_has_fewer_gaps_without_tiles() -> None:
    """Peaks of three steps of a model of `size` layers (width 512, MLP 1,792, 8 heads of 2 groups, 8,192
    tokens; bfloat16, Xeon without AMX), and what was resident when all was imported: the plan bounds
    them, and with the gaps of a processor with tiles is half as much again."""
    config = {
        **CONFIGS["llama"], "hidden_size": 512, "intermediate_size": 1792, "vocab_size": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    for size, tokens, peak in ((6, 2048, 877), (6, 4096, 1056), (12, 4096, 1582)):
        shape = read_model_shape({**config, "num_hidden_layers": size})
        adapter = plan_adapter(shape, LoraConfig(target_modules="all-linear"), 16)
        ways: tuple[AttentionKernel, AttentionKernel] = ("none", "tiles")
        fewer, many = (
            estimate_memory(
                shape,
                adapter,
                MemorySetup(tokens=tokens, length=512, attention=attention, whole=True),
            )
            for attention in ways
        )
        assert peak < fewer.total / 2**20 < 1.25 * peak
        gaps = (
            {c.name: c.bytes for c in fewer.components}["allocator"],
            {c.name: c.bytes for c in many.components}["allocator"],
        )
        assert gaps[0] < 0.75 * gaps[1]
