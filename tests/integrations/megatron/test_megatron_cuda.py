"""What needs a GPU: Transformer Engine's own linears, Float16Module with the distributed optimizer.
NOT RUN so far: no machine of this project has a GPU. All else of Megatron runs on CPUs, by
`tests/support/cuda_shim.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from torch.nn import functional

from lorry.integrations.megatron import get_lora_parameters, load_hf_weights, load_lora
from tests.support.megatron_gradients import (
    LENGTH,
    Case,
    batch,
    build,
    config_of,
    parallel,
    read_config,
)


@pytest.fixture(autouse=True)
def one_gpu() -> Iterator[None]:
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with parallel(Case("", "")):
            yield
    finally:
        torch.distributed.destroy_process_group()


def adapted(models: Path, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    load_hf_weights(model, models / "llama")
    load_lora(model, models / "llama-canonical")
    return model.cuda().to(dtype)


def loss_of(model: Any) -> Tensor:
    tokens = batch(27).cuda()
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, device="cuda"), 1).bool()
    positions = torch.arange(LENGTH, device="cuda").expand(tokens.shape)
    logits = model(tokens, positions, mask)[..., :27].float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_transformer_engines_linears_have_the_gradients_of_megatrons_own(models: Path) -> None:
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    case = Case(str(models / "llama"), "", dtype="float32")
    hf = read_config(case.model)
    own = adapted(models, build(case)[0], torch.float32)
    with_engine = GPTModel(
        config_of(hf, case),
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=28,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    other = adapted(models, with_engine, torch.float32)
    for model in (own, other):
        loss_of(model).backward()
    pairs = zip(get_lora_parameters(own), get_lora_parameters(other), strict=True)
    for true, got in pairs:
        assert true.grad is not None
        assert got.grad is not None
        # Transformer Engine may compute in TF32
        assert float((got.grad - true.grad).norm() / true.grad.norm()) < 1e-2


def test_the_distributed_optimizer_moves_fp32_adapters_alone(models: Path) -> None:
    case = Case(str(models / "llama"), "", dtype="bfloat16")
    model = adapted(models, build(case)[0], torch.bfloat16)
    config: Any = model.config
    config.bf16 = True
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = DistributedDataParallel(config, settings, Float16Module(config, model))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=1.0,
        ),
        [wrapped],
    )
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    wrapped.zero_grad_buffer()
    loss_of(wrapped).backward()
    wrapped.finish_grad_sync()
    ok, norm, _ = optimizer.step()
    assert ok
    assert norm > 0
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
