"""`lorry plan [MODEL]`: memory by component and time of a training run, from the config alone; with
a budget, what fits it.

lorry plan model=smollm2-135m r=auto memory_budget=3GiB
lorry plan model=runs/people forget=forget.jsonl retain=retain.jsonl method=NPO
lorry plan llama-3-70b backend=fsdp processes=8 max_length=4096 per_device_train_batch_size=1
lorry plan smollm2-135m device=cpu backend=fsdp processes=2 max_length=1024
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from lorry.config import build_settings, runs_by_adapter
from lorry.config.moe import RouterConfig, router_train
from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema import LoraConfig, TrainBackendConfig, TrainConfig
from lorry.config.settings import (
    MoePlanSettings,
    PlanBackend,
    PlanModel,
    PlanSettings,
    UnlearnPlanSettings,
)
from lorry.console import VisibleConsole
from lorry.errors import ConfigError, ModelError
from lorry.notes import NoteCallback
from lorry.plan import machine
from lorry.plan.adapters import PlannedAdapter, plan_router, router_reads
from lorry.plan.choices import (
    SPLIT_FIELDS,
    JobSettings,
    MemoryOfChoice,
    PlannedJob,
    adapter_at_rank,
    base_precisions,
    combine_adapters,
    find_fitting_choice,
    joint_setup,
    list_planned_jobs,
    memory_setup,
    no_choice_fits_error,
    open_choices,
    refuse_budget_of_jobs,
    require_lora,
)
from lorry.plan.configs import FoundConfig, count_start_values, find_config
from lorry.plan.flops import TokenFlops, count_flops
from lorry.plan.memory import (
    DeviceType,
    MemoryEstimate,
    MemorySetup,
    PrecisionName,
    packed_precision,
)
from lorry.plan.parallel.communication import adapter_sizes, step_collectives
from lorry.plan.parallel.per_rank import memory_per_rank, pipeline_slowdown
from lorry.plan.parallel.split import ParallelSplit, check_split
from lorry.plan.report import RunPlan, StepSpeed
from lorry.plan.search import ChoiceSearchResult, PlanChoice, TriedChoice
from lorry.plan.shapes import ModelShape, read_model_shape
from lorry.runs.ownership import run_description_of
from lorry.verbs.open_model import print_note
from lorry.verbs.planning.speed import step_speed
from lorry.verbs.planning.table import print_plan

DEFAULT_GPU = "h100"


AnyPlanSettings = PlanSettings | UnlearnPlanSettings | MoePlanSettings


def main(settings: AnyPlanSettings) -> int:
    """Print the plan. Raises ConfigError where nothing fits the budget, ModelError where there is
    no such config.
    """
    settings = own_unlearning(settings, print_note)
    found_config = find_config(settings.model.name, revision=settings.model.revision)
    if isinstance(settings, MoePlanSettings):
        return _print_mixture(build_mixture_plans(settings, found_config), settings.format)
    plan = build_plan(settings, found_config)
    if settings.format == "json":
        print(json.dumps(plan.as_json(), indent=1))
        return 0
    print_plan(plan, VisibleConsole())
    return 0


def own_unlearning(settings: AnyPlanSettings, add_note: NoteCallback) -> AnyPlanSettings:
    """A run of `lorry unlearn` that is named as the model, without rows, is meant itself: its run.yaml
    under the settings that were given beside it. With rows it is the start of another run, and any
    other settings are as they are. Raises ConfigError."""
    if not isinstance(settings, PlanSettings) or settings.data.path or settings.data.mix:
        return settings
    described = run_description_of(Path(settings.model.name))
    if described.get("task") != "unlearn":
        return settings
    merged = dict(described)
    for group, given in settings.model_dump(exclude_unset=True).items():
        whole = isinstance(given, dict) and isinstance(merged.get(group), dict)
        merged[group] = {**merged[group], **given} if whole else given
    # what it was trained on, which for the plan is the model; a start that has gone is in the run, too
    start = described["model"]["name"]
    try:
        find_config(start, revision=described["model"].get("revision"))
    except ModelError:
        add_note(f"{start} has gone: planned on the copy of it in {settings.model.name}")
    else:
        merged["model"]["name"] = start
    merged.pop("task")
    add_note(f"{settings.model.name}: the plan of the unlearning that its run.yaml describes")
    return build_settings(UnlearnPlanSettings, merged, add_note)


def build_plan(settings: AnyPlanSettings, found_config: FoundConfig) -> RunPlan:
    """The whole plan of a description whose model's config was found."""
    shape = read_model_shape(
        found_config.config, where=found_config.where, native=settings.model.native
    )
    device, gpu = _plan_device(settings)
    # before the search, whose first choice would meet the error in the middle
    split = _plan_split(settings)
    check_split(split, shape)
    settings = _rows_of_a_process(settings, split)
    frozen = _start_values(settings, found_config)
    if settings.freezes_start:
        # its adapters are part of the base: those that train are the description's
        found_config = replace(found_config, adapter_ranks={})
    jobs = tuple(list_planned_jobs(_job_settings(settings, found_config), shape))
    if len(jobs) > 1:
        return _plan_of_jobs(settings, found_config, shape, jobs, device, gpu, split, frozen)
    lora, has_budget = require_lora(settings.lora), settings.memory_budget is not None
    options = open_choices(
        lora,
        settings.train,
        shape,
        _base_precisions(settings, device, found_config),
        has_budget=has_budget,
        rank=found_config.adapter_rank,
    )
    need = _memory_need(settings, lora, shape, device, split, frozen)
    search, choice = None, options[0]
    if settings.memory_budget is not None:
        search = find_fitting_choice(settings.memory_budget, options, need)
        if search.best is None:
            raise _nothing_fits_error(settings.memory_budget, settings.model, search, need)
        choice = search.best.choice
    setup, adapter = (
        memory_setup(
            settings.data.max_length, choice, device, machine.has_tiles(), settings.step_reads
        ),
        adapter_at_rank(lora, shape, frozen)(choice.rank),
    )
    budget, budget_is = _memory_budget(settings, gpu)
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
    flops = count_flops(shape, adapter, setup)
    tokens = setup.step_tokens * split.data
    return _run_plan(
        settings,
        found_config,
        shape,
        choice,
        setup,
        split,
        adapter,
        memory=need(choice),
        flops=flops,
        speed=step_speed(
            settings.backend.threads,
            shape,
            setup,
            tokens,
            tokens * flops.step,
            gpu,
            _devices(split, device, choice.accumulation),
        ),
        budget=(budget, budget_is),
        search=search,
        alternative=alternative,
    )


