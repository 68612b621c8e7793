"""What two processes run of `lorry.integrations.megatron` (`tests/integrations/megatron`), and how a
Megatron model of a Hugging Face config is built. megatron-core has to be installed.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.support.megatron_gradients FOLDER

reads FOLDER/cases.json, and for each case writes FOLDER/CASE-RANK.safetensors: the gradients of every
adapter's parameters, and the norm of all, as this rank has them after Megatron's own schedule, DistributedDataParallel and
`finalize_model_grads`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

warnings.filterwarnings("ignore")  # what Megatron says of packages that are absent

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.layers import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from lorry.integrations.megatron import attach as attaching  # noqa: E402
from lorry.integrations.megatron import linear as terms  # noqa: E402
from lorry.integrations.megatron import load_hf_weights, load_lora  # noqa: E402
from lorry.models.megatron.layout import RowOrder  # noqa: E402
from tests.support.cuda_shim import cuda_on_cpu  # noqa: E402

ROWS, LENGTH = 4, 8
NORM = "norm"


@dataclass(frozen=True)
class Case:
    """One training step. ``model``, ``adapter``: folders; ``fault``: what of ours is left out."""

    model: str
    adapter: str
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    sp: bool = False
    te: bool = False
    dtype: str = "float64"
    mode: str = "canonical"
    recompute: bool = False
    fault: str = ""


def config_of(hf: Mapping[str, Any], case: Case) -> TransformerConfig:
    """The TransformerConfig of a Hugging Face config.json."""
    heads = hf["num_attention_heads"]
    dtype = getattr(torch, case.dtype)
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn_hidden_size=hf["intermediate_size"],
        layernorm_epsilon=hf["rms_norm_eps"],
        qk_layernorm=hf["model_type"] == "qwen3",
        add_qkv_bias=hf["model_type"] == "qwen2",
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp,
        sequence_parallel=case.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        # interleaved chunks on two ranks: one message between the two at a time
        overlap_p2p_comm=case.vp is not None,
        batch_p2p_comm=case.vp is None,
        use_cpu_initialization=True,
        perform_initialization=False,
        # what is fused needs a GPU
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(recompute if case.recompute else {}),  # type: ignore[arg-type]
    )


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """A stand-in for Transformer Engine's, of its name: the norm inside, `layer_norm_weight` its
    weight, the normed input returned on request the way Megatron's class passes it on."""

    def __init__(self, *args: Any, tp_comm_buffer_name: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.ones(self.input_size, dtype=self.weight.dtype))
        self.return_layernorm_output = False
        self.return_layernorm_output_gathered = False

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        normed = functional.rms_norm(
            x, (self.input_size,), self.layer_norm_weight, self.config.layernorm_epsilon
        )
        output, bias = super().forward(normed)
        if bias is not None:
            return (output, bias, normed) if self.return_layernorm_output else (output, bias)
        return ((output, normed) if self.return_layernorm_output else output), None


class TERowParallelLinear(RowParallelLinear):
    """As Megatron's, by another name."""


class Norm(nn.RMSNorm):
    """Megatron's own norm for CPUs refuses sequence parallel, which a frozen norm does not notice."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)


def block_spec(hf: Mapping[str, Any], config: TransformerConfig, te: bool, vp: int | None) -> Any:
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=hf["model_type"] == "qwen3"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    if te:
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        attention.linear_qkv = TELayerNormColumnParallelLinear
        attention.linear_proj = TERowParallelLinear
        layer.mlp.submodules.linear_fc1 = TELayerNormColumnParallelLinear
        layer.mlp.submodules.linear_fc2 = TERowParallelLinear
        layer.sharded_state_dict_keys_map = {}
    if hf["model_type"] == "qwen3":
        attention.q_layernorm = attention.k_layernorm = Norm
    layers = get_num_layers_to_build(config, vp_stage=vp)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)


def read_config(model: str | Path) -> dict[str, Any]:
    return json.loads((Path(model) / "config.json").read_text())


def build(case: Case, **changes: Any) -> list[nn.Module]:
    """The chunks of this rank, with random base weights. ``changes``: of the TransformerConfig."""
    hf = read_config(case.model)
    config = config_of(hf, case)
    for name, value in changes.items():
        setattr(config, name, value)
    chunks = []
    for stage in range(case.vp or 1):
        vp_stage = stage if case.vp else None
        chunk = GPTModel(
            config,
            block_spec(hf, config, case.te, vp_stage),
            vocab_size=hf["vocab_size"] + hf["vocab_size"] % 2,
            max_sequence_length=hf["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
            share_embeddings_and_output_weights=hf["tie_word_embeddings"],
            position_embedding_type="rope",
            rotary_base=int(hf["rope_parameters"]["rope_theta"]),
            vp_stage=vp_stage,
        )
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.normal_(std=0.1)
        chunks.append(chunk)
    return chunks


def loaded(case: Case) -> list[nn.Module]:
    """The chunks with the case's base and adapter, in its dtype."""
    chunks = build(case)
    load_hf_weights(chunks, case.model)
    load_lora(chunks, case.adapter, mode=case.mode)  # type: ignore[arg-type]
    return [chunk.to(getattr(torch, case.dtype)) for chunk in chunks]


