"""The loss of a router: the mixture's on each domain's rows, domains weighed equally, and losses of
the router's own logits.

A term per domain, each divided by its own supervised tokens: one mean over all tokens would be that
of the domain with the longest answers. T tokens, N sites (halves of layers), K experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.mix import Half
from lorry.adapters.router import TokenRouter
from lorry.backends.protocol import LossTerms, ScoringBackend
from lorry.config.moe import RouterConfig
from lorry.data.batch import Batch
from lorry.data.stream.joint import JointStream
from lorry.models.scoring.score import RouterLogits, TokenScore, Want, log_prob
from lorry.tasks.losses import nll_loss
from lorry.tasks.sft import SftTask

RECORD_STEPS = 10  # between two lines that say who got which tokens
MOST_CONDITION = 5.0  # of a gate matrix; mergekit-moe warns above it, too
RARELY, MOSTLY = 0.01, 0.9  # shares of all tokens outside of which an expert is worth a warning


class DomainTask(SftTask):
    """`SftTask` whose sequences have a domain as role, each an expert's name, and whose domains weigh
    equally. ``evaluation``: held-out batches with roles.
    """

    def __init__(
        self,
        stream: JointStream,
        evaluation: Sequence[Batch],
        total_steps: int,
        adapters: Sequence[str],
        *,
        experts: Sequence[str],
    ) -> None:
        super().__init__(stream, evaluation, total_steps, adapters)
        self.experts = list(experts)

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """nll_EXPERT: the mean over a domain's supervised tokens, over K."""
        nll = nll_loss(got["logprob"], batch)
        return {
            f"nll_{name}": torch.where(of_role(batch, name), nll, 0.0) / len(self.experts)
            for name in self.experts
        }

    def _weights(self, batch: Batch) -> dict[str, Tensor]:
        """[K] of each term: what its sums over a step are divided by."""
        count = len(self.adapters)
        return {f"nll_{name}": batch.count("token", count, name) for name in self.experts}

    def _weigh(self, batch: Batch) -> Batch:
        return batch.with_terms(**self._weights(batch))


