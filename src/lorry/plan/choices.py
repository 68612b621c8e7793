"""One run description and one shape: which choices are open, which of them fits the budget, and
what to say of it.

`lorry plan` shows the answer; `lorry sft` takes it (train/resources/budget.py). What is open: the
rank if it is `auto`; and, once there is a memory_budget, recompute if gradient_checkpointing was
left alone, and how a step's rows are cut into micro-batches if neither per_device_train_batch_size
nor gradient_accumulation_steps was given. None of these changes what is learnt but the rank.

Several jobs of one pass leave nothing open: they are one base, every job's adapter, gradients and
moments, and the activations of the largest micro-batch. Small micro-batches of several share a
forward pass up to `joint_tokens`, larger ones take turns (data/stream/joint.py).

    jobs = list_planned_jobs({"a": JobSettings(lora, train, max_length, rank)}, shape)
    estimate_memory(shape, combine_adapters(jobs), joint_setup(jobs, "float32", "cpu", attention="none"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema.job import JobConfig
from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.step_reads import ROW_ALONE, StepReads
from lorry.config.schema.train import TrainConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import PlannedAdapter, largest_rank, plan_adapter
from lorry.plan.constants import MIN_BATCH_TOKENS
from lorry.plan.full.weights import plan_weights
from lorry.plan.memory import (
    DeviceType,
    MemoryEstimate,
    MemorySetup,
    PrecisionName,
    RecomputeMode,
    estimate_memory,
)
from lorry.plan.ranks import rank_grid
from lorry.plan.search import (
    ChoiceSearchResult,
    PlanChoice,
    batch_splits,
    enumerate_choices,
    search_choices,
)
from lorry.plan.shapes import ModelShape
from lorry.processor import AttentionKernel

MemoryOfChoice = Callable[[PlanChoice], MemoryEstimate]
# of quantize=auto, after the whole base: the nearer to it first
AUTO_FORMATS: tuple[PrecisionName, ...] = ("int8", "nf4")
SPLIT_FIELDS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def require_lora(lora: LoraConfig | None) -> LoraConfig:
    """The adapter's settings, which are there. Raises ConfigError for lora=null."""
    if lora is None:
        raise ConfigError(
            "lora=null trains the base weights, and several jobs of one pass are adapters; plan a run "
            "of such weights alone (lorry plan MODEL lora=null)"
        )
    return lora


def memory_setup(
    max_length: int,
    choice: PlanChoice,
    device: DeviceType,
    attention: AttentionKernel,
    reads: StepReads = ROW_ALONE,
    compute: PrecisionName | None = None,
) -> MemorySetup:
    """How a choice runs: micro-batches of at most rows x max_length tokens, times the sequences that
    are read for each row. ``attention``: see `MemorySetup`, and so ``compute``.
    """
    return MemorySetup(
        tokens=choice.rows * max_length * reads.together,
        step_tokens=choice.rows * max_length * reads.passes * choice.accumulation,
        reads=reads,
        length=max_length,
        recompute=choice.recompute,
        precision=choice.precision,
        device=device,
        attention=attention,
        whole=True,
        compute=compute,
    )


def adapter_at_rank(
    lora: LoraConfig | None,
    shape: ModelShape,
    frozen: int = 0,
    trainable: str | list[str] | None = None,
) -> Callable[[int], PlannedAdapter]:
    """The adapter at a rank, made once per rank; without ``lora`` the base weights that train, which have
    none. ``frozen``: values of adapters under it."""

    @cache
    def adapter(rank: int) -> PlannedAdapter:
        if lora is None:
            return replace(plan_weights(shape, trainable), frozen=frozen)
        planned = plan_adapter(shape, lora, rank)
        return replace(planned, frozen=planned.frozen + frozen)

    return adapter


def single_device_memory(
    lora: LoraConfig,
    max_length: int,
    shape: ModelShape,
    device: DeviceType,
    attention: AttentionKernel,
    *,
    reads: StepReads = ROW_ALONE,
    frozen: int = 0,
    compute: PrecisionName | None = None,
) -> MemoryOfChoice:
    """Memory of a choice on a single device. ``frozen``: values of adapters under the one that
    trains; ``compute``: see `MemorySetup`.
    """
    adapter = adapter_at_rank(lora, shape, frozen)
    return lambda choice: estimate_memory(
        shape,
        adapter(choice.rank),
        memory_setup(max_length, choice, device, attention, reads, compute),
    )


def open_choices(
    lora: LoraConfig | None,
    train: TrainConfig,
    shape: ModelShape,
    precisions: Sequence[PrecisionName],
    *,
    has_budget: bool,
    rank: int | None = None,
) -> list[PlanChoice]:
    """Every choice the settings leave open, preferred ones first; exactly one without a
    memory_budget. ``rank``: of an adapter that exists already."""
    if lora is None:
        ranks = [0]
    elif rank is None and lora.r == "auto":
        ranks = rank_grid(largest_rank(shape, lora))
        if not has_budget:  # rows are yet to choose; no more than this
            ranks = [min(ranks[-1], lora.most_rank)]
    else:
        ranks = [rank if rank is not None else lora.most_rank]
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    # either field given fixes the split: half of what somebody asked for is not what they asked
    split = has_budget and not (SPLIT_FIELDS & train.model_fields_set)
    recompute: list[RecomputeMode] = ["full" if train.gradient_checkpointing else "none"]
    if has_budget and "gradient_checkpointing" not in train.model_fields_set:
        recompute = ["none", "full"]
    return enumerate_choices(
        ranks,
        batch_splits(rows, accumulation) if split else [(rows, accumulation)],
        recompute,
        precisions,
    )


