"""A finished plan: everything known before a run, as one value that turns into plain JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lorry.plan.choices import PlannedJob
from lorry.plan.flops import TokenFlops
from lorry.plan.memory import MemoryEstimate, MemorySetup
from lorry.plan.parallel.communication import AdapterSizes, Collective
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.rates import RateMeasurement
from lorry.plan.search import ChoiceSearchResult, PlanChoice, TriedChoice
from lorry.plan.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """Time of a step: at ``rate`` FLOP/s (``source`` says whose) times a stated ``efficiency``, on
    all devices together. ``measured``: when and how, if it was (plan/rates.py); a rate of training
    steps is what they reached, its efficiency is 1."""

    rate: float
    source: str
    measured: RateMeasurement | None
    efficiency: float
    tokens_per_second: float
    seconds_per_step: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """``memory`` is one device's. ``budget``: bytes it must fit, given or the device's own; None:
    nothing to fit.

    ``sent``: what one device sends in a step; ``adapter_sizes``: of its files and of a sync.
    ``search``: the search, if a memory_budget was given; ``alternative``: what would fit a GPU's own
    memory. ``trainable`` False: this can be planned but not run here yet. ``jobs``: the adapters of one
    pass, where there are several; ``choice`` is then that of the largest micro-batch, with the highest
    rank, and ``flops`` are those of a token of the dearest job.
    """

    model: str
    where: str
    shape: ModelShape
    choice: PlanChoice
    setup: MemorySetup
    split: ParallelSplit
    adapter_parameters: int
    adapter_sizes: AdapterSizes
    memory: MemoryEstimate
    flops: TokenFlops
    speed: StepSpeed | None
    budget: int | None
    budget_is: str
    search: ChoiceSearchResult | None
    alternative: TriedChoice | None
    trainable: bool
    jobs: tuple[PlannedJob, ...] = ()
    sent: tuple[Collective, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        return None if self.budget is None else self.memory.total <= self.budget

    @property
    def sent_per_step(self) -> int:
        """Bytes that one device sends in an optimizer step."""
        return sum(collective.sent for collective in self.sent)

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes, FLOPs, seconds."""
        tried = [] if self.search is None else self.search.tried
        return {
            "model": self.model,
            "config": self.where,
            "native": self.shape.native,
            "parameters": self.shape.parameters,
            "adapter_parameters": self.adapter_parameters,
            "adapter_bytes": asdict(self.adapter_sizes),
            "choice": asdict(self.choice),
            "jobs": [
                {
                    "name": job.name,
                    "rank": job.rank,
                    "rows": job.rows,
                    "accumulation": job.accumulation,
                    "length": job.length,
                    "parameters": job.adapter.parameters,
                }
                for job in self.jobs
            ],
            "setup": asdict(self.setup),
            "split": asdict(self.split),
            "memory": {c.name: c.bytes for c in self.memory.components},
            "total": self.memory.total,
            "sent_per_step": self.sent_per_step,
            "collectives": [
                {**asdict(c), "sent_each": c.sent_each, "sent": c.sent} for c in self.sent
            ],
            "budget": self.budget,
            "fits": self.fits,
            "trainable": self.trainable,
            "flops_per_token": {**asdict(self.flops), "step": self.flops.step},
            "speed": None if self.speed is None else asdict(self.speed),
            "tried": [
                {**asdict(t.choice), "total": t.memory.total, "passes_the_budget_at": t.overrun}
                for t in tried
            ],
            "instead": None if self.alternative is None else asdict(self.alternative.choice),
            "notes": self.notes,
        }
