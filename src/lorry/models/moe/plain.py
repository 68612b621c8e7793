"""A mixture of experts as plainly as it can be said, in place of the MLPs of transformers' dense
model: what a stock class has to compute.

    model = plain_mixture(dense, routers, expert_weight, paths, top_k=2)

No names of files, no stacks of experts, no code of the MoE classes: only sum_e g_e MLP_e(n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ExpertWeight = Callable[[int, str], Tensor]


class PlainMixture(nn.Module):
    """sum_e g_e down_e(silu(gate_e n) * up_e n), every expert for every token. An expert's weights
    are made when they are needed: K of them need not fit beside the model.
    """

    def __init__(self, router: Tensor, weight: ExpertWeight, prefix: str, top_k: int) -> None:
        super().__init__()
        self.router, self.weight, self.prefix, self.top_k = router, weight, prefix, top_k

    def forward(self, normed: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        scores = F.linear(normed, self.router.to(normed)).float()
        # the softmax over the chosen alone is the chosen of a softmax over all, divided by their sum
        largest = scores.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, largest.indices, largest.values.softmax(-1))
        total = torch.zeros_like(normed)
        for expert in range(scores.shape[-1]):
            gate, up, down = (
                self.weight(expert, f"{self.prefix}.{name}").to(normed)
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            inner = F.silu(F.linear(normed, gate)) * F.linear(normed, up)
            total += gates[..., expert, None].to(normed) * F.linear(inner, down)
        return total


def plain_mixture(
    dense: Any, routers: Sequence[Tensor], weight: ExpertWeight, *, top_k: int
) -> Any:
    """``dense`` (transformers' Llama, Qwen2 or Qwen3) with mixtures for MLPs. routers: [E, d] of
    each layer; weight(e, path): of expert e's linear at the dense module path.
    """
    for number, (layer, router) in enumerate(zip(dense.model.layers, routers, strict=True)):
        layer.mlp = PlainMixture(router, weight, f"model.layers.{number}.mlp", top_k)
    return dense.eval()