def base_precisions(
    quantize: str | None,
    held: PrecisionName | None,
    whole: PrecisionName,
    kept: PrecisionName,
) -> list[PrecisionName]:
    """The formats that a base may have, preferred ones first: several with model.quantize=auto.
    ``held``: of one whose files are packed already, which stays so; ``whole``: of one that is not;
    ``kept``: with model.quantize=keep."""
    if held is not None:
        return [held]
    if quantize == "auto":
        return [whole, *AUTO_FORMATS]
    if quantize == "keep":
        return [kept]
    return [cast(PrecisionName, quantize)] if quantize is not None else [whole]


def find_fitting_choice(
    memory_budget: str, options: Sequence[PlanChoice], need: MemoryOfChoice
) -> ChoiceSearchResult:
    """The search within a budget, such as 3GiB."""
    return search_choices(parse_size(memory_budget), options, need)


def no_choice_fits_error(memory_budget: str, search: ChoiceSearchResult) -> ConfigError:
    """No choice fits: say so with the smallest budget that would do, and the largest part of it."""
    least, memory = search.least.choice, search.least.memory
    most = max(memory.components, key=lambda c: c.bytes)
    enough = -(-memory.total // 2**20)  # whole MiB, rounded up, so that the advice itself fits
    return ConfigError(
        f"memory_budget={memory_budget}: nothing fits. The smallest choice "
        f"({least.words()}) needs {size_in_words(memory.total)}, "
        f"{size_in_words(most.bytes)} of it {most.name}; give "
        f"memory_budget={enough}MiB or more, a smaller model or max_length"
    )


# --- several jobs of one pass


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job: its adapter and what of it runs at once. ``rows`` of at most ``length`` tokens are a
    micro-batch, ``accumulation`` of them a step; ``reads``: what is read for each row.
    """

    name: str
    rank: int
    rows: int
    accumulation: int
    length: int
    adapter: PlannedAdapter
    reads: StepReads = ROW_ALONE

    @property
    def tokens(self) -> int:
        """Of one micro-batch, at most."""
        return self.rows * self.length * self.reads.together

    @property
    def step_tokens(self) -> int:
        """Run forward and backward in one step, at most."""
        return self.rows * self.length * self.reads.passes * self.accumulation


@dataclass(frozen=True)
class JobSettings:
    """What a plan reads of one job's settings; ``rank``: of its adapter, which may exist already."""

    lora: LoraConfig
    train: TrainConfig
    max_length: int
    rank: int
    reads: StepReads = ROW_ALONE


def refuse_budget_of_jobs(memory_budget: str | None, jobs: Sequence[JobConfig]) -> None:
    """A budget chooses one rank and one micro-batch, and jobs have each their own. Raises
    ConfigError.
    """
    if memory_budget is not None and jobs:
        raise ConfigError(
            "memory_budget cannot be used with several jobs yet; leave out "
            "memory_budget or jobs. `lorry plan` with the jobs and without "
            "memory_budget shows what they need"
        )


def list_planned_jobs(jobs: Mapping[str, JobSettings], shape: ModelShape) -> list[PlannedJob]:
    """The jobs of a pass by the names of their adapters, each with what it would read alone."""
    return [
        PlannedJob(
            name=name,
            rank=job.rank,
            rows=job.train.per_device_train_batch_size,
            accumulation=job.train.gradient_accumulation_steps,
            length=job.max_length,
            adapter=plan_adapter(shape, job.lora, job.rank),
            reads=job.reads,
        )
        for name, job in jobs.items()
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
    jobs: Sequence[PlannedJob],
    precision: PrecisionName,
    device: DeviceType,
    *,
    attention: AttentionKernel,
    recompute: RecomputeMode = "none",
    joint_tokens: int | None = None,
    compute: PrecisionName | None = None,
) -> MemorySetup:
    """How they run: as many tokens at once as the largest micro-batch has, or as share a pass."""
    room = joint_tokens or MIN_BATCH_TOKENS[device]
    together = min(room, sum(job.tokens for job in jobs))
    return MemorySetup(
        tokens=max(together, *(job.tokens for job in jobs)),
        step_tokens=sum(job.step_tokens for job in jobs),
        # what decides the passes is one for all the jobs of an unlearning run
        reads=next((job.reads for job in jobs if job.reads.asks_start), jobs[0].reads),
        length=max(job.length for job in jobs),
        recompute=recompute,
        precision=precision,
        device=device,
        attention=attention,
        whole=True,
        compute=compute,
    )