def build_mixture_plans(settings: MoePlanSettings, found_config: FoundConfig) -> dict[str, RunPlan]:
    """{stage: its plan} of the runs of a mixture, one after the other; the largest is its peak.
    Raises what `build_plan` raises."""
    brought = {job.name for job in settings.jobs if job.expert.get("adapter")}
    own = [job for job in settings.jobs if job.name not in brought]
    alone = runs_by_adapter(settings.model_copy(update={"output_dir": Path()}))
    plans = dict[str, RunPlan]()
    if settings.together and len(own) > 1 and not settings.whole_experts:
        plans["experts"] = build_plan(settings.model_copy(update={"jobs": own}), found_config)
    else:
        for job in own:
            expert_run = alone[job.name]
            values: dict[str, object] = {
                "jobs": [],
                "lora": expert_run.lora,
                "train": expert_run.train,
                "data": expert_run.data,
            }
            plans[f"expert {job.name}"] = build_plan(
                settings.model_copy(update=values), found_config
            )
    if settings.whole_experts:
        return plans
    if settings.router.is_trained_by_run and len(settings.jobs) > 1:
        plans["router"] = _plan_of_router(settings, found_config, settings.router)
    if (router := settings.export_router()) is not None:
        plans["router of the export"] = _plan_of_router(settings, found_config, router)
    return plans


