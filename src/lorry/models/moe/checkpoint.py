"""A Mixtral, Qwen2-MoE or Qwen3-MoE directory from a dense model, experts that change its MLPs, and
a linear router per layer.

    twin = describe_moe(model.config, experts=4, top_k=2, normalize=True)
    save_moe(model, folder, twin, expert_weights, routers, dtype=torch.float32)

What these classes compute in every layer, n the normed input of the MLP, W_r [E, d]:

    p = softmax(W_r n);  the k largest of p, divided by their sum if normalize;  sum_e p_e MLP_e(n)

The base's MLP is no part of that sum: gates that do not sum to 1 shrink it. Routing of attention
they do not have. Tensors are written under per-expert names, which every reader takes; fused ones
llama.cpp's converter refuses for Mixtral. A name that is wrong is a warning to transformers, and the
expert random: whoever writes opens the directory again with every tensor accounted for
(`models.loading.reopen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.disk.durable import build_directory
from lorry.errors import ConfigError, ModelError
from lorry.families import ModelFamily, find_family
from lorry.models.decoder.model import Decoder
from lorry.models.loading.store import write_checkpoint

# rows of the shared expert that Qwen2-MoE cannot do without: the width of a block of Q8_0
SHARED_WIDTH = 32


@dataclass(frozen=True)
class MoeNames:
    """Where a class of mixtures keeps its parts, inside a layer; `{e}`: the expert. targets: {the
    dense family's target: the expert's linear}."""

    model_type: str
    architecture: str
    router: str
    targets: Mapping[str, str]
    shared: str | None = None


_QWEN_TARGETS = {
    target: f"mlp.experts.{{e}}.{target}" for target in ("gate_proj", "up_proj", "down_proj")
}
MIXTRAL = MoeNames(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe.gate",
    {
        # w1 the gate, w3 up, w2 down
        "gate_proj": "block_sparse_moe.experts.{e}.w1",
        "up_proj": "block_sparse_moe.experts.{e}.w3",
        "down_proj": "block_sparse_moe.experts.{e}.w2",
    },
)
QWEN2_MOE = MoeNames(
    "qwen2_moe", "Qwen2MoeForCausalLM", "mlp.gate", _QWEN_TARGETS, shared="mlp.shared_expert"
)
QWEN3_MOE = MoeNames("qwen3_moe", "Qwen3MoeForCausalLM", "mlp.gate", _QWEN_TARGETS)
# dense model_type -> its mixture's names
TWINS = {
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "smollm": MIXTRAL,
    "qwen2": QWEN2_MOE,
    "qwen3": QWEN3_MOE,
}
# fields of the dense config that mean the same in the mixture's
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)


@dataclass(frozen=True)
class MoeTwin:
    """The mixture of a dense model: its names, its family's, its config, and its numbers."""

    names: MoeNames
    family: ModelFamily
    config: Mapping[str, Any]
    experts: int
    top_k: int
    normalize: bool


