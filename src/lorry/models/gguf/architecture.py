"""What llama.cpp calls an architecture: the keys it wants, its names of our tensors, and how they
lie in a GGUF file.

    architecture = describe_architecture(config)          # a Hugging Face config as a dict
    placement = architecture.place("model.layers.0.self_attn.q_proj.weight")
    architecture.add_keys(writer)                          # a gguf.GGUFWriter

llama.cpp computes what it knows of an architecture and ignores the rest of a config, so everything
that changes the logits must be a key that it reads, or is refused here: Lorry's own families
(`families/`) say which fields those are. Sources: llama.cpp `conversion/llama.py`, `qwen.py`,
`src/models/*.cpp`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy
import torch
from gguf import MODEL_ARCH, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.errors import ModelError
from lorry.families import ModelGeometry, find_family, unsupported_fields
from lorry.models.gguf.tensors import ROTARY_FACTORS

# model_type -> (the model type whose family describes its dense part, llama.cpp's architecture)
ARCHITECTURES = {
    "llama": ("llama", MODEL_ARCH.LLAMA),
    "mistral": ("mistral", MODEL_ARCH.LLAMA),
    "smollm": ("smollm", MODEL_ARCH.LLAMA),
    "qwen2": ("qwen2", MODEL_ARCH.QWEN2),
    "qwen3": ("qwen3", MODEL_ARCH.QWEN3),
    "mixtral": ("llama", MODEL_ARCH.LLAMA),
    "qwen2_moe": ("qwen2", MODEL_ARCH.QWEN2MOE),
    "qwen3_moe": ("qwen3", MODEL_ARCH.QWEN3MOE),
}
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
# fields of a mixture's config beyond its dense family's that are read here, or are of training
MIXTURE_KEYS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "qkv_bias",
    }
)
# llama.cpp's Llama turns neighbouring pairs of a head, Hugging Face's the two halves of it
PERMUTED = frozenset({MODEL_ARCH.LLAMA})
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_TURNED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


@dataclass(frozen=True)
class ExpertCounts:
    """Experts of a layer, those of a token, the width of one, and of the shared one (0: none)."""

    experts: int
    used: int
    width: int
    shared_width: int = 0


@dataclass(frozen=True)
class GgufArchitecture:
    """llama.cpp's architecture with the geometry of one model."""

    arch: MODEL_ARCH
    geometry: ModelGeometry
    mixture: ExpertCounts | None = None

    @property
    def name(self) -> str:
        """As `general.architecture` has it."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def place(self, name: str) -> str:
        """GGUF's name of a tensor by its Hugging Face name. Raises ModelError for one that the
        architecture has not.
        """
        tensor_name = gguf.get_tensor_name_map(self.arch, self.geometry.layers).get_name(
            _EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias")
        )
        if tensor_name is None:
            raise ModelError(
                f"llama.cpp's architecture {self.name} has no tensor for {name}; use to=hf"
            )
        return str(tensor_name)

    @property
    def needs_head(self) -> bool:
        """Whether llama.cpp refuses a file without a head of its own, tied or not."""
        return self.arch == MODEL_ARCH.QWEN2MOE

    @staticmethod
    def expert_of(name: str) -> int:
        """The number of the expert that a tensor of the model belongs to; 0 of any other."""
        match = _EXPERT.search(name)
        return 0 if match is None else int(match[1])

    @staticmethod
    def is_stack(place: str) -> bool:
        """Whether a tensor of the file is those of all experts, one behind the other."""
        return place.endswith("_exps.weight")

    def heads_of(self, name: str) -> int | None:
        """How many heads the rows of a tensor are, where llama.cpp has them in another order."""
        turned = _TURNED.search(name) if self.arch in PERMUTED else None
        if turned is None:
            return None
        return self.geometry.heads if turned[1] == "q" else self.geometry.kv_heads

    def to_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with its rows as llama.cpp has them."""
        heads = self.heads_of(name)
        return tensor if heads is None else _interleave(tensor, heads)

    def from_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_gguf`."""
        heads = self.heads_of(name)
        if heads is None:
            return tensor
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def add_keys(self, writer: GGUFWriter) -> None:
        """Write the keys that llama.cpp reads the model's numbers from."""
        g = self.geometry
        writer.add_context_length(g.context)
        writer.add_embedding_length(g.width)
        writer.add_block_count(g.layers)
        writer.add_feed_forward_length(g.mlp_width)
        writer.add_head_count(g.heads)
        writer.add_head_count_kv(g.kv_heads)
        # said always: without them llama.cpp takes width / heads
        writer.add_key_length(g.head_dim)
        writer.add_value_length(g.head_dim)
        writer.add_layer_norm_rms_eps(g.norm_eps)
        writer.add_vocab_size(g.vocab)
        assert g.rotary is not None  # every family of `ARCHITECTURES` turns
        writer.add_rope_freq_base(g.rotary.theta)
        writer.add_rope_dimension_count(g.rotary.dim)
        if g.rotary.kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(g.rotary.scaling["factor"])

        if self.mixture is not None:
            writer.add_expert_count(self.mixture.experts)
            writer.add_expert_used_count(self.mixture.used)
            if self.arch != MODEL_ARCH.LLAMA:
                writer.add_expert_feed_forward_length(self.mixture.width)
            if self.mixture.shared_width:
                writer.add_expert_shared_feed_forward_length(self.mixture.shared_width)

    def extra_tensors(self) -> dict[str, NDArray[numpy.float32]]:
        """{GGUF name: values} of tensors that the model has not: the rotary factors of Llama 3."""
        rotary = self.geometry.rotary
        if rotary is None or rotary.kind != "llama3":
            return {}
        return {ROTARY_FACTORS: llama3_factors(rotary.theta, rotary.dim, rotary.scaling)}


def describe_architecture(config: Mapping[str, Any]) -> GgufArchitecture:
    """The architecture of a Hugging Face config. Raises ModelError for one that llama.cpp, or this
    writer, does not have.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a GGUF file of model_type {kind!r} cannot be written; {', '.join(ARCHITECTURES)} can. "
            "llama.cpp's own convert_hf_to_gguf.py reads what to=hf writes"
        )
    dense, arch = ARCHITECTURES[kind]
    family = find_family(dense)
    assert family is not None, dense
    if kind in MIXTURES:
        plain = {key: value for key, value in config.items() if key not in MIXTURE_KEYS}
        if odd := unsupported_fields(family, plain, CONFIG_MAPPING[kind]().to_dict()):
            raise ModelError(f"a GGUF file of this {kind} cannot be written: {', '.join(odd)}")
    geometry = family.geometry(config)
    if geometry.activation != "silu":
        raise ModelError(
            f"hidden_act={geometry.activation!r}: llama.cpp computes silu in every {kind} model"
        )
    extra = geometry.biased - (set(family.roles.qkv) if dense == "qwen2" else set())
    if extra and arch != MODEL_ARCH.LLAMA:
        raise ModelError(f"attention_bias=true: llama.cpp has no biases in {kind} models")
    if geometry.rotary is not None and geometry.rotary.kind == "llama3" and arch not in PERMUTED:
        raise ModelError(f"rope_type='llama3': llama.cpp has no such scaling in {kind} models")
    mixture = _describe_mixture(kind, config, geometry) if kind in MIXTURES else None
    return GgufArchitecture(arch, geometry, mixture)


def _describe_mixture(
    kind: str, config: Mapping[str, Any], geometry: ModelGeometry
) -> ExpertCounts:
    """Raises ModelError for a mixture whose gates llama.cpp makes otherwise than transformers: it
    divides those of the chosen experts by their sum in a Mixtral and a Qwen3-MoE whatever the
    config says, and never in a Qwen2-MoE.
    """
    # one field under two names: transformers 5 writes the first for every class
    experts = config.get("num_local_experts") or config["num_experts"]
    used, normalized = config["num_experts_per_tok"], bool(config.get("norm_topk_prob"))
    # over all experts the softmax sums to 1 by itself
    if used < experts and kind == "qwen2_moe" and normalized:
        raise ModelError(
            f"norm_topk_prob=true with {used} of {experts} experts: llama.cpp does not normalise the gates of a "
            "Qwen2-MoE and would compute another model; write it with all experts for every token"
        )
    if used < experts and kind == "qwen3_moe" and not normalized:
        raise ModelError(
            f"norm_topk_prob=false with {used} of {experts} experts: llama.cpp normalises the gates of a Qwen3-MoE all the same "
            "and would compute another model"
        )
    if kind == "mixtral":
        return ExpertCounts(experts, used, geometry.mlp_width)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ModelError("a mixture with dense layers between cannot be written into a GGUF file")
    if kind == "qwen2_moe" and config.get("qkv_bias") is False:
        raise ModelError("qkv_bias=false: a GGUF file of a Qwen2-MoE without biases is not written")
    shared = config.get("shared_expert_intermediate_size", 0) if kind == "qwen2_moe" else 0
    return ExpertCounts(experts, used, config["moe_intermediate_size"], shared)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, ...]: within a head, row i of its first half followed by row i of its
    second.
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(theta: float, dim: int, scaling: Mapping[str, float]) -> NDArray[numpy.float32]:
    """[dim / 2]: what each rotary frequency is divided by in Llama 3.1, 3.2 and 3.3."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(waves > context / low, factor, between)
    return torch.where(waves < context / high, 1.0, factors).float().numpy()
