"""The plan of a run: what its description means for memory, messages and time, on one device or on
many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.settings import (
    PlanModel,
)
from lorry.errors import ConfigError
from lorry.plan import machine
from lorry.plan.adapters import PlannedAdapter
from lorry.plan.choices import (
    MemoryOfChoice,
    PlannedJob,
    adapter_at_rank,
    combine_adapters,
    find_fitting_choice,
    joint_setup,
    list_planned_jobs,
    memory_setup,
    no_choice_fits_error,
    open_choices,
)
from lorry.plan.configs import FoundConfig, count_start_values
from lorry.plan.flops import TokenFlops, count_flops
from lorry.plan.memory import (
    DeviceType,
    MemoryEstimate,
    MemorySetup,
)
from lorry.plan.parallel.communication import adapter_sizes, step_collectives
from lorry.plan.parallel.per_rank import memory_per_rank
from lorry.plan.parallel.split import ParallelSplit, check_split
from lorry.plan.report import RunPlan
from lorry.plan.search import ChoiceSearchResult, PlanChoice, TriedChoice
from lorry.plan.shapes import ModelShape, read_model_shape
from lorry.verbs.planning.description import (
    AnyPlanSettings,
    base_formats,
    budget_of,
    compute_format,
    devices_at_once,
    job_settings,
    plan_device,
    plan_split,
    refuse_stages,
    refuse_untrainable,
    rows_of_a_process,
)
from lorry.verbs.planning.notes import plan_notes, unbuilt_backend, why_unpacked
from lorry.verbs.planning.speed import step_speed


def build_plan(settings: AnyPlanSettings, found_config: FoundConfig) -> RunPlan:
    """The whole plan of a description whose model's config was found."""
    shape = read_model_shape(
        found_config.config, where=found_config.where, native=settings.model.native
    )
    device, gpu = plan_device(settings)
    # before the search, whose first choice would meet the error in the middle
    split = plan_split(settings)
    check_split(split, shape)
    settings = rows_of_a_process(settings, split)
    frozen = _start_values(settings, found_config)
    if settings.freezes_start:
        # its adapters are part of the base: those that train are the description's
        found_config = replace(found_config, adapter_ranks={})
    jobs = tuple(list_planned_jobs(job_settings(settings, found_config), shape))
    if len(jobs) > 1:
        return _plan_of_jobs(settings, found_config, shape, jobs, device, gpu, split, frozen)
    lora, has_budget = settings.lora, settings.memory_budget is not None
    refuse_untrainable(settings, split)
    adapters = adapter_at_rank(lora, shape, frozen, settings.trainable)
    options = open_choices(
        lora,
        settings.train,
        shape,
        base_formats(settings, device, found_config),
        has_budget=has_budget,
        rank=found_config.adapter_rank,
    )
    need = _memory_need(settings, adapters, shape, device, split)
    search, choice = None, options[0]
    if settings.memory_budget is not None:
        search = find_fitting_choice(settings.memory_budget, options, need)
        if search.best is None:
            raise _nothing_fits_error(settings.memory_budget, settings.model, search, need)
        choice = search.best.choice
    setup, adapter = (
        memory_setup(
            settings.data.max_length,
            choice,
            device,
            machine.attention_kernel(),
            settings.step_reads,
            compute_format(settings, device),
        ),
        adapters(choice.rank),
    )
    budget, _ = budget_of(settings, gpu)
    alternative = None
    # a GPU's own memory: say what would fit it, without choosing it unasked
    if budget is not None and search is None:
        alternatives = open_choices(
            lora,
            settings.train,
            shape,
            [choice.precision],
            has_budget=True,
            rank=found_config.adapter_rank,
        )
        alternative = find_fitting_choice(f"{budget}B", alternatives, need).best
    return run_plan(
        settings,
        found_config,
        shape,
        choice,
        setup,
        split,
        adapter,
        gpu,
        flops=[count_flops(shape, adapter, setup)],
        tokens=[setup.step_tokens * split.data],
        search=search,
        alternative=alternative,
    )


