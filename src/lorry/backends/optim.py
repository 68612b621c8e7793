"""AdamW over the flat buffer of a parameter set: one fused kernel for each of its groups, one norm,
one clip.

Decoupled weight decay (Loshchilov & Hutter 2019). Which ranges have a rate of their own, and which
decay, is the set's to say (`adapters/trainable.py`).

Ranks that hold the same values may share the moments (ZeRO stage 1, Rajbhandari et al. 2020): each
has those of its part of every group, steps that, and gives the others the new values. AdamW is
elementwise, so the values have the same bits.

The kernel is called through torch's function and not its class, whose constructor imports torch's
compiler: a second and a half, and 60 MB, of every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.trainable import ParameterSet, ParamGroup, param_groups
from lorry.adapters.variants.adalora import rank_allocator

# a fused step takes so many values at once, and those behind the last whole ones one by one, with
# another rounding: parts begin where it would have begun anyway
VECTOR_VALUES = 16


@dataclass(frozen=True)
class OptimSettings:
    """AdamW's numbers; max_grad_norm 0 switches clipping off; loraplus_lr_ratio = rate of B
    over rate of A; l2_regularization: the factor of the sum of squares that is added to the loss;
    total_steps: of the run, over which AdaLoRA takes ranks away."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0
    l2_regularization: float = 0.0
    total_steps: int = 0


def own_parts(groups: Sequence[ParamGroup], rank: int, size: int) -> list[ParamGroup]:
    """What ``rank`` of ``size`` ranks steps of each group; empty where a group is too short."""
    return [
        replace(group, part=slice(*(_edge(group, place, size) for place in (rank, rank + 1))))
        for group in groups
    ]