def _plan_of_router(
    settings: MoePlanSettings, found_config: FoundConfig, router: RouterConfig
) -> RunPlan:
    """The training of a router over experts, frozen or trained with it. Raises ConfigError for a split
    that cannot be, ModelError for an adapter that is not there."""
    shape = read_model_shape(
        found_config.config, where=found_config.where, native=settings.model.native
    )
    device, gpu = _plan_device(settings)
    split = _plan_split(settings)
    _refuse_stages(split, "a router")
    adapter_folders = {job.name: job.expert.get("adapter") for job in settings.jobs}
    brought = [
        sum(count_start_values(Path(folder)) for folder in ([a] if isinstance(a, str) else a))
        for a in adapter_folders.values()
        if a
    ]
    # those that are there have ranks of their own, which only their files know; their values count
    planned = list_planned_jobs(
        {
            n: job
            for n, job in _job_settings(settings, found_config).items()
            if not adapter_folders[n]
        },
        shape,
    )
    adapter = plan_router(shape, router, {job.name: job.adapter for job in planned}, brought)
    train = TrainConfig.model_validate(router_train(settings, router))
    if settings.backend.keep_total:
        train = _train_of_a_process(train, split)
    alone = runs_by_adapter(settings.model_copy(update={"output_dir": Path()}))
    precision = _base_precisions(settings, device, found_config)[0]
    choice = PlanChoice(
        rank=max((job.rank for job in planned), default=0)
        if router.lora is None
        else router.lora["r"],
        rows=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        recompute="full" if train.gradient_checkpointing else "none",
        precision=precision,
    )
    length = max(run.data.max_length for run in alone.values())
    reads = router_reads(shape, router, len(settings.jobs))
    setup = memory_setup(length, choice, device, machine.has_tiles(), reads)
    if router.level == "expert":
        setup = replace(setup, mixed_mlps=router.top_k)
    flops = count_flops(shape, adapter, setup)
    return _run_plan(
        settings,
        found_config,
        shape,
        choice,
        setup,
        split,
        adapter,
        memory=memory_per_rank(shape, adapter, setup, split, choice.accumulation),
        flops=flops,
        speed=step_speed(
            settings.backend.threads,
            shape,
            setup,
            setup.step_tokens * split.data,
            setup.step_tokens * split.data * flops.step,
            gpu,
            _devices(split, device, choice.accumulation),
        ),
        budget=_memory_budget(settings, gpu),
    )