def _plan_of_jobs(
    settings: AnyPlanSettings,
    found_config: FoundConfig,
    shape: ModelShape,
    jobs: tuple[PlannedJob, ...],
    device: DeviceType,
    gpu: str | None,
    split: ParallelSplit,
    frozen: int,
) -> RunPlan:
    """Several adapters over one base in one pass. Raises ConfigError for a split that cannot be."""
    refuse_stages(split, "several jobs")
    precision = base_formats(settings, device, found_config)[0]
    setup = joint_setup(
        jobs,
        precision,
        device,
        attention=machine.attention_kernel(),
        recompute="full" if settings.train.gradient_checkpointing else "none",
        compute=compute_format(settings, device),
        joint_tokens=settings.joint_tokens,
    )
    adapter = replace(combine_adapters(jobs), frozen=frozen)
    largest = max(jobs, key=lambda job: job.tokens)
    choice = PlanChoice(
        rank=max(job.rank for job in jobs),
        rows=largest.rows,
        accumulation=largest.accumulation,
        recompute=setup.recompute,
        precision=precision,
    )
    flops = [
        count_flops(
            shape,
            replace(job.adapter, frozen=frozen),
            replace(setup, length=job.length, reads=job.reads),
        )
        for job in jobs
    ]
    return run_plan(
        settings,
        found_config,
        shape,
        choice,
        setup,
        split,
        adapter,
        gpu,
        flops=flops,
        tokens=[job.step_tokens * split.data for job in jobs],
        jobs=jobs,
    )


def run_plan(
    settings: AnyPlanSettings,
    found_config: FoundConfig,
    shape: ModelShape,
    choice: PlanChoice,
    setup: MemorySetup,
    split: ParallelSplit,
    adapter: PlannedAdapter,
    gpu: str | None,
    *,
    flops: Sequence[TokenFlops],
    tokens: Sequence[int],
    search: ChoiceSearchResult | None = None,
    alternative: TriedChoice | None = None,
    jobs: tuple[PlannedJob, ...] = (),
) -> RunPlan:
    """A plan with what follows from its description: its memory, its speed, its budget. ``flops`` and
    ``tokens``: for each job that trains, of a token and of an optimizer step on all processes.
    """
    accumulation = choice.accumulation
    budget, budget_is = budget_of(settings, gpu)
    return RunPlan(
        model=settings.model.name,
        where=found_config.where,
        shape=shape,
        choice=choice,
        setup=setup,
        split=split,
        adapter_parameters=adapter.parameters,
        adapter_sizes=adapter_sizes(adapter, setup),
        memory=memory_per_rank(shape, adapter, setup, split, accumulation),
        sent=tuple(step_collectives(shape, adapter, setup, split, accumulation)),
        flops=max(flops, key=lambda each: each.step),
        speed=step_speed(
            settings.backend.threads,
            shape,
            setup,
            sum(tokens),
            sum(n * each.step for n, each in zip(tokens, flops, strict=True)),
            gpu,
            devices_at_once(split, setup.device, accumulation),
        ),
        budget=budget,
        budget_is=budget_is,
        search=search,
        alternative=alternative,
        trainable=not unbuilt_backend(settings.backend)
        and not why_unpacked(settings, shape, found_config),
        jobs=jobs,
        notes=plan_notes(settings, shape, found_config, choice, setup.device, adapter),
    )


def _start_values(settings: AnyPlanSettings, found_config: FoundConfig) -> int:
    """Values of the adapters that a run finds in its model and freezes. Raises ConfigError for a model
    with several, of which it starts from one.
    """
    if not settings.freezes_start:
        return 0
    adapter = settings.model.adapter
    folders = found_config.folders if adapter is None else (Path(adapter),)
    if len(folders) > 1:
        raise ConfigError(
            f"{settings.model.name} has {len(folders)} adapters, and an unlearning "
            "run starts from one; name the folder of one"
        )
    return sum(count_start_values(folder) for folder in folders)


def _memory_need(
    settings: AnyPlanSettings,
    adapter: Callable[[int], PlannedAdapter],
    shape: ModelShape,
    device: DeviceType,
    split: ParallelSplit,
) -> MemoryOfChoice:
    def need(choice: PlanChoice) -> MemoryEstimate:
        setup = memory_setup(
            settings.data.max_length,
            choice,
            device,
            machine.attention_kernel(),
            settings.step_reads,
            compute_format(settings, device),
        )
        return memory_per_rank(shape, adapter(choice.rank), setup, split, choice.accumulation)

    return need


def _nothing_fits_error(
    memory_budget: str, model: PlanModel, search: ChoiceSearchResult, need: MemoryOfChoice
) -> ConfigError:
    """The error, with what a quantised base would need if that is enough."""
    error, least = no_choice_fits_error(memory_budget, search), search.least.choice
    # the larger first: the least that has to be given up
    for precision in ("int8", "nf4"):
        memory = need(replace(least, precision=precision))
        if model.quantize is None and memory.total <= parse_size(memory_budget):
            return ConfigError(
                f"{error}. With model.quantize={precision} it would fit "
                f"({size_in_words(memory.total)})"
            )
    return error
