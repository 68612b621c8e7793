"""Several jobs of one pass, as a plan counts them: one base, every job's adapter, gradients and
moments, and the activations of the largest micro-batch that they run.

    jobs = list_planned_jobs(run, shape)
    estimate_memory(shape, combine_adapters(jobs), joint_setup(run, jobs, "float32", "cpu", tiles=False))

Small micro-batches of several jobs share a forward pass up to `joint_tokens`, larger ones take turns
(data/stream/joint.py): so tokens at once are those of the largest job, or as many as share a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorry.config import runs_by_adapter
from lorry.config.schema import RunConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import PlannedAdapter, plan_adapter
from lorry.plan.choices import require_lora
from lorry.plan.constants import MIN_BATCH_TOKENS
from lorry.plan.memory import DeviceType, MemorySetup, PrecisionName
from lorry.plan.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job: its adapter and what of it runs at once. ``rows`` of at most ``length`` tokens are a
    micro-batch, ``accumulation`` of them a step.
    """

    name: str
    rank: int
    rows: int
    accumulation: int
    length: int
    adapter: PlannedAdapter

    @property
    def tokens(self) -> int:
        """Of one micro-batch, at most."""
        return self.rows * self.length


def refuse_budget_of_jobs(run: RunConfig) -> None:
    """A budget chooses one rank and one micro-batch, and jobs have each their own. Raises
    ConfigError.
    """
    if run.memory_budget is not None and run.jobs:
        raise ConfigError(
            "memory_budget is not chosen for several jobs yet; leave out memory_budget or jobs. "
            "`lorry plan` with the jobs and without memory_budget says what they need"
        )


def list_planned_jobs(
    run: RunConfig, shape: ModelShape, found: Mapping[str, int] | None = None
) -> list[PlannedJob]:
    """The jobs of a description, each with what it would read alone; without `jobs` the one adapter
    of each name and rank in ``found``. Raises ConfigError.
    """
    refuse_budget_of_jobs(run)
    # a plan has no output_dir, and a job's is a folder in it
    runs = runs_by_adapter(run.model_copy(update={"output_dir": Path()})) if run.jobs else {}
    ranks = {name: int(require_lora(one).r) for name, one in runs.items()} or dict(found or {})
    return [
        PlannedJob(
            name=name,
            rank=rank,
            rows=one.train.per_device_train_batch_size,
            accumulation=one.train.gradient_accumulation_steps,
            length=one.data.max_length,
            adapter=plan_adapter(shape, require_lora(one), rank),
        )
        for name, rank in ranks.items()
        for one in [runs.get(name, run)]
    ]


def combine_adapters(jobs: Sequence[PlannedJob]) -> PlannedAdapter:
    """All adapters as one: at every matrix the widest, since a token has one job's term alone, and
    the values of all of them.
    """
    widest = {
        matrix.path: matrix
        for matrix in sorted((m for j in jobs for m in j.adapter.matrices), key=lambda m: m.rank)
    }
    matrices = tuple(widest.values())
    values = sum(job.adapter.parameters for job in jobs)
    return PlannedAdapter(matrices, values - sum(m.parameters for m in matrices))


def joint_setup(
    run: RunConfig,
    jobs: Sequence[PlannedJob],
    precision: PrecisionName,
    device: DeviceType,
    *,
    tiles: bool,
) -> MemorySetup:
    """How they run: as many tokens at once as the largest micro-batch has, or as share a pass."""
    room = run.joint_tokens or MIN_BATCH_TOKENS[device]
    together = min(room, sum(job.tokens for job in jobs))
    return MemorySetup(
        tokens=max(together, *(job.tokens for job in jobs)),
        length=max(job.length for job in jobs),
        recompute="full" if run.train.gradient_checkpointing else "none",
        precision=precision,
        device=device,
        tiles=tiles,
        whole=True,
    )