def _print_mixture(plans: dict[str, RunPlan], output_format: str) -> int:
    """Each stage's plan; in JSON by its name."""
    if output_format == "json":
        print(json.dumps({stage: plan.as_json() for stage, plan in plans.items()}, indent=1))
        return 0
    console = VisibleConsole()
    for stage, plan in plans.items():
        console.print(f"{stage}:", markup=False, highlight=False)
        print_plan(plan, console)
    return 0


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
    _refuse_stages(split, "several jobs")
    precision = _base_precisions(settings, device, found_config)[0]
    setup = joint_setup(
        jobs,
        precision,
        device,
        tiles=machine.has_tiles(),
        recompute="full" if settings.train.gradient_checkpointing else "none",
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
    tokens = [job.step_tokens * split.data for job in jobs]
    work = sum(n * each.step for n, each in zip(tokens, flops, strict=True))
    return _run_plan(
        settings,
        found_config,
        shape,
        choice,
        setup,
        split,
        adapter,
        memory=memory_per_rank(shape, adapter, setup, split, choice.accumulation),
        flops=max(flops, key=lambda each: each.step),
        speed=step_speed(
            settings.backend.threads,
            shape,
            setup,
            sum(tokens),
            work,
            gpu,
            _devices(split, device, choice.accumulation),
        ),
        budget=_memory_budget(settings, gpu),
        jobs=jobs,
    )


def _run_plan(
    settings: AnyPlanSettings,
    found_config: FoundConfig,
    shape: ModelShape,
    choice: PlanChoice,
    setup: MemorySetup,
    split: ParallelSplit,
    adapter: PlannedAdapter,
    *,
    memory: MemoryEstimate,
    flops: TokenFlops,
    speed: StepSpeed | None,
    budget: tuple[int | None, str],
    search: ChoiceSearchResult | None = None,
    alternative: TriedChoice | None = None,
    jobs: tuple[PlannedJob, ...] = (),
) -> RunPlan:
    """A plan with what follows from its description. ``budget``: bytes, and whose they are."""
    return RunPlan(
        model=settings.model.name,
        where=found_config.where,
        shape=shape,
        choice=choice,
        setup=setup,
        split=split,
        adapter_parameters=adapter.parameters,
        adapter_sizes=adapter_sizes(adapter, setup),
        memory=memory,
        sent=tuple(step_collectives(shape, adapter, setup, split, choice.accumulation)),
        flops=flops,
        speed=speed,
        budget=budget[0],
        budget_is=budget[1],
        search=search,
        alternative=alternative,
        trainable=not _unbuilt_backend(settings.backend) and not _unpacked(settings, shape),
        jobs=jobs,
        notes=_plan_notes(settings, shape, found_config, choice, setup.device, adapter),
    )


# --- what the description means


def _plan_device(settings: AnyPlanSettings) -> tuple[DeviceType, str | None]:
    """cpu or cuda, and the GPU whose numbers count (None: this machine's own)."""
    device, gpu = settings.model.device, settings.backend.gpu
    several_gpus = settings.backend.name != "single"
    if device in ("cpu", "mps"):
        # several processes speak over gloo on the CPU; of the others every one has a GPU
        needs_gpus = settings.backend.name == "megatron" or (device == "mps" and several_gpus)
        if gpu or needs_gpus:
            raise ConfigError(
                f"model.device={device} and backend.{'gpu' if gpu else 'name'} exclude each other; leave one out"
            )
        return "cpu", None
    if gpu or several_gpus:
        return "cuda", gpu or DEFAULT_GPU
    return ("cuda", None) if device.startswith("cuda") or machine.has_cuda() else ("cpu", None)


def _plan_split(settings: AnyPlanSettings) -> ParallelSplit:
    b = settings.backend
    return ParallelSplit(
        backend=b.name,
        processes=b.processes,
        tensor=b.tensor_parallel,
        pipeline=b.pipeline_parallel,
        expert=b.expert_parallel,
        replicas=b.replicas,
        sequence=b.sequence_parallel,
        reshard_after_forward=b.reshard_after_forward,
        offload=b.offload == "cpu",
        shard_optimizer=b.shard_optimizer,
    )


def _refuse_stages(split: ParallelSplit, what: str) -> None:
    if split.backend == "megatron":
        raise ConfigError(
            f"backend=megatron: {what} cannot be planned on it; give backend=ddp or fsdp"
        )


def _devices(split: ParallelSplit, device: DeviceType, accumulation: int) -> float:
    """What computes at once, in devices, less what a pipeline waits; processes on a CPU divide its
    cores.
    """
    return 1.0 if device == "cpu" else split.processes / pipeline_slowdown(split, accumulation)


def _rows_of_a_process(settings: AnyPlanSettings, split: ParallelSplit) -> AnyPlanSettings:
    """The settings with the rows that one process has where `keep_total` divides them, jobs' own
    too. Raises ConfigError where a step has fewer rows than there are processes.
    """
    if not settings.backend.keep_total or split.data == 1:
        return settings
    jobs = []
    for job in settings.jobs:
        train = _train_of_a_process(settings.train.model_copy(update=job.train), split).model_dump(
            include=SPLIT_FIELDS
        )
        jobs.append(job.model_copy(update={"train": {**job.train, **train}}))
    return settings.model_copy(
        update={"train": _train_of_a_process(settings.train, split), "jobs": jobs}
    )


def _train_of_a_process(train: TrainConfig, split: ParallelSplit) -> TrainConfig:
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if rows * accumulation < split.data:
        raise ConfigError(
            f"a step of {rows} x {accumulation} rows (per_device_train_batch_size x "
            f"gradient_accumulation_steps) is too few for {split.data} processes with "
            "backend.keep_total; raise one of them"
        )
    # micro-batches with too few rows for all processes share a pass (`deal_batches`)
    joined = -(-split.data // rows)
    own = {
        "per_device_train_batch_size": -(-rows * joined // split.data),
        "gradient_accumulation_steps": -(-accumulation // joined),
    }
    return train.model_copy(update=own)


def _base_precisions(
    settings: AnyPlanSettings, device: DeviceType, found_config: FoundConfig
) -> list[PrecisionName]:
    """The base's format: packed if its files are, or if asked, else the dtype; auto is bfloat16 where the
    device is fast in it. With quantize=auto several, preferred ones first.
    """
    whole = settings.model.dtype
    if whole == "auto":
        whole = machine.dtype_of_auto() or (
            "bfloat16" if device == "cuda" or machine.processor_has_bfloat16() else "float32"
        )
    return base_precisions(settings.model.quantize, packed_precision(found_config.config), whole)


def _job_settings(settings: AnyPlanSettings, found_config: FoundConfig) -> dict[str, JobSettings]:
    """Of each job; without `jobs` of the adapters that the model has. Raises ConfigError."""
    refuse_budget_of_jobs(settings.memory_budget, settings.jobs)
    if not settings.jobs:
        return {
            name: JobSettings(
                require_lora(settings.lora), settings.train, settings.data.max_length, rank
            )
            for name, rank in (found_config.adapter_ranks or {}).items()
        }
    # a plan has no output_dir, and a job's is a folder in it
    runs = runs_by_adapter(settings.model_copy(update={"output_dir": Path()}))
    return {
        name: JobSettings(
            (lora := require_lora(run.lora)),
            run.train,
            run.data.max_length,
            lora.most_rank,
            run.step_reads,
        )
        for name, run in runs.items()
    }


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
    lora: LoraConfig,
    shape: ModelShape,
    device: DeviceType,
    split: ParallelSplit,
    frozen: int,
) -> MemoryOfChoice:
    adapter = adapter_at_rank(lora, shape, frozen)

    def need(choice: PlanChoice) -> MemoryEstimate:
        setup = memory_setup(
            settings.data.max_length, choice, device, machine.has_tiles(), settings.step_reads
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


def _memory_budget(settings: AnyPlanSettings, gpu: str | None) -> tuple[int | None, str]:
    if settings.memory_budget is not None:
        return parse_size(settings.memory_budget), f"memory_budget={settings.memory_budget}"
    return (machine.GPUS[gpu].memory, f"one {gpu}") if gpu else (None, "")


def _unbuilt_backend(backend: PlanBackend) -> str:
    """What a run's own settings refuse of these; empty where it takes them."""
    asked = backend.model_dump(exclude={"gpu"})
    defaults = PlanBackend.model_fields
    unknown = asked.keys() - TrainBackendConfig.model_fields.keys()
    if odd := sorted(name for name in unknown if asked[name] != defaults[name].default):
        return f"backend.{odd[0]}"
    try:
        TrainBackendConfig.model_validate({n: v for n, v in asked.items() if n not in unknown})
    except ValidationError:
        return "backend.sequence_parallel"
    return ""


def _unpacked(settings: AnyPlanSettings, shape: ModelShape) -> str:
    """Why a run does not hold the matrices in few bits as this plan has it; empty where it does."""
    if settings.model.quantize is None:
        return ""
    if settings.backend.name in ("fsdp", "megatron") or settings.backend.tensor_parallel > 1:
        return "is refused where the base is cut over processes"
    return "leaves stacked experts whole in a run" if shape.experts is not None else ""


def _plan_notes(
    settings: AnyPlanSettings,
    shape: ModelShape,
    found_config: FoundConfig,
    choice: PlanChoice,
    device: DeviceType,
    adapter: PlannedAdapter,
) -> list[str]:
    notes = []
    if not shape.native:
        notes.append(
            f"{shape.why}; it runs through transformers, more slowly, and these numbers are a rougher estimate"
        )
    if shape.estimate:
        notes.append("the architecture is assumed to be like Llama's")
    if shape.experts is not None:
        on = [matrix for matrix in adapter.matrices if matrix.experts > 1]
        notes.append(
            "the model's experts count as base weights; "
            + (
                f"adapters are on all {on[0].experts} experts of a layer"
                if on
                else "no adapter is on them"
            )
        )
        if settings.backend.name == "fsdp":
            notes.append(
                "transformers stacks the experts of Mixtral, Qwen3-MoE and most others, which no "
                "file holds so: a run with backend=fsdp refuses such a model, and this plan is of "
                "what it would need"
            )
    if unpacked := _unpacked(settings, shape):
        notes.append(
            f"model.quantize={settings.model.quantize} {unpacked}: this plan is of what packing them would need"
        )
    if packed_precision(found_config.config) is not None:
        notes.append(
            f"its files hold matrices packed, which stay so: their bytes count as {choice.precision}'s, an upper bound"
        )
    if unbuilt := _unbuilt_backend(settings.backend):
        notes.append(f"{unbuilt} is not built yet: this plan has not been checked against a run")
    elif settings.backend.name != "single" and device == "cuda":
        notes.append(
            f"backend={settings.backend.name}: a plan for several GPUs, which no run has checked"
        )
    if settings.data.max_length > shape.geometry.context:
        notes.append(
            f"max_length={settings.data.max_length} is beyond the model's context of {shape.geometry.context}"
        )
    reads = settings.step_reads
    if isinstance(settings, UnlearnPlanSettings):
        each = f"{reads.together} sequence{'s' * (reads.together > 1)} in a micro-batch"
        reference_note = (
            f"; the reference model gives {reads.start_answer} of them" if reads.asks_start else ""
        )
        notes.append(
            f"{settings.unlearn.method}: for each row of per_device_train_batch_size "
            f"{each}{reference_note}"
        )
        if reads.asks_start and not reads.live:
            row = 4 if reads.asks_start == "scores" else 4 * shape.geometry.width
            notes.append(
                f"not counted: reference=cached also stores up to {row} bytes for "
                "each token of the rows read, in a pass over them before training"
            )
    if len(found_config.adapter_ranks) > 1:
        notes.append(
            f"{settings.model.name} has {len(found_config.adapter_ranks)} adapters, "
            "counted as jobs of one pass; lorry sft continues training one of them "
            "at a time (name its folder)"
        )
    if found_config.adapter_rank is not None:
        notes.append(
            f"{settings.model.name} is an adapter of rank {choice.rank}; training would continue it"
        )
    folders = dict.fromkeys((Path(settings.model.name), *found_config.folders))
    tasks = {run_description_of(folder).get("task") for folder in folders if found_config.folders}
    if "unlearn" in tasks and not isinstance(settings, UnlearnPlanSettings):
        # its adapter alone does not say so, and the steps of the two verbs differ in memory
        notes.append(
            f"{settings.model.name} is a run of lorry unlearn, and this the plan of a lorry sft that goes on with its "
            "adapter; for one of lorry unlearn over it give forget=FILE (and retain=FILE), for its own no rows at all"
        )
    return notes
