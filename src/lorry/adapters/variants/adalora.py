"""AdaLoRA: y = W x + s B (E * (A x)), where every rank of every module has a factor E of its own, and
those of the ranks that matter least become 0 as training goes (Zhang et al. 2023, arXiv 2303.10512).

What trains is one adapter of full rank; `RankAllocator` scores its triplets (a row of A, its E, a
column of B) and zeroes. What is saved is plain LoRA: `fold_triplets` multiplies E into A and leaves out
what is 0, so that ranks differ from module to module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorry.adapters.bank import Adapter
from lorry.adapters.layers import AdaptableLayer, AdapterSlot, BankEmbedding
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.parameters import FurtherStart
from lorry.errors import ConfigError

if TYPE_CHECKING:
    from lorry.adapters.trainable import ParameterSet


def adalora_starts(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """E [R,1] of every module, 0 as the low-rank term is before the first step. Raises ConfigError for
    an embedding, whose A is looked up, and for modules that ranks share."""
    if spec.adalora is None:
        return {}
    for path, layer in targets.items():
        if isinstance(layer, BankEmbedding):
            raise ConfigError(
                f"AdaLoRA is for linear layers, and {path} is an embedding; leave it out of "
                "target_modules, or use variant=lora"
            )
        if layer.slices is not None:
            raise ConfigError(
                "AdaLoRA scores whole rows and columns, of which tensor-parallel processes have parts; "
                "leave backend.tensor_parallel out, or use variant=lora"
            )
    return {
        f"{path}.lora_E": FurtherStart(
            (rank, 1), partial(torch.zeros, rank, 1), path, _use, low_rank=True
        )
        for path, rank in ((path, spec.rank(path)) for path in targets)
    }


def _use(param: nn.Parameter, slot: AdapterSlot | None) -> None:
    assert slot is not None
    slot.E = param


class RankAllocator:
    """Takes an adapter's ranks away over a run of ``total_steps`` steps. It reads gradients: `update` it
    after the optimizer's step and before they are zeroed, as PEFT has it.

    sensitivity, uncertainty: [P] fp32, running means, of each value, of abs(value * gradient) and of
    its distance from that mean; kept: [ranks of all modules] uint8, 0 for a triplet that is gone, all
    1 until the end of the schedule, behind which what is gone stays so. All three are state of the run.
    Raises ConfigError where the schedule does not fit the run.
    """

    def __init__(self, adapter: Adapter, total_steps: int) -> None:
        settings = adapter.spec.adalora
        assert settings is not None, adapter.label
        settings.refuse_steps(total_steps)
        self.adapter, self.settings, self.total_steps = adapter, settings, total_steps
        self.sensitivity = torch.zeros_like(adapter.values)
        self.uncertainty = torch.zeros_like(adapter.values)
        self.ranks = [slot.A.shape[0] for slot in adapter.slots.values()]
        self.kept = torch.ones(sum(self.ranks), dtype=torch.uint8, device=adapter.values.device)

    @torch.no_grad()
    def add_orthogonality_gradient(self) -> None:
        """Add that of orth_reg_weight times the mean, over all A and B, of the Frobenius norms of
        A A^T - I and B^T B - I: once a step, as a term of the loss has it."""
        slots = self.adapter.slots.values()
        factor = self.settings.orth_reg_weight / (2 * len(slots))
        if not factor:
            return
        for slot in slots:
            # of the rows of A, and of B's columns as rows
            for master, transposed in ((slot.A, False), (slot.B, True)):
                assert master.grad is not None
                rows = master.t() if transposed else master
                off = rows @ rows.t()
                off.diagonal().sub_(1)
                norm = off.norm()
                # of a norm at 0 there is no gradient; torch.norm gives 0 too
                scale = torch.where(norm > 0, 2 * factor / norm, torch.zeros_like(norm))
                grad = off.mul_(scale) @ rows
                master.grad.add_(grad.t() if transposed else grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """What follows the optimizer's step number ``step``, from 1: the scores, and, when it is time,
        zeros in the E's of those that do not fit the budget."""
        end = self.total_steps - self.settings.tfinal
        if step < end:
            self._smooth()
        if step > end and not bool(self.kept.all()):
            kept = self.kept.bool()
        else:
            budget = self.settings.budget(
                step, self.total_steps, sum(self.ranks), self.settings.target_r * len(self.ranks)
            )
            if budget is None:
                return
            kept = self._fitting(budget)
            if step >= end:
                self.kept.copy_(kept)
        for slot, own in zip(self.adapter.slots.values(), kept.split(self.ranks), strict=True):
            assert slot.E is not None
            slot.E.masked_fill_(~own[:, None], 0.0)

    def _smooth(self) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        now = (self.adapter.values * self.adapter.grads).abs_()
        self.sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
        # from the new mean, as PEFT has it
        distance = now.sub_(self.sensitivity).abs_()
        self.uncertainty.mul_(beta2).add_(distance, alpha=1 - beta2)

    def _fitting(self, budget: int) -> Tensor:
        """[ranks of all modules] bool: the triplets that stay, ``budget`` of them or fewer where scores
        are equal."""
        scores = torch.cat(self.scores())
        if budget >= scores.numel():
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = torch.kthvalue(scores, scores.numel() - budget)[0]
        return scores > threshold

    def scores(self) -> list[Tensor]:
        """[R] of each module: sensitivity times uncertainty of E, and their means over A's row and B's
        column."""
        adapter = self.adapter
        each = adapter.split_like(self.sensitivity * self.uncertainty)
        return [
            each[f"{path}.lora_E"][:, 0]
            + (each[f"{path}.lora_A"].mean(1) + each[f"{path}.lora_B"].mean(0))
            for path in adapter.slots
        ]


