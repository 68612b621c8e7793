"""The plans of the runs of a mixture: its experts, and the routers over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorry.config import runs_by_adapter
from lorry.config.moe import RouterConfig, router_train
from lorry.config.schema.train import TrainConfig
from lorry.config.settings import (
    MoePlanSettings,
)
from lorry.plan import machine
from lorry.plan.adapters import plan_router, router_reads
from lorry.plan.choices import (
    list_planned_jobs,
    memory_setup,
)
from lorry.plan.configs import FoundConfig, count_start_values
from lorry.plan.flops import count_flops
from lorry.plan.report import RunPlan
from lorry.plan.search import PlanChoice
from lorry.plan.shapes import read_model_shape
from lorry.verbs.planning.build import build_plan, run_plan
from lorry.verbs.planning.description import (
    base_formats,
    compute_format,
    job_settings,
    plan_device,
    plan_split,
    refuse_stages,
    train_of_a_process,
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
            if settings.whole_experts:
                # all that a stock class routes, as the expert's run has it
                values["trainable"] = settings.trainable or "mlp"
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
    device, gpu = plan_device(settings)
    split = plan_split(settings)
    refuse_stages(split, "a router")
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
            for n, job in job_settings(settings, found_config).items()
            if not adapter_folders[n]
        },
        shape,
    )
    adapter = plan_router(shape, router, {job.name: job.adapter for job in planned}, brought)
    train = TrainConfig.model_validate(router_train(settings, router))
    if settings.backend.keep_total:
        train = train_of_a_process(train, split)
    alone = runs_by_adapter(settings.model_copy(update={"output_dir": Path()}))
    precision = base_formats(settings, device, found_config)[0]
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
    compute = compute_format(settings, device)
    setup = memory_setup(length, choice, device, machine.attention_kernel(), reads, compute)
    if router.level == "expert":
        setup = replace(setup, mixed_mlps=router.top_k)
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
    )
