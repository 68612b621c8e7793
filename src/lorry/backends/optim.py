"""AdamW over the flat buffer of a parameter set: one fused kernel for each of its groups, one norm,
one clip.

Decoupled weight decay (Loshchilov & Hutter 2019). Which ranges have a rate of their own, and which
decay, is the set's to say (`adapters/trainable.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorry.adapters.trainable import ParameterSet, param_groups


@dataclass(frozen=True)
class OptimSettings:
    """AdamW's numbers; max_grad_norm 0 switches clipping off; loraplus_lr_ratio = rate of B
    over rate of A; l2_regularization: the factor of the sum of squares that is added to the loss."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0
    l2_regularization: float = 0.0


class ParameterSetOptimizer:
    """The optimizer of one parameter set; its state is two flat moments and a count."""

    def __init__(self, params: ParameterSet, settings: OptimSettings) -> None:
        self.params, self.settings = params, settings
        self.groups = param_groups(
            params, lr_ratio=settings.loraplus_lr_ratio, weight_decay=settings.weight_decay
        )
        # one Parameter a group over the flat buffer: a step is one fused kernel for each group
        self.views = [nn.Parameter(params.values[group.part]) for group in self.groups]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [view], "weight_decay": group.weight_decay}
                for view, group in zip(self.views, self.groups, strict=True)
            ],
            # set before every step from the schedule
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        # moments of the whole buffer, given to AdamW as views: a checkpoint is two tensors
        self.m, self.v = torch.zeros_like(params.values), torch.zeros_like(params.values)
        for view, group in zip(self.views, self.groups, strict=True):
            self.adamw.state[view] = {
                # a tensor on the device: the fused kernel takes nothing else
                "step": torch.zeros((), dtype=torch.float32, device=view.device),
                "exp_avg": self.m[group.part],
                "exp_avg_sq": self.v[group.part],
            }

    def add_l2_gradient(self) -> None:
        """Add that of ``l2_regularization`` times the sum of squares: once a step, before the norm,
        as a term of the loss has it; AdamW's decay is none of the gradient's."""
        if factor := self.settings.l2_regularization:
            self.params.grads.add_(self.params.values, alpha=2 * factor)

    def step(self, lr: float, norm: float) -> None:
        """Clip to max_grad_norm, update the masters, zero the gradient."""
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            # 1e-6 as torch.nn.utils.clip_grad_norm_ has it
            self.params.grads.mul_(limit / (norm + 1e-6))
        for view, group, adamw in zip(
            self.views, self.groups, self.adamw.param_groups, strict=True
        ):
            # set anew each step: AdamW reads it, `zero_` below clears the memory it shares
            view.grad = self.params.grads[group.part]
            adamw["lr"] = lr * group.lr_ratio
        self.adamw.step()
        # the masters were written in place: compute copies must be remade before the next forward
        self.params.touch()
        self.params.grads.zero_()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(m [P], v [P], count []), the tensors themselves."""
        return self.m, self.v, self.adamw.state[self.views[0]]["step"]

    def set_step(self, step: Tensor) -> None:
        """Restore the count that `moments` gave; the moments are written in place."""
        for view in self.views:
            self.adamw.state[view]["step"].copy_(step)
