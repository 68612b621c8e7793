"""What a description means for a plan: the device and its budget, how processes divide a run, the rows
and jobs that one of them has."""

from __future__ import annotations

from pathlib import Path

from lorry.config import runs_by_adapter
from lorry.config.parsing.sizes import parse_size
from lorry.config.schema.train import TrainConfig
from lorry.config.settings import (
    MoePlanSettings,
    PlanSettings,
    UnlearnPlanSettings,
)
from lorry.errors import ConfigError
from lorry.plan import machine
from lorry.plan.choices import (
    SPLIT_FIELDS,
    JobSettings,
    base_precisions,
    refuse_budget_of_jobs,
    require_lora,
)
from lorry.plan.configs import FoundConfig
from lorry.plan.memory import (
    DeviceType,
    PrecisionName,
    kept_precision,
    packed_precision,
)
from lorry.plan.parallel.per_rank import pipeline_slowdown
from lorry.plan.parallel.split import ParallelSplit
from lorry.processor import has_bfloat16

DEFAULT_GPU = "h100"


AnyPlanSettings = PlanSettings | UnlearnPlanSettings | MoePlanSettings


def plan_device(settings: AnyPlanSettings) -> tuple[DeviceType, str | None]:
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


def plan_split(settings: AnyPlanSettings) -> ParallelSplit:
    """How `backend` divides the run over processes, unchecked."""
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


def refuse_stages(split: ParallelSplit, what: str) -> None:
    """Raise ConfigError where the run would be of Megatron's stages, which have no plan of ``what``."""
    if split.backend == "megatron":
        raise ConfigError(
            f"backend=megatron: {what} cannot be planned on it; give backend=ddp or fsdp"
        )


def refuse_untrainable(settings: AnyPlanSettings, split: ParallelSplit) -> None:
    """Raise ConfigError for base weights that train (lora=null) where a run refuses it, too."""
    if settings.lora is None and split.tensor > 1:
        raise ConfigError(
            f"lora=null with backend.tensor_parallel={split.tensor}: base weights train where each "
            "process has whole ones; leave tensor_parallel out, or plan an adapter"
        )
    if settings.lora is None:
        refuse_stages(split, "lora=null")


def devices_at_once(split: ParallelSplit, device: DeviceType, accumulation: int) -> float:
    """What computes at once, in devices, less what a pipeline waits; processes on a CPU divide its
    cores.
    """
    return 1.0 if device == "cpu" else split.processes / pipeline_slowdown(split, accumulation)


def rows_of_a_process(settings: AnyPlanSettings, split: ParallelSplit) -> AnyPlanSettings:
    """The settings with the rows that one process has where `keep_total` divides them, jobs' own
    too. Raises ConfigError where a step has fewer rows than there are processes.
    """
    if not settings.backend.keep_total or split.data == 1:
        return settings
    jobs = []
    for job in settings.jobs:
        train = train_of_a_process(settings.train.model_copy(update=job.train), split).model_dump(
            include=SPLIT_FIELDS
        )
        jobs.append(job.model_copy(update={"train": {**job.train, **train}}))
    return settings.model_copy(
        update={"train": train_of_a_process(settings.train, split), "jobs": jobs}
    )


def train_of_a_process(train: TrainConfig, split: ParallelSplit) -> TrainConfig:
    """The rows and the accumulation that one process has where a step's total is kept: its share, rounded
    up. Raises ConfigError where a step has fewer rows than there are processes.
    """
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


def base_formats(
    settings: AnyPlanSettings, device: DeviceType, found_config: FoundConfig
) -> list[PrecisionName]:
    """The base's format: packed if its files are, or if asked, else that which is computed in. With
    quantize=auto several, preferred ones first.
    """
    config = found_config.config
    return base_precisions(
        settings.model.quantize,
        packed_precision(config),
        compute_format(settings, device),
        kept_precision(config),
    )


def compute_format(settings: AnyPlanSettings, device: DeviceType) -> PrecisionName:
    """The format that is computed in: the dtype; auto is bfloat16 where the device is fast in it."""
    if settings.model.dtype != "auto":
        return settings.model.dtype
    return machine.dtype_of_auto() or (
        "bfloat16" if device == "cuda" or has_bfloat16() else "float32"
    )


def job_settings(settings: AnyPlanSettings, found_config: FoundConfig) -> dict[str, JobSettings]:
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


def budget_of(settings: AnyPlanSettings, gpu: str | None) -> tuple[int | None, str]:
    """Bytes that the plan has to fit in, and whose they are: asked for, else the GPU's own; None, "" where
    nothing says.
    """
    if settings.memory_budget is not None:
        return parse_size(settings.memory_budget), f"memory_budget={settings.memory_budget}"
    return (machine.GPUS[gpu].memory, f"one {gpu}") if gpu else (None, "")
