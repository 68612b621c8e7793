"""Tiny mixtures of experts, as transformers has them and as anybody may write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import tiny

# transformers' classes: the usual layout; with a shared expert; with small heads; [E, in, out], biases,
# gate and up by turns, clamped; another name of the module; a router that scores in fp32
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**tiny.MOE, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2_moe": {
        **tiny.MOE,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": tiny.FOREIGN["qwen3_moe"],
    "gpt_oss": {
        **tiny.MOE,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "layer_types": ["full_attention"] * tiny.MOE["num_hidden_layers"],
    },
    "granitemoe": {**tiny.MOE, "model_type": "granitemoe", "num_local_experts": 4},
    "deepseek_v3": {
        **tiny.MOE,
        "model_type": "deepseek_v3",
        "num_key_value_heads": tiny.MOE["num_attention_heads"],
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
UNFUSED = {
    "mixtral": ("model.layers.{}.block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen2_moe": ("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj"),
    "qwen3_moe": ("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def model(kind: str, *, experts: str | None = None) -> Any:
    """A random model in fp32; ``experts``: its experts_implementation."""
    made = tiny.random_model(MODELS[kind])
    if experts is not None:
        made.set_experts_implementation(experts)
    return made


class Experts(nn.Module):
    """Fused experts without a word of transformers: [E, 2F, D] and [E, D, F], silu between."""

    def __init__(self, experts: int = 3, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width, generator=draw))
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner, generator=draw))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (index, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, weight in zip(index.tolist(), weights, strict=True):
                gate, up = F.linear(hidden_states[token], self.gate_up_proj[e]).chunk(2)
                out[token] += weight * F.linear(self.act_fn(gate) * up, self.down_proj[e])
        return out


class OddExperts(Experts):
    """The same tensors in another computation."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights).tanh()


class Router(nn.Module):
    """A weight that is multiplied, and no linear; ``use``: cast to fp32 before, or in another way."""

    def __init__(self, width: int = 8, experts: int = 3, *, use: str = "as it is") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(experts, width, generator=draw))
        self.use = use

    def scores(self, x: Tensor) -> Tensor:
        if self.use == "type":
            return F.linear(x.type(torch.float32), self.weight.type(torch.float32))
        if self.use == "float":
            return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight.abs() if self.use == "odd" else self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share, index = self.scores(x).softmax(-1).topk(2, dim=-1)
        return index, share


class Mixture(nn.Module):
    """x [T, 8] -> [T, 8]: a linear, a router, experts."""

    def __init__(self, experts: type[Experts] = Experts, *, use: str = "as it is") -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.gate = Router(use=use)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(x)
        return x + self.experts(x, *self.gate(x))
