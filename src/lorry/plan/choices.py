"""One run description and one shape: which choices are open, which of them fits the budget, and
what to say of it.

`lorry plan` shows the answer; `lorry sft` takes it (train/resources/budget.py). What is open: the
rank if it is `auto`; and, once there is a memory_budget, recompute if gradient_checkpointing was
left alone, and how a step's rows are cut into micro-batches if neither per_device_train_batch_size
nor gradient_accumulation_steps was given. None of these changes what is learnt but the rank.

Several jobs of one pass leave nothing open: they are one base, every job's adapter, gradients and
moments, and the activations of the largest micro-batch. Small micro-batches of several share a
forward pass up to `joint_tokens`, larger ones take turns (data/stream/joint.py).

    jobs = list_planned_jobs(run, shape)
    estimate_memory(shape, combine_adapters(jobs), joint_setup(run, jobs, "float32", "cpu", tiles=False))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorry.config import runs_by_adapter
from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema import LoraConfig, RunConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import PlannedAdapter, largest_rank, plan_adapter
from lorry.plan.constants import MIN_BATCH_TOKENS
from lorry.plan.memory import (
    DeviceType,
    MemoryEstimate,
    MemorySetup,
    PrecisionName,
    RecomputeMode,
    estimate_memory,
)
from lorry.plan.search import (
    ChoiceSearchResult,
    PlanChoice,
    batch_splits,
    enumerate_choices,
    powers_of_two,
    search_choices,
)
from lorry.plan.shapes import ModelShape

MemoryOfChoice = Callable[[PlanChoice], MemoryEstimate]
SPLIT_FIELDS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def require_lora(run: RunConfig) -> LoraConfig:
    """The adapter's settings. Raises ConfigError for lora=null."""
    if run.lora is None:
        raise ConfigError(
            "lora=null trains the base itself, which is not planned yet: count 16 bytes a weight that trains (fp32 master, "
            "gradient, two moments), beside the base and the activations"
        )
    return run.lora


def memory_setup(
    run: RunConfig, choice: PlanChoice, device: DeviceType, tiles: bool
) -> MemorySetup:
    """How a choice runs: micro-batches of at most rows x max_length tokens. ``tiles``: see
    `MemorySetup`.
    """
    return MemorySetup(
        tokens=choice.rows * run.data.max_length,
        length=run.data.max_length,
        recompute=choice.recompute,
        precision=choice.precision,
        device=device,
        tiles=tiles,
        whole=True,
    )


def adapter_at_rank(run: RunConfig, shape: ModelShape) -> Callable[[int], PlannedAdapter]:
    """The run's adapter at a rank, made once per rank."""
    lora = require_lora(run)

    @cache
    def adapter(rank: int) -> PlannedAdapter:
        return plan_adapter(shape, lora, rank)

    return adapter


def single_device_memory(
    run: RunConfig, shape: ModelShape, device: DeviceType, tiles: bool
) -> MemoryOfChoice:
    """Memory of a choice on a single device."""
    adapter = adapter_at_rank(run, shape)
    return lambda choice: estimate_memory(
        shape, adapter(choice.rank), memory_setup(run, choice, device, tiles)
    )


def open_choices(
    run: RunConfig,
    shape: ModelShape,
    precisions: Sequence[PrecisionName],
    *,
    rank: int | None = None,
) -> list[PlanChoice]:
    """Every choice the description leaves open, preferred ones first; exactly one without a
    memory_budget. ``rank``: of an adapter that exists already."""
    lora, train = require_lora(run), run.train
    if rank is None and lora.r == "auto":
        ranks = powers_of_two(largest_rank(shape, lora))
    else:
        ranks = [rank if rank is not None else int(lora.r)]
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    free = run.memory_budget is not None
    # either field given fixes the split: half of what somebody asked for is not what they asked
    split = free and not (SPLIT_FIELDS & train.model_fields_set)
    recompute: list[RecomputeMode] = ["full" if train.gradient_checkpointing else "none"]
    if free and "gradient_checkpointing" not in train.model_fields_set:
        recompute = ["none", "full"]
    return enumerate_choices(
        ranks,
        batch_splits(rows, accumulation) if split else [(rows, accumulation)],
        recompute,
        precisions,
    )


def find_fitting_choice(
    run: RunConfig, options: Sequence[PlanChoice], need: MemoryOfChoice
) -> ChoiceSearchResult:
    """The search within the description's budget, which must be there."""
    assert run.memory_budget is not None
    return search_choices(parse_size(run.memory_budget), options, need)


def no_choice_fits_error(run: RunConfig, found: ChoiceSearchResult) -> ConfigError:
    """No choice fits: say so with the smallest budget that would do, and the largest part of it."""
    least, memory = found.least.choice, found.least.memory
    most = max(memory.components, key=lambda c: c.bytes)
    enough = -(-memory.total // 2**20)  # whole MiB, rounded up, so that the advice itself fits
    return ConfigError(
        f"memory_budget={run.memory_budget}: nothing fits. The leanest choice ({least.words()}) needs {size_in_words(memory.total)}, "
        f"{size_in_words(most.bytes)} of it {most.name}; give memory_budget={enough}MiB or more, a smaller model or max_length"
    )


# --- several jobs of one pass


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
