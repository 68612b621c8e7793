"""Gradients of unlearning that are not those of the loss: made of the flat gradients of its two
parts, of what is to be forgotten and of what is to be retained.

    rule = make_gradient_rule("sam", {"default": 0.01})       # None for "plain"
    LocalBackend(model, ["default"], optim, gradient=rule)

A rule wants the parts in micro-batches of their own: `pairing.split_parts`. K adapters each have a
gradient, and a rule's numbers, of their own. P parameters of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorry.adapters.trainable import ParameterSet
from lorry.backends.protocol import AddGradients, GradientRule
from lorry.data.batch import Batch
from lorry.tasks.unlearn.pairing import RETAIN

GRU_SHARE = 0.8  # of a step's own retain gradient in the mean over steps, as open-unlearning has it


class SharpnessAware:
    """The gradient of L_f where it is steepest nearby, at theta + rho g_f / |g_f|, plus that of L_r at
    theta (SAM; Fan et al. 2025, arXiv 2502.05374). What is reported of L_f is its value
    at theta. It costs a second pass over the rows to forget, and a copy of the parameters.
    """

    def __init__(self, radius: Mapping[str, float]) -> None:
        self.radius = radius
        self.params: Mapping[str, ParameterSet] = {}

    def bind(self, params: Mapping[str, ParameterSet]) -> None:
        """Nothing to keep between steps."""
        self.params = params

    def buffers(self, name: str) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def make(self, batches: Sequence[Batch], add: AddGradients) -> None:
        """Two passes over the rows to forget, one over the others."""
        forget, retain = _parts(batches)
        add(forget)
        start = {name: owner.values.clone() for name, owner in self.params.items()}
        try:
            for name, owner in self.params.items():
                norm = owner.norm()
                # 0 has no direction; what is not finite is told of once the step is whole
                if 0 < norm < float("inf"):
                    owner.values.add_(owner.grads, alpha=self.radius[name] / norm)
                    owner.touch()
                owner.grads.zero_()
            # not counted: what is reported of L_f is its value at theta
            add(forget, counted=False)
        finally:  # a loss that is not finite there must not leave the model there
            for name, owner in self.params.items():
                # copied, not subtracted: theta + e - e is not theta
                owner.values.copy_(start[name])
                owner.touch()
        add(retain)


class GradientRectified:
    """g_f without what would undo what is retained: m = 0.8 g_r + 0.2 m; where g_f . m < 0, g_f loses
    its part along m (GRU; Wang et al. 2025, arXiv 2503.09117). The step is along g_f alone.

    Only the direction of m is read. A factor of g_r that stays (alpha) changes nothing; one that
    moves, PDU's lambda, would weigh the steps of the mean, so that PDU leaves it out here
    (`UnlearnMethod.direction_only`): g_r is the gradient of L_r, as in the paper.
    """

    def __init__(self) -> None:
        self.params: Mapping[str, ParameterSet] = {}
        self.momentum: dict[str, Tensor] = {}

    def bind(self, params: Mapping[str, ParameterSet]) -> None:
        """A mean retain gradient [P] for each."""
        self.params = params
        self.momentum = {name: torch.zeros_like(owner.grads) for name, owner in params.items()}

    def buffers(self, name: str) -> Mapping[str, Tensor]:
        """The mean, for a checkpoint."""
        return {"retain_momentum": self.momentum[name]}

    def make(self, batches: Sequence[Batch], add: AddGradients) -> None:
        """One pass over the rows to retain, one over those to forget."""
        forget, retain = _parts(batches)
        # first, so that one buffer serves both: g_r has moved into the mean before g_f comes
        add(retain)
        for name, owner in self.params.items():
            self.momentum[name].mul_(1 - GRU_SHARE).add_(owner.grads, alpha=GRU_SHARE)
            owner.grads.zero_()
        add(forget)
        for name, owner in self.params.items():
            mean = self.momentum[name]
            along, size = owner.dot(owner.grads, mean), owner.dot(mean, mean)
            if along < 0 < size:
                owner.grads.sub_(mean, alpha=along / size)


def _parts(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The micro-batches of rows to forget, and those of rows to retain."""
    retain = [RETAIN in batch.role for batch in batches]
    return (
        [batch for batch, is_retain in zip(batches, retain, strict=True) if not is_retain],
        [batch for batch, is_retain in zip(batches, retain, strict=True) if is_retain],
    )


def make_gradient_rule(kind: str, radius: Mapping[str, float]) -> GradientRule | None:
    """By its name. ``radius``: SAM's rho of each adapter."""
    rules: dict[str, GradientRule | None] = {
        "plain": None,
        "sam": SharpnessAware(radius),
        "gru": GradientRectified(),
    }
    return rules[kind]