def _edge(group: ParamGroup, place: int, size: int) -> int:
    """Where the part of rank ``place`` begins."""
    vectors = -(-(group.part.stop - group.part.start) // VECTOR_VALUES)
    return min(group.part.start + -(-vectors // size) * place * VECTOR_VALUES, group.part.stop)


@dataclass
class SteppedGroup:
    """What one call of the kernel steps: views of a group's values and moments, the steps made so far
    ([], float32, on the device: the kernel takes nothing else), and the rate of the last one."""

    values: Tensor
    m: Tensor
    v: Tensor
    count: Tensor
    weight_decay: float
    lr: float = 0.0


class ParameterSetOptimizer:
    """The optimizer of one parameter set; its state is two flat moments and a count, and of an AdaLoRA
    adapter what its allocator has. ``ranks``: those that hold the same values and share the moments;
    all of them make the same calls. Raises ConfigError where AdaLoRA's schedule does not fit.
    """

    def __init__(
        self, params: ParameterSet, settings: OptimSettings, ranks: TensorRanks | None = None
    ) -> None:
        self.params, self.settings, self.ranks = params, settings, ranks
        self.whole_groups = param_groups(
            params, lr_ratio=settings.loraplus_lr_ratio, weight_decay=settings.weight_decay
        )
        self.groups = (
            self.whole_groups
            if ranks is None
            else own_parts(self.whole_groups, ranks.rank, ranks.size)
        )
        # a view a group of the flat buffer: a step is one fused kernel for each group
        views = [params.values[group.part] for group in self.groups]
        self.allocator = rank_allocator(params, settings.total_steps)
        # moments of all that is stepped here, given to the kernel as views: a checkpoint is two tensors
        size = params.values.numel() if ranks is None else sum(view.numel() for view in views)
        self.m, self.v = params.values.new_zeros(size), params.values.new_zeros(size)
        self.stepped_groups = [
            SteppedGroup(
                view,
                m,
                v,
                torch.zeros((), dtype=torch.float32, device=view.device),
                group.weight_decay,
            )
            for view, m, v, group in zip(
                views, *map(self._by_group, (self.m, self.v)), self.groups, strict=True
            )
        ]

    def _by_group(self, moments: Tensor) -> list[Tensor]:
        """Views of what is stepped here of each group."""
        if self.ranks is None:
            return [moments[group.part] for group in self.groups]
        return list(moments.split([g.part.stop - g.part.start for g in self.groups]))

    def add_penalty_gradients(self) -> None:
        """Add those of ``l2_regularization`` times the sum of squares, and of AdaLoRA's orthogonality:
        once a step, before the norm, as terms of the loss have them; AdamW's decay is none of the
        gradient's."""
        if self.allocator is not None:
            self.allocator.add_orthogonality_gradient()
        if factor := self.settings.l2_regularization:
            self.params.grads.add_(self.params.values, alpha=2 * factor)

    @torch.no_grad()
    def step(self, lr: float, norm: float, number: int | None = None) -> None:
        """Clip to max_grad_norm, update the masters, zero the gradient. ``number``: of the run's step,
        from 1, which AdaLoRA's schedule hangs on; None: how many have been made here."""
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            # 1e-6 as torch.nn.utils.clip_grad_norm_ has it
            self.params.grads.mul_(limit / (norm + 1e-6))
        for group, stepped in zip(self.groups, self.stepped_groups, strict=True):
            stepped.lr = lr * group.lr_ratio
            adamw(
                [stepped.values],
                [self.params.grads[group.part]],
                [stepped.m],
                [stepped.v],
                [],
                [stepped.count],
                fused=True,
                amsgrad=False,
                beta1=self.settings.betas[0],
                beta2=self.settings.betas[1],
                lr=stepped.lr,
                weight_decay=stepped.weight_decay,
                eps=self.settings.eps,
                maximize=False,
            )
        if self.ranks is not None:
            own = torch.cat([stepped.values for stepped in self.stepped_groups])
            self._join("values after a step", own, self.params.values)
        if self.allocator is not None:
            self.allocator.update(int(self.count) if number is None else number)
        # the masters were written in place: compute copies must be remade before the next forward
        self.params.touch()
        self.params.grads.zero_()

    @torch.no_grad()
    def _join(self, what: str, own: Tensor, into: Tensor) -> Tensor:
        """Write into [P] what each rank has of the groups, as `_by_group` has it."""
        assert self.ranks is not None
        size = self.ranks.size
        parts = [own_parts(self.whole_groups, rank, size) for rank in range(size)]
        lengths = [sum(g.part.stop - g.part.start for g in groups) for groups in parts]
        filled = F.pad(own, (0, max(lengths) - own.numel()))
        for groups, values in zip(parts, self.ranks.gather(filled), strict=True):
            at = 0
            for group in groups:
                length = group.part.stop - group.part.start
                into[group.part] = values[at : at + length]
                at += length
        return into

    def moments(self) -> tuple[Tensor, Tensor]:
        """(m [P], v [P]): the tensors themselves, or, where ranks share them, all of theirs."""
        if self.ranks is None:
            return self.m, self.v
        empty = torch.zeros_like(self.params.values)
        return (
            self._join("moments", self.m, empty),
            self._join("moments", self.v, torch.zeros_like(empty)),
        )

    def buffers(self) -> dict[str, Tensor]:
        """{kind: [P]} of what a checkpoint holds besides: the tensors themselves."""
        if self.allocator is None:
            return {}
        return {
            "adalora_sensitivity": self.allocator.sensitivity,
            "adalora_uncertainty": self.allocator.uncertainty,
        }

    def counters(self) -> dict[str, Tensor]:
        """{kind: tensor} of what a checkpoint holds that is not as large as the values."""
        kept = {} if self.allocator is None else {"adalora_kept": self.allocator.kept}
        return {"adam_count": self.count, **kept}

    @property
    def count(self) -> Tensor:
        """Steps made, []."""
        return self.stepped_groups[0].count

    @torch.no_grad()
    def set_moments(self, m: Tensor, v: Tensor, counters: Mapping[str, Tensor]) -> None:
        """Restore what `moments` and `counters` gave."""
        for own, whole in ((self.m, m), (self.v, v)):
            for group, part in zip(self.groups, self._by_group(own), strict=True):
                part.copy_(whole[group.part])
        for stepped in self.stepped_groups:
            stepped.count.copy_(counters["adam_count"])
        if self.allocator is not None:
            self.allocator.kept.copy_(counters["adalora_kept"])

    def stepped(self) -> list[tuple[int, int]]:
        """(start, stop) in ``values``, in bytes, of what the optimizer of this rank holds: found by
        memory, whatever it was given."""
        held = [group.values for group in self.stepped_groups if group.values.numel()]
        start = self.params.values.data_ptr()
        return [(p.data_ptr() - start, p.data_ptr() - start + p.nbytes) for p in held]