def batch(vocab: int) -> Tensor:
    """Tokens [ROWS, LENGTH]."""
    return torch.randint(0, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def forward_step(
    rows: Iterator[Tensor], model: Any, vocab: int, *, mean: bool = False
) -> tuple[Tensor, Any]:
    """Megatron's forward step: the sum of the next tokens' losses (a mistake: the ``mean``), and how
    many they are."""
    tokens = next(rows)
    positions = torch.arange(LENGTH).expand(tokens.shape)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
    output = model(tokens, positions, mask)

    def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        whole = gather_from_tensor_model_parallel_region(logits)[..., :vocab]
        target, predicted = tokens[:, 1:], whole[:, :-1]
        total = functional.cross_entropy(
            predicted.flatten(0, 1), target.flatten(), reduction="mean" if mean else "sum"
        )
        return total, torch.tensor(target.numel(), dtype=torch.int), {"loss": total.detach()}

    return output, loss


def wrap(chunks: Sequence[nn.Module]) -> Sequence[Any]:
    """The chunks in Megatron's DistributedDataParallel."""
    config: Any = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    return [DistributedDataParallel(config, settings, chunk) for chunk in chunks]


def run_schedule(wrapped: Sequence[Any], case: Case) -> list[float]:
    """Gradients of one optimizer step by Megatron's schedule, into `main_grad`; a micro-batch for each
    row. The micro-batches' losses, on the last stage."""
    replicas = parallel_state.get_data_parallel_world_size()
    vocab = read_config(case.model)["vocab_size"]
    own = batch(vocab)[parallel_state.get_data_parallel_rank() :: replicas].split(1)
    schedule = get_forward_backward_func()
    losses = schedule(
        forward_step_func=partial(forward_step, vocab=vocab, mean=case.fault == "divided twice"),
        data_iterator=[iter(own) for _ in wrapped] if case.vp else iter(own),
        model=wrapped if case.vp else wrapped[0],
        num_microbatches=len(own),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    return [float(each["loss"]) for each in losses]


def gradients(wrapped: Sequence[Any]) -> dict[str, Tensor]:
    """{`LAYER.PLACE.PARAMETER`: main_grad} of this rank."""
    return {
        f"{layer}.{place}.{name}": parameter.main_grad.clone()
        for chunk in wrapped
        for (layer, place), linear in attaching.get_adapter(chunk.module).linears.items()
        for name, parameter in linear.lora_parameters()
    }


def norm(wrapped: Sequence[Any]) -> Tensor:
    """The norm of the whole gradient by Megatron's rule for what counts on which rank."""
    squares = [
        parameter.main_grad.double().square().sum()
        for chunk in wrapped
        for parameter in chunk.parameters()
        if parameter.requires_grad and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    # a stage may have no adapter
    total = torch.stack([torch.zeros((), dtype=torch.float64), *squares]).sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt()


# --- what is left out on purpose


class Thirds(RowOrder):
    """q, k and v one after the other, where Megatron has them by group."""

    def __init__(self, right: RowOrder) -> None:
        super().__init__(1, tuple(right.groups * size for size in right.sizes))


class UpBeforeGate(RowOrder):
    def __init__(self, right: RowOrder) -> None:
        super().__init__(right.groups, right.sizes)

    def fuse(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        return super().fuse(parts[::-1], dim)


def unmarked(name: str, mark: Callable[..., None], *given: Any) -> None:
    mark(*given)
    setattr(given[0], name, False)


def before_norm(own: Callable[..., Tensor], linear: Any, normed: Tensor) -> Tensor:
    """The input of A undone of its norm's weight: as if it stood before the norm."""
    if not linear.lora.normed_inside:
        return own(linear, normed)
    return own(linear, normed / linear.layer_norm_weight)


def reordered(change: Callable[[RowOrder], RowOrder], name: str) -> Any:
    """`row_order` with another order of one linear's rows."""
    own = attaching.row_order

    def order(config: Any, place: Any, ranks: int) -> RowOrder:
        right = own(config, place, ranks)
        return change(right) if place.name == name else right

    return mock.patch.object(attaching, "row_order", order)


def left_out(fault: str) -> Any:
    """A context in which one thing of ours is missing or wrong."""

    def same(x: Tensor, group: Any = None) -> Tensor:
        return x

    adapted = terms.LoraParallelLinear
    faults: dict[str, Callable[[], Any]] = {
        "": nullcontext,
        "divided twice": nullcontext,  # of the loss, in `step`
        "column collective": lambda: mock.patch.object(
            terms, "copy_to_tensor_model_parallel_region", same
        ),
        "row collective": lambda: mock.patch.object(
            terms, "reduce_from_tensor_model_parallel_region", same
        ),
        "sequence parallel mark": lambda: mock.patch.object(
            terms, "_mark", partial(unmarked, "sequence_parallel", terms._mark)
        ),
        "tensor parallel mark": lambda: mock.patch.object(
            terms, "_mark", partial(unmarked, "tensor_model_parallel", terms._mark)
        ),
        "input before its norm": lambda: mock.patch.object(
            adapted, "lora_output", partialmethod(partial(before_norm, adapted.lora_output))
        ),
        "thirds": lambda: reordered(Thirds, "linear_qkv"),
        "up before gate": lambda: reordered(UpBeforeGate, "linear_fc1"),
        "embedding wants no gradient": lambda: mock.patch.object(
            attaching, "_want_gradient", lambda module, inputs, output: output
        ),
    }
    return faults[fault]()


@contextmanager
def parallel(case: Case) -> Iterator[None]:
    """Megatron's process groups of a case."""
    parallel_state.initialize_model_parallel(
        case.tp, case.pp, virtual_pipeline_model_parallel_size=case.vp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def run(case: Case) -> dict[str, Tensor]:
    with parallel(case), left_out(case.fault):
        wrapped = wrap(loaded(case))
        run_schedule(wrapped, case)
        return gradients(wrapped) | {NORM: norm(wrapped)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    cases = json.loads((folder / "cases.json").read_text())
    with cuda_on_cpu():
        for name, settings in cases.items():
            save_file(run(replace(Case("", ""), **settings)), folder / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