def rank_allocator(params: ParameterSet, total_steps: int) -> RankAllocator | None:
    """The allocator of an AdaLoRA adapter; None for whatever else trains. Raises ConfigError as that
    does."""
    if not isinstance(params, Adapter) or params.spec.adalora is None:
        return None
    return RankAllocator(params, total_steps)


@torch.no_grad()
def fold_triplets(adapter: Adapter) -> Adapter:
    """The plain LoRA adapter of the same function, not attached and frozen: E * A without the rows that
    are 0, and their columns of B; modules with nothing left are none of its targets. Raises
    ConfigError if all of them are such."""
    spec = adapter.spec
    kept = {path: slot.E[:, 0] != 0 for path, slot in adapter.slots.items() if slot.E is not None}
    ranks = {path: int(rows.sum()) for path, rows in kept.items() if bool(rows.any())}
    if not ranks:
        raise ConfigError(
            f"{adapter.label} has no rank left at any module (AdaLoRA before its first step, or without "
            "a gradient); there is nothing to save"
        )
    plain = plain_spec(spec, ranks)
    slots = {path: adapter.slots[path] for path in ranks}
    factors = [(s.lora_A.detach()[kept[p]], s.B.detach()[:, kept[p]]) for p, s in slots.items()]
    halves = [a for a, _ in factors] + [b for _, b in factors]
    values = torch.cat([half.reshape(-1) for half in halves])
    folded = Adapter(
        adapter.name, plain, values, values.new_empty(0), sum(a.numel() for a, _ in factors)
    )
    for (path, slot), (a, b) in zip(slots.items(), factors, strict=True):
        folded.slots[path] = AdapterSlot(
            path, nn.Parameter(a), nn.Parameter(b), plain.scale(path), slot.dropout
        )
    folded.use_buffers(values, folded.grads)
    folded.freeze()
    return folded


def plain_spec(spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """The spec of plain LoRA with ``ranks`` {path: rank} of an AdaLoRA adapter's, each module scaled as
    it was with all of them."""
    most = max(ranks.values())
    # not escaped, though PEFT reads a pattern: a dot matches itself
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return replace(
        spec,
        r=most,
        lora_alpha=spec.alpha("") * most / spec.r,
        rank_pattern=others,
        alpha_pattern={path: spec.alpha("") * rank / spec.r for path, rank in others.items()},
        adalora=None,
    ).at_modules(ranks)
