"""AdamW over one flat buffer, an adapter's or the base's: two contiguous halves, one fused kernel each, one norm, one clip.

Decoupled weight decay (Loshchilov & Hutter 2019). An adapter's halves are A and B; B may run at a multiple of A's rate (LoRA+,
arXiv 2402.12354). Those of base weights are the matrices, and norms and biases, which do not decay (as HF's Trainer has it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorry.adapters.bank import Adapter
from lorry.adapters.base_weights import Weights

Owner = Adapter | Weights


@dataclass(frozen=True)
class OptimSettings:
    """AdamW's numbers; max_grad_norm 0 switches clipping off; b_ratio = rate of B over rate of A."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b_ratio: float = 1.0


@dataclass(frozen=True)
class Half:
    """A range of the buffer, its rate over the run's, and its weight decay."""

    part: slice
    ratio: float
    decay: float


class AdapterOptimizer:
    """The optimizer of one adapter, or of the base weights that train; its state is two flat moments and a count."""

    def __init__(self, adapter: Owner, settings: OptimSettings) -> None:
        self.adapter, self.settings = adapter, settings
        ratio, decay = (settings.b_ratio, settings.weight_decay) if isinstance(adapter, Adapter) else (1.0, 0.0)
        both = [
            Half(slice(0, adapter.split), 1.0, settings.weight_decay),
            Half(slice(adapter.split, adapter.values.numel()), ratio, decay),
        ]
        self.own = [half for half in both if half.part.start < half.part.stop]
        self.halves = [nn.Parameter(adapter.values[half.part]) for half in self.own]
        self.adamw = torch.optim.AdamW(
            [{"params": [half], "weight_decay": own.decay} for half, own in zip(self.halves, self.own, strict=True)],
            lr=0.0, betas=settings.betas, eps=settings.eps, fused=True,
        )  # fmt: skip
        self.m, self.v = torch.zeros_like(adapter.values), torch.zeros_like(adapter.values)
        for half, own in zip(self.halves, self.own, strict=True):
            self.adamw.state[half] = {
                "step": torch.zeros((), dtype=torch.float32, device=half.device),
                "exp_avg": self.m[own.part],
                "exp_avg_sq": self.v[own.part],
            }

    def norm(self) -> float:
        """Euclidean norm of the whole gradient (inf or nan if any entry is)."""
        if isinstance(self.adapter, Weights):
            return self.adapter.norm()
        return float(torch.linalg.vector_norm(self.adapter.grads))

    def step(self, lr: float, norm: float) -> None:
        """Clip to max_grad_norm, update the masters, forget the gradient."""
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            self.adapter.grads.mul_(limit / (norm + 1e-6))
        for half, group, own in zip(self.halves, self.adamw.param_groups, self.own, strict=True):
            half.grad = self.adapter.grads[own.part]
            group["lr"] = lr * own.ratio
        self.adamw.step()
        self.adapter.touch()
        self.adapter.grads.zero_()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(m [P], v [P], count []), the tensors themselves."""
        return self.m, self.v, self.adamw.state[self.halves[0]]["step"]

    def count(self, steps: Tensor) -> None:
        """Take back the count that `moments` gave; the moments are written in place."""
        for half in self.halves:
            self.adamw.state[half]["step"].copy_(steps)
