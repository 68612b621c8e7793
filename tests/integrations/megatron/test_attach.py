"""Which of Megatron's linears get an adapter, what their parameters are, and what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, _get_param_groups
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import Float16Module
from torch import nn

from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ContractError
from lorry.integrations.megatron import (
    add_lora_arguments,
    apply_lora_to_megatron_model,
    attach_lora,
    disable_lora,
    get_lora_parameters,
    loraplus_overrides,
)
from tests.support.megatron_gradients import LENGTH, Case, batch, build

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what Megatron says of absent packages
]
PLACES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def model_of(models: Path, **changes: Any) -> nn.Module:
    settings = {k: changes.pop(k) for k in list(changes) if k in ("te", "dtype", "recompute")}
    return build(Case(str(models / "llama"), "", **{"dtype": "float32", **settings}), **changes)[0]


def args_of(*words: str) -> argparse.Namespace:
    return add_lora_arguments(argparse.ArgumentParser()).parse_args(["--use-lora", *words])


def lora_names(model: nn.Module, layer: int = 0) -> set[str]:
    start = f"decoder.layers.{layer}."
    return {
        n.removeprefix(start)
        for n, p in model.named_parameters()
        if p.requires_grad and n.startswith(start)
    }


def logits(model: nn.Module) -> torch.Tensor:
    tokens = batch(27)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
    result: torch.Tensor = model(tokens, torch.arange(LENGTH).expand(tokens.shape), mask)
    return result


def test_canonical_parameters_are_those_of_each_projection(models: Path) -> None:
    model = model_of(models)
    before = set(model.state_dict())
    assert apply_lora_to_megatron_model(model, args_of()) is model
    names = {f"{PLACES[0]}.lora_{s}_{p}" for s in "AB" for p in "qkv"}
    names |= {f"{PLACES[2]}.lora_{s}_{p}" for s in "AB" for p in ("gate", "up")}
    names |= {f"{place}.lora_{s}" for s in "AB" for place in (PLACES[1], PLACES[3])}
    assert lora_names(model) == names
    assert {n for n in model.state_dict() if ".lora_" not in n} == before
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained)
    assert len(get_lora_parameters(model)) == len(trained) == 2 * len(names)


def test_a_spec_does_as_the_flags_do(models: Path) -> None:
    named = apply_lora_to_megatron_model(model_of(models), args_of("--lora-r", "4"))
    given = apply_lora_to_megatron_model(model_of(models), LoraSpec(r=4, lora_alpha=16))
    both = zip(get_lora_parameters(named), get_lora_parameters(given), strict=True)
    assert all(torch.equal(one, other) for one, other in both)
    assert lora_names(named) == lora_names(given)


def test_what_is_no_megatron_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear is no Megatron-core GPTModel"):
        attach_lora(nn.Linear(2, 2), LoraSpec())


def test_fused_parameters_are_those_of_each_matrix(models: Path) -> None:
    model = apply_lora_to_megatron_model(model_of(models), args_of("--lora-mode", "fused"))
    assert lora_names(model) == {f"{place}.lora_{s}" for s in "AB" for place in PLACES}


@pytest.mark.parametrize(
    ("targets", "suffixes"),
    [
        (["linear_qkv"], {"qkv.lora_A_q", "qkv.lora_A_k", "qkv.lora_A_v"}),
        (["v_proj", "linear_fc2"], {"qkv.lora_A_v", "fc2.lora_A"}),
        (["all-linear"], None),
    ],
)
def test_targets_by_either_name(
    models: Path, targets: list[str], suffixes: set[str] | None
) -> None:
    model = apply_lora_to_megatron_model(
        model_of(models), args_of("--lora-target-modules", *targets)
    )
    found = {n.partition("linear_")[2] for n in lora_names(model) if "lora_A" in n}
    assert len(found) == 7 if suffixes is None else found == suffixes


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["linear_kqv"], "which no layer has; choose from all-linear, linear_qkv"),
        (["output_layer"], "the output head"),
        (["embedding.word_embeddings"], "the embedding"),
        (["mlp.experts.linear_fc1"], "experts"),
        (["q_proj", "lm_head"], "the output head"),
        (["model.layers.7.mlp.down_proj"], "matches no layer"),
    ],
)
def test_a_name_of_no_layer_is_refused(models: Path, targets: list[str], words: str) -> None:
    model = model_of(models)
    with pytest.raises(ConfigError, match=words):
        apply_lora_to_megatron_model(model, args_of("--lora-target-modules", *targets))
    assert not any(".lora_" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_moe_experts", 4),
        ("multi_latent_attention", True),
        ("mtp_num_layers", 1),
        ("gated_linear_unit", False),
        ("delay_wgrad_compute", True),
        ("defer_embedding_wgrad_compute", True),
        ("tp_comm_overlap", True),
        ("cuda_graph_impl", "local"),
        ("use_transformer_engine_op_fuser", True),
        ("attention_output_gate", True),
        ("cpu_offloading", True),
    ],
)
def test_a_setting_that_would_be_wrong_is_refused_by_name(
    models: Path, setting: str, value: Any
) -> None:
    model = model_of(models)
    setattr(model.config, setting, value)
    with pytest.raises(ConfigError, match=setting):
        attach_lora(model, LoraSpec())


@pytest.mark.parametrize(
    ("spec", "mode", "words"),
    [
        (LoraSpec(r=33), "canonical", "lora_r is 33 at .*k_proj|adds nothing"),
        (LoraSpec(target_modules=("q_proj",)), "fused", "only .*q_proj are targets"),
        (LoraSpec(rank_pattern={"up_proj": 2}), "fused", "tell its projections apart"),
        (LoraSpec(rank_pattern={"nothing": 2}), "canonical", "rank_pattern names"),
        (LoraSpec(), "merged", "canonical, fused"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(
    models: Path, spec: LoraSpec, mode: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        attach_lora(model_of(models), spec, mode=mode)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


class TorchFullyShardedDataParallel(nn.Module):
    """Of Megatron's name: it leaves no mark on parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def ddp_inside(model: nn.Module) -> nn.Module:
    return ddp(model).get_submodule("module")


