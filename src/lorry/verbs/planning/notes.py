"""What a person should know of a plan besides its numbers."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.settings import (
    PlanBackend,
    UnlearnPlanSettings,
)
from lorry.plan.adapters import PlannedAdapter
from lorry.plan.configs import FoundConfig
from lorry.plan.memory import (
    DeviceType,
    kept_precision,
    packed_precision,
)
from lorry.plan.search import PlanChoice
from lorry.plan.shapes import ModelShape
from lorry.runs.ownership import run_description_of
from lorry.verbs.planning.description import AnyPlanSettings


def unbuilt_backend(backend: PlanBackend) -> str:
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


def why_unpacked(settings: AnyPlanSettings, shape: ModelShape, found_config: FoundConfig) -> str:
    """Why a run does not hold the matrices in few bits as this plan has it; empty where it does. What
    is refused on several processes is what models/loading/load.py refuses there.
    """
    quantize, backend = settings.model.quantize, settings.backend
    keeps_gguf = quantize == "keep" and kept_precision(found_config.config) != "bfloat16"
    packed_files = keeps_gguf or packed_precision(found_config.config) is not None
    if quantize is None and not packed_files:
        return ""
    asked = f"model.quantize={quantize}" if quantize else "a checkpoint that is packed already"
    if backend.name == "megatron":
        return f"{asked} is refused with backend=megatron, whose linears hold whole matrices"
    if backend.name == "fsdp" or backend.tensor_parallel > 1:
        if not shape.native:
            return f"{asked} is refused where a base that runs through transformers is cut over processes"
        if packed_files:
            return (
                f"{asked} is refused where matrices that files store packed are cut over processes"
            )
    if quantize is not None and shape.experts is not None:
        return f"{asked} leaves stacked experts whole in a run"
    return ""


def plan_notes(
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
    if unpacked := why_unpacked(settings, shape, found_config):
        notes.append(f"{unpacked}: this plan is of what packed ones would need")
    if packed_precision(found_config.config) is not None:
        notes.append(
            f"its files hold matrices packed, which stay so: their bytes count as {choice.precision}'s, an upper bound"
        )
    if settings.model.quantize == "keep" and packed_precision(found_config.config) is None:
        notes.append(
            "model.quantize=keep holds matrices in bfloat16, as the files have them, and computes in the dtype"
            if choice.precision == "bfloat16"
            else f"model.quantize=keep holds matrices as the GGUF file has them (Q4_0, Q4_1, Q8_0): their bytes count as "
            f"{choice.precision}'s, an upper bound; those of other types stay whole, which is not counted"
        )
    if (
        choice.precision == "float32"
        and settings.lora is not None
        and kept_precision(found_config.config) == "bfloat16"
    ):
        notes.append(
            "it computes in float32, and its files are bfloat16: model.quantize=keep holds matrices as they "
            "are there, the same base in half the bytes, for some 5% of the time at 512 tokens"
        )
    if unbuilt := unbuilt_backend(settings.backend):
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
