"""AdamW over one adapter's flat buffer: two contiguous halves (A and B), one fused kernel each, one norm, one clip.

Decoupled weight decay (Loshchilov & Hutter 2019); B may run at a multiple of A's rate (LoRA+, arXiv 2402.12354).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorry.bank.adapters import Adapter


@dataclass(frozen=True)
class OptimSettings:
    """AdamW's numbers; max_grad_norm 0 switches clipping off; b_ratio = rate of B over rate of A."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b_ratio: float = 1.0


class AdapterOptimizer:
    """The optimizer of one adapter; its state is two flat moments and a count."""

    def __init__(self, adapter: Adapter, settings: OptimSettings) -> None:
        self.adapter, self.settings = adapter, settings
        self.halves = [nn.Parameter(part) for part in (adapter.values[: adapter.split], adapter.values[adapter.split :])]
        self.adamw = torch.optim.AdamW(
            [{"params": [half]} for half in self.halves],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.m, self.v = torch.zeros_like(adapter.values), torch.zeros_like(adapter.values)
        for half, part in zip(self.halves, (slice(None, adapter.split), slice(adapter.split, None)), strict=True):
            self.adamw.state[half] = {
                "step": torch.zeros((), dtype=torch.float32, device=half.device),
                "exp_avg": self.m[part],
                "exp_avg_sq": self.v[part],
            }

    def norm(self) -> float:
        """Euclidean norm of the whole adapter's gradient (inf or nan if any entry is)."""
        return float(torch.linalg.vector_norm(self.adapter.grads))

    def step(self, lr: float, norm: float) -> None:
        """Clip to max_grad_norm, update the masters, forget the gradient."""
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            self.adapter.grads.mul_(limit / (norm + 1e-6))
        cut = self.adapter.split
        for half, grad in zip(self.halves, (self.adapter.grads[:cut], self.adapter.grads[cut:]), strict=True):
            half.grad = grad
        for group, rate in zip(self.adamw.param_groups, (lr, lr * self.settings.b_ratio), strict=True):
            group["lr"] = rate
        self.adamw.step()
        self.adapter.touch()
        self.adapter.grads.zero_()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(m [P], v [P], count []), the tensors themselves."""
        return self.m, self.v, self.adamw.state[self.halves[0]]["step"]

    def load(self, m: Tensor, v: Tensor, count: Tensor) -> None:
        """Take back what `moments` gave, bit for bit."""
        self.m.copy_(m)
        self.v.copy_(v)
        for half in self.halves:
            self.adamw.state[half]["step"].copy_(count)