def adapted(model: nn.Module) -> nn.Module:
    return attach_lora(model, LoraSpec())


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (ddp, "would never train"),
        (ddp_inside, "would never train"),
        (TorchFullyShardedDataParallel, "wrapped by TorchFullyShardedDataParallel"),
        (adapted, "already"),
    ],
)
def test_too_late_is_refused(
    models: Path, wrap: Callable[[nn.Module], nn.Module], words: str
) -> None:
    wrapped = wrap(model_of(models))
    with pytest.raises(ConfigError, match=words):
        attach_lora(wrapped, LoraSpec())


def test_an_optimizer_that_has_the_model_is_found(models: Path) -> None:
    model = model_of(models)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="AdamW already has"):
        attach_lora(model, LoraSpec())
    del optimizer
    attach_lora(model, LoraSpec())


def test_another_version_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.__version__", "0.19.2")
    with pytest.warns(UserWarning, match=r"megatron-core 0\.19\.2 was never run .* 0\.16"):
        attach_lora(model_of(models), LoraSpec())


def test_masters_stay_fp32_in_a_model_of_half_precision(models: Path) -> None:
    model = attach_lora(model_of(models), LoraSpec(init_lora_weights=False))
    before = [p.detach().clone() for p in get_lora_parameters(model)]
    model.config.bf16 = True
    half = Float16Module(model.config, model)
    assert {p.dtype for n, p in half.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    for value, parameter in zip(before, get_lora_parameters([half]), strict=True):
        assert torch.equal(parameter, value)
    # and what is computed with them is the model's dtype
    logits(half).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in get_lora_parameters(half)
    )