class MoeTask(DomainTask):
    """A `DomainTask` with losses of the router's own logits."""

    def __init__(
        self,
        stream: JointStream,
        evaluation: Sequence[Batch],
        total_steps: int,
        adapters: Sequence[str],
        *,
        router: TokenRouter,
        settings: RouterConfig,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(stream, evaluation, total_steps, adapters, experts=router.adapters)
        self.router, self.settings, self.tell = router, settings, tell
        self.step_load = RouterLoad(router)
        self.run_load = RouterLoad(router)
        # [N,K] bool: of the step, where a token whose next one is supervised has an expert
        self.reached: Tensor | None = None

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """Log-probabilities and the router's logits."""
        return {"logprob": TokenScore(log_prob), "router": RouterLogits()}

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The micro-batches of a step."""
        self.run_load.add_load(self.step_load)
        self.step_load, self.reached = RouterLoad(self.router), None
        return super().step_batches(step, models)

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """nll_EXPERT: the mean over a domain's supervised tokens, over K; label, aux, z: times their
        weights, means over tokens and sites."""
        terms, logits, s = dict(super().loss(got, batch)), got["router"], self.settings
        if logits.requires_grad:  # a step's, not an evaluation's
            self.step_load.add(logits.detach(), batch)
            self._note_reached(logits.detach(), batch)
        if s.label_loss:
            own = torch.tensor([self.experts.index(r) for r in batch.role], device=logits.device)
            labels = own[batch.sequence_of][:, None].expand(logits.shape[:2])
            per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            terms["label"] = s.label_loss * batch.sum_by_sequence(
                per_token.view(logits.shape[:2]).mean(1)
            )
        if s.aux_loss:
            # of a micro-batch, as everybody has it: the shares are no sum over sequences
            balance = load_balance_loss(logits, self.router)
            terms["aux"] = s.aux_loss * balance * batch.lengths.to(balance.dtype)
        if s.z_loss:
            terms["z"] = s.z_loss * batch.sum_by_sequence(logits.logsumexp(-1).square().mean(1))
        return terms

    def _note_reached(self, logits: Tensor, batch: Batch) -> None:
        # supervised rows are targets: the token before one predicts it, and its gradient is certain
        # in every layer, where that of a prompt's token ends below the last one
        last = logits[batch.rows - 1]
        reached = (self.router.gates(last.flatten(0, 1)).view_as(last) != 0).any(0)
        self.reached = reached if self.reached is None else self.reached | reached

    def unreached_sites(self) -> dict[str, list[tuple[int, Half]]]:
        """By expert, the halves of layers where no token of the step just made that predicts a
        supervised one had it."""
        if self.reached is None:
            return {}
        return {
            name: [
                site
                for site, had in zip(self.router.sites, self.reached[:, k].tolist(), strict=True)
                if not had
            ]
            for k, name in enumerate(self.router.adapters)
        }

    def record(self, step: int) -> Mapping[str, Any]:
        """What a line of metrics.jsonl says of the step just made, every `RECORD_STEPS` and at the
        end; then also what a person should know of the load."""
        if step == self.total_steps:
            self.run_load.add_load(self.step_load)
            for warning in [*self.run_load.warnings(), *condition_warnings(self.router)]:
                self.tell(warning)
        due = step % RECORD_STEPS == 0 or step == self.total_steps
        return {"router": self.step_load.shares()} if due else {}

    def _weights(self, batch: Batch) -> dict[str, Tensor]:
        weights = super()._weights(batch)
        tokens = batch.lengths.sum().double().expand(len(self.adapters))
        s = self.settings
        for name, factor in (("label", s.label_loss), ("aux", s.aux_loss), ("z", s.z_loss)):
            if factor:
                weights[name] = tokens
        return weights


def of_role(batch: Batch, name: str) -> Tensor:
    """[S] bool: the sequences of a role."""
    return torch.tensor([role == name for role in batch.role], device=batch.starts.device)


def load_balance_loss(logits: Tensor, router: TokenRouter) -> Tensor:
    """E * sum_e f_e P_e, mean over sites, as transformers has it: top_k at balance. logits [T,N,K]."""
    expert_mask = (router.gates(logits.flatten(0, 1)).view_as(logits) != 0).float()
    return logits.shape[-1] * (expert_mask.mean(0) * logits.softmax(-1).mean(0)).sum(-1).mean()


@torch.no_grad()
def gate_conditions(router: TokenRouter) -> dict[tuple[int, Half], float]:
    """Of each matrix: the largest singular value over the smallest, of its rows less their mean. A
    vector that all rows have in common changes no softmax; without it K rows span K - 1 directions,
    and 1 is experts that are all told apart as well as each other."""
    conditions = dict[tuple[int, Half], float]()
    for site, weight in router.weights.items():
        rows = weight.detach().double().cpu()
        values = torch.linalg.svdvals(rows - rows.mean(0))[: len(rows) - 1]
        largest, smallest = float(values[0]), float(values[-1])
        # below what float32 tells from 0 there is no direction
        is_flat = smallest <= largest * torch.finfo(weight.dtype).eps
        conditions[site] = math.inf if is_flat else largest / smallest
    return conditions


def condition_warnings(router: TokenRouter) -> list[str]:
    """A line where experts are told apart much worse than others are."""
    above = {s: c for s, c in gate_conditions(router).items() if c > MOST_CONDITION}
    if not above:
        return []
    (layer, half), worst = max(above.items(), key=lambda site: site[1])
    return [
        f"{len(above)} of {len(router.weights)} gate matrices have a condition above {MOST_CONDITION:g} (layer {layer}, "
        f"{half}: {worst:.1f}): they tell some experts apart much worse than others"
    ]


class RouterLoad:
    """Who got which tokens: per domain and site, each expert's share of the (token, slot) pairs, its
    mean gate, and the entropy of the router's distribution in nats.
    """

    def __init__(self, router: TokenRouter) -> None:
        self.router = router
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a micro-batch: logits [T,N,K]."""
        gates = self.router.gates(logits.flatten(0, 1)).view_as(logits)
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        for s, (start, stop) in enumerate(batch.segments):
            own = slice(start, stop)
            seen = (
                (gates[own] != 0).double().sum(0).cpu(),
                gates[own].double().sum(0).cpu(),
                entropy[own].double().sum(0).cpu(),
                stop - start,
            )
            self._count(batch.role[s], seen)

    def add_load(self, other: RouterLoad) -> None:
        """Count what another has counted."""
        for domain, seen in other.sums.items():
            self._count(domain, seen)

    def _count(self, domain: str, seen: tuple[Tensor, Tensor, Tensor, int]) -> None:
        pairs, gates, entropy, tokens = self.sums.get(domain, (0, 0, 0, 0))
        self.sums[domain] = (pairs + seen[0], gates + seen[1], entropy + seen[2], tokens + seen[3])

    def shares(self) -> dict[str, Any]:
        """{load | gate: {domain: {expert: [N]}}, entropy: {domain: [N]}}."""
        names, shares = self.router.adapters, dict[str, Any](load={}, gate={}, entropy={})
        for domain, (pairs, gates, entropy, tokens) in self.sums.items():
            share = pairs / (tokens * self.router.rule.top_k)
            shares["load"][domain] = {n: _rounded(share[:, k]) for k, n in enumerate(names)}
            shares["gate"][domain] = {
                n: _rounded(gates[:, k] / tokens) for k, n in enumerate(names)
            }
            shares["entropy"][domain] = _rounded(entropy / tokens)
        return shares

    def warnings(self) -> list[str]:
        """A line for each expert that hardly any token, or nearly every one, has."""
        if not self.sums:
            return []
        pairs = torch.stack([counted.sum(0) for counted, *_ in self.sums.values()]).sum(0)
        sites = next(iter(self.sums.values()))[0].shape[0]
        tokens = sum(count for *_, count in self.sums.values()) * sites
        lines = []
        for k, name in enumerate(self.router.adapters):
            share = float(pairs[k]) / tokens
            # of all experts every token has each: nothing to say
            if share < RARELY:
                lines.append(
                    f"expert {name} has {share:.1%} of all tokens: the router hardly uses it"
                )
            elif share > MOSTLY and self.router.rule.top_k < len(self.router.adapters):
                lines.append(
                    f"expert {name} has {share:.0%} of all tokens: the router "
                    "hardly uses the others"
                )
        return lines


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]