def describe_moe(
    config: Mapping[str, Any], *, experts: int, top_k: int, normalize: bool
) -> MoeTwin:
    """The stock mixture of a dense Hugging Face config. Raises ModelError for a model that has
    none, ConfigError for numbers that the class cannot hold.
    """
    kind = str(config.get("model_type"))
    if kind in {twin.model_type for twin in TWINS.values()}:
        raise ModelError(
            f"model_type {kind!r} is a mixture of experts already, and no base of another; name the dense "
            "model that it was made of"
        )
    if kind not in TWINS:
        raise ModelError(
            f"model_type {kind!r} has no mixture-of-experts class in transformers; "
            f"{', '.join(TWINS)} have one"
        )
    family = find_family(kind)
    assert family is not None, kind
    names, geometry = TWINS[kind], family.geometry(config)
    if geometry.activation != "silu":
        raise ModelError(f"hidden_act={geometry.activation!r}: {names.architecture} needs silu")
    # q, k and v of a Qwen2 have biases, and so have those of its mixture
    if biased := sorted(geometry.biased - set(family.roles.qkv if kind == "qwen2" else ())):
        raise ModelError(f"{names.architecture} has no biases for {', '.join(biased)}")
    if not 1 <= top_k <= experts:
        raise ConfigError(
            f"top_k is {top_k}; it must be from 1 to the number of experts, {experts}"
        )
    if not normalize and top_k < experts:
        # over all experts the softmax sums to 1 by itself
        if names is MIXTRAL:
            raise ConfigError(
                "Mixtral divides the chosen gates by their sum; normalize must be true"
            )
        raise ConfigError(
            f"gates of {top_k} of {experts} experts do not sum to 1 and would "
            "shrink the MLP (the base MLP is not added to the sum); normalize must "
            "be true"
        )
    written: dict[str, Any] = {key: config[key] for key in COPIED if config.get(key) is not None}
    # null too: left out, a token would be the class's own, another one of this vocabulary
    written |= {key: config[key] for key in COPIED if key.endswith("_token_id") and key in config}
    written |= {
        "model_type": names.model_type,
        "architectures": [names.architecture],
        "num_key_value_heads": geometry.kv_heads,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
    }
    if names is MIXTRAL:
        written |= {"num_local_experts": experts, "head_dim": geometry.head_dim}
        # Mixtral's default is Mistral's old window
        written |= {"sliding_window": None, "router_jitter_noise": 0.0}
    else:
        written |= {
            "num_experts": experts,
            # the class's own default is another width
            "moe_intermediate_size": geometry.mlp_width,
            # and false the default
            "norm_topk_prob": normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
    if names is QWEN2_MOE:
        written |= {"qkv_bias": True, "shared_expert_intermediate_size": SHARED_WIDTH}
        if geometry.head_dim * geometry.heads != geometry.width:
            raise ModelError("Qwen2MoeForCausalLM has no head_dim setting")
    if names is QWEN3_MOE:
        written |= {"head_dim": geometry.head_dim, "attention_bias": False}
    return MoeTwin(names, family, written, experts, top_k, normalize)


def moe_tensors(
    model: Decoder,
    twin: MoeTwin,
    dense_weight: Callable[[str], Tensor],
    expert_weight: Callable[[int, str], Tensor],
    routers: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """(name in the mixture's files, tensor), a layer after the other, each made when its turn
    comes.

    dense_weight(name): a tensor of ``model`` that all experts share, by its name in the state dict.
    expert_weight(e, path): the weight of expert e's linear at the module path of the dense one.
    routers: [E, d] of each layer.
    """
    family, names = twin.family, twin.names
    if len(routers) != model.geometry.layers or any(
        tuple(r.shape) != (twin.experts, model.geometry.width) for r in routers
    ):
        raise ModelError(
            f"a router of this mixture is [{twin.experts}, {model.geometry.width}] in each of "
            f"{model.geometry.layers} layers; given: {[tuple(r.shape) for r in routers][:2]} in {len(routers)}"
        )
    if any(not bool(torch.isfinite(r).all()) for r in routers):
        raise ModelError("a router holds NaN or infinity; nothing was written")
    routed = {
        family.path(target, layer): (layer, target)
        for layer in range(model.geometry.layers)
        for target in names.targets
    }
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        if path == family.head and twin.config.get("tie_word_embeddings"):
            continue
        if path not in routed:
            yield name, dense_weight(name)
            continue
        assert leaf == "weight", name  # biases were refused
        layer, target = routed[path]
        prefix = family.layer.format(i=layer)
        # the router and the shared expert with the first linear of the MLP
        if target == next(iter(names.targets)):
            yield f"{prefix}.{names.router}.weight", routers[layer]
            if names.shared is not None:
                yield from _silent_shared_expert(f"{prefix}.{names.shared}", model)
        for expert in range(twin.experts):
            yield (
                f"{prefix}.{names.targets[target].format(e=expert)}.weight",
                expert_weight(expert, path),
            )


def _silent_shared_expert(prefix: str, model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The shared expert that a Qwen2-MoE always has, switched off: its output matrix is zero."""
    width = model.geometry.width
    yield f"{prefix}.gate_proj.weight", torch.zeros(SHARED_WIDTH, width)
    yield f"{prefix}.up_proj.weight", torch.zeros(SHARED_WIDTH, width)
    yield f"{prefix}.down_proj.weight", torch.zeros(width, SHARED_WIDTH)
    # not zero: llama.cpp has sigmoid(z) as silu(z) / z, NaN at 0, and NaN times zero is NaN
    yield f"{prefix}_gate.weight", torch.ones(1, width)


def save_moe(
    model: Decoder,
    folder: Path,
    twin: MoeTwin,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer: Any | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write ``tensors`` (`moe_tensors`) and the config to ``folder``, which must not exist or be
    empty. Raises ConfigError if the place is taken, DiskError; then nothing is written.
    """
    stored = ((name, t.detach().to("cpu", dtype).contiguous()) for name, t in tensors)
    with build_directory(folder) as work:
        write_checkpoint(
            work, stored, twin.config, generation_config=generation_config, tokenizer=tokenizer
        )
