"""Tiny mixtures of experts, as transformers has them and as anybody may write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import tiny

# transformers' classes: the usual layout; with a shared expert; with small heads; [E, in, out], biases,
# gate and up by turns, clamped; another name of the module
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
    """A weight that is multiplied, and no linear; ``odd``: it is used in another way besides."""

    def __init__(self, width: int = 8, experts: int = 3, *, odd: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(experts, width, generator=draw))
        self.odd = odd

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.float() if self.odd else self.weight
        share, index = F.linear(x, weight).softmax(-1).topk(2, dim=-1)
        return index, share


class Mixture(nn.Module):
    """x [T, 8] -> [T, 8]: a linear, a router, experts."""

    def __init__(self, experts: type[Experts] = Experts, *, odd: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.gate = Router(odd=odd)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(x)
        return x + self.experts(x, *self.gate(x))
