"""AdaLoRA: y = W x + s B (E * (A x)), where every rank of every module has a factor E of its own, and
those of the ranks that matter least become 0 as training goes (Zhang et al. 2023, arXiv 2303.10512).

What trains is one adapter of full rank; `RankAllocator` scores its triplets (a row of A, its E, a
column of B) and zeroes. What is saved is plain LoRA: `fold_triplets` multiplies E into A and leaves out
what is 0, so that ranks differ from module to module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.flat_buffer import TensorStack, stack_equal
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.parameters import FurtherStart, zeros
from lorry.errors import ConfigError

if TYPE_CHECKING:
    from lorry.adapters.trainable import ParameterSet

# values whose scores are smoothed at a time on a CPU: with their gradients and both means they stay in
# its cache, which takes a third of the time of whole passes over the buffers
BLOCK = 1 << 15


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
        f"{path}.lora_E": FurtherStart((rank, 1), zeros(rank, 1), path, _use, low_rank=True)
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
        self.modules, self.rank = len(adapter.slots), adapter.spec.r
        self.kept = torch.ones(
            self.modules * self.rank, dtype=torch.uint8, device=adapter.values.device
        )
        self._halves = (self._stacks("A"), self._stacks("B"))

    def _stacks(self, half: str) -> list[TensorStack]:
        """The A's or B's of all modules, as they lie in the adapter's buffer."""
        views = self.adapter.split_like(self.sensitivity)
        own = [views[f"{path}.lora_{half}"] for path in self.adapter.slots]
        return stack_equal([v.shape for v in own], [int(v.storage_offset()) for v in own])

    def _factors(self, flat: Tensor) -> Tensor:
        """Of [P] what is the E's, [modules, R]: they lie behind all A's and B's, one after the other."""
        return flat[flat.numel() - self.modules * self.rank :].view(self.modules, self.rank)

    @torch.no_grad()
    def add_orthogonality_gradient(self) -> None:
        """Add that of orth_reg_weight times the mean, over all A and B, of the Frobenius norms of
        A A^T - I and B^T B - I: once a step, as a term of the loss has it."""
        factor = self.settings.orth_reg_weight / (2 * self.modules)
        if not factor:
            return
        for stacks, transposed in zip(self._halves, (False, True), strict=True):
            for stack in stacks:
                values, grads = stack.view(self.adapter.values), stack.view(self.adapter.grads)
                # of the rows of A, and of B's columns as rows
                rows = values.mT if transposed else values
                off = rows @ rows.mT
                off.diagonal(dim1=1, dim2=2).sub_(1)
                norm = torch.linalg.vector_norm(off, dim=(1, 2), keepdim=True)
                # of a norm at 0 there is no gradient; torch.norm gives 0 too
                off.mul_(torch.where(norm > 0, 2 * factor / norm, 0.0))
                # off is symmetric
                grads.baddbmm_(*((values, off) if transposed else (off, values)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """What follows the optimizer's step number ``step``, from 1: the scores, and, when it is time,
        zeros in the E's of those that do not fit the budget."""
        end = self.total_steps - self.settings.tfinal
        if step < end:
            self._smooth()
        ranks = self.kept.numel()
        if step > end and not bool(self.kept.all()):
            kept = self.kept.bool()
        else:
            least = self.settings.target_r * self.modules
            budget = self.settings.budget(step, self.total_steps, ranks, least)
            if budget is None:
                return
            kept = self._fitting(budget)
            if step >= end:
                self.kept.copy_(kept)
        values = self._factors(self.adapter.values)
        values.masked_fill_(~kept.view(values.shape), 0.0)
        self.adapter.touch()

    def _smooth(self) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        flat = (self.adapter.values, self.adapter.grads, self.sensitivity, self.uncertainty)
        size = BLOCK if self.kept.device.type == "cpu" else max(self.sensitivity.numel(), 1)
        scratch = torch.empty_like(self.sensitivity[:size])
        for values, grads, mean, spread in zip(*(t.split(size) for t in flat), strict=True):
            now = torch.mul(values, grads, out=scratch[: len(values)]).abs_()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            # from the new mean, as PEFT has it
            distance = now.sub_(mean).abs_()
            spread.mul_(beta2).add_(distance, alpha=1 - beta2)

    def _fitting(self, budget: int) -> Tensor:
        """[ranks of all modules] bool: the triplets that stay, ``budget`` of them or fewer where scores
        are equal."""
        scores = self.scores().flatten()
        if budget >= scores.numel():
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = torch.kthvalue(scores, scores.numel() - budget)[0]
        return scores > threshold

    def scores(self) -> Tensor:
        """[modules, R]: sensitivity times uncertainty of E, and their means over A's row and B's column."""
        means = torch.zeros_like(self._factors(self.sensitivity))
        for stacks, dim in zip(self._halves, (2, 1), strict=True):
            for stack in stacks:
                product = stack.view(self.sensitivity) * stack.view(self.uncertainty)
                means[list(stack.members)] += product.mean(dim)
        return self._factors(self.sensitivity) * self._factors(self.uncertainty) + means


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