def test_a_model_in_half_precision_may_get_adapters_too(models: Path) -> None:
    model = model_of(models)
    model.config.bf16 = True
    half = attach_lora(Float16Module(model.config, model), LoraSpec())
    assert {p.dtype for p in get_lora_parameters(half)} == {torch.float32}


def test_marks_say_what_is_cut(models: Path) -> None:
    model = attach_lora(model_of(models), LoraSpec())
    cut = {"A": {PLACES[1]: 1, PLACES[3]: 1}, "B": {PLACES[0]: 0, PLACES[2]: 0}}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        place = name.split(".", 3)[3].rpartition(".")[0]
        dim = cut[name.partition(".lora_")[2][0]].get(place, -1)
        marked: Any = parameter
        assert (marked.tensor_model_parallel, marked.partition_dim) == (dim >= 0, dim)
        assert marked.partition_stride == 1


def test_a_reference_is_the_base_and_never_trains(models: Path) -> None:
    model = model_of(models)
    with torch.no_grad():
        base = logits(model)
    attach_lora(model, LoraSpec(init_lora_weights=False))
    with torch.no_grad():
        assert not torch.equal(logits(model), base)
        with disable_lora(model):
            assert torch.equal(logits(model), base)
            with disable_lora(model):
                pass
            assert torch.equal(logits(model), base)
        assert not torch.equal(logits(model), base)
    with disable_lora(model), pytest.raises(ContractError, match="no_grad"):
        logits(model)


def test_dropout_is_refused_where_recompute_would_draw_others(models: Path) -> None:
    with pytest.raises(ConfigError, match="recompute_granularity='full'"):
        attach_lora(model_of(models, recompute=True), LoraSpec(lora_dropout=0.1))
    model = model_of(models, recompute_granularity="selective", recompute_modules=["core_attn"])
    attach_lora(model, LoraSpec(lora_dropout=0.1))


def test_dropout_has_its_rate_and_no_effect_in_evaluation(models: Path) -> None:
    model = attach_lora(model_of(models), LoraSpec(lora_dropout=0.25, init_lora_weights=False))
    linear: Any = model.get_submodule("decoder.layers.0.mlp.linear_fc2")
    x = torch.ones(64, 2, 48)
    model.train()
    dropped = linear._drop(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    model.eval()
    assert torch.equal(linear._drop(x), x)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))  # another micro-batch


def test_lora_plus_gives_every_b_its_rate(models: Path) -> None:
    model = attach_lora(model_of(models), LoraSpec())
    config = OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4)
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)  # type: ignore[assignment]
    groups = _get_param_groups([model], config, loraplus_overrides(config, 16.0))
    rates = {id(p): (g["max_lr"], g["min_lr"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = 16 if ".lora_B" in name else 1
            assert rates[id(parameter)] == pytest.approx((ratio * 1e-3, ratio * 1e-4))
    with pytest.raises(ConfigError, match="above 0"):
        loraplus_overrides(config, 0)


def test_linears_of_other_classes_are_refused(models: Path) -> None:
    model = model_of(models)
    linear = model.get_submodule("decoder.layers.1.mlp.linear_fc1")
    linear.__class__ = type("GatheringLinear", (ColumnParallelLinear,), {})
    with pytest.raises(ConfigError, match=r"layer 1's .* is a GatheringLinear"):
        attach_lora(model, LoraSpec())
    linear.__class__ = ColumnParallelLinear
    linear.gather_output = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="gather_output=True"):
        attach_lora(model, LoraSpec())


def test_a_refusal_leaves_the_model_as_it_was(models: Path) -> None:
    model = model_of(models)
    model.get_submodule("decoder.layers.1.mlp.linear_fc1").gather_output = True  # type: ignore[assignment]
    with pytest.raises(ConfigError):
        attach_lora(model, LoraSpec())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(".lora_" in n for n, _ in model.named_parameters())
